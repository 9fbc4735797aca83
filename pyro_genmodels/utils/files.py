"""Files written whole or not at all."""

from __future__ import annotations

__all__ = ["atomic_write"]

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A file that is written whole or not at all, however many write it at once: the last to finish has it.

    Args:
        path: of the file, whose folder is made; a link is followed.

    Yields:
        Another path in the same folder with the same suffix, to write to. When the block ends it takes the place of `path`,
        with the permissions of any new file; if the block fails it is removed.

    Raises:
        OSError: if it cannot be written, by the name of `path`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     with atomic_write(f"{folder}/figures/mean.txt") as part:
        ...         _ = part.write_text("0.5")
        ...     Path(folder, "figures", "mean.txt").read_text()
        '0.5'
    """
    path = Path(path)
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise OSError(f"{path} cannot be written: it is a folder or a device. Choose another name.")
    part = target.with_name(f".{secrets.token_hex(8)}{path.suffix}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.touch(exist_ok=False)
        mode = part.stat().st_mode
        part.unlink()  # so that a block which writes elsewhere is noticed
        yield part
        part.chmod(mode)  # safetensors for one makes its files private
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, target)
    except OSError as error:
        if error.errno is None and error.filename is None:  # of numpy, say
            raise OSError(f"{path} cannot be written: {error}") from error
        if error.filename in (None, part, str(part)):
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)
