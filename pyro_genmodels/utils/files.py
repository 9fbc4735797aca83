"""Files that are written completely or not at all."""

from __future__ import annotations

__all__ = ["atomic_write"]

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write a file completely or not at all, also if several processes write it at once; the last one to finish wins.

    Args:
        path: path of the file. Missing folders are created; a symbolic link is followed.

    Yields:
        Path of a temporary file in the same folder, with the same suffix, for the block to write to. At the end of the block it
        replaces `path`, with the permissions of any new file. If the block fails, it is removed.

    Raises:
        OSError: if the file cannot be written. The error names `path`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     with atomic_write(f"{folder}/figures/mean.txt") as temporary:
        ...         _ = temporary.write_text("0.5")
        ...     Path(folder, "figures", "mean.txt").read_text()
        '0.5'
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(f"{path} cannot be written: it is a folder or a device. Choose another name.")
    temporary = target.with_name(f".{secrets.token_hex(8)}{path.suffix}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        temporary.unlink()  # a block that writes somewhere else then fails below
        yield temporary
        temporary.chmod(mode)  # safetensors, for example, makes its files private
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        if error.errno is None and error.filename is None:  # raised by numpy, for example
            raise OSError(f"{path} cannot be written: {error}") from error
        if error.filename in (None, temporary, str(temporary)):
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
