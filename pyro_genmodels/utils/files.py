"""Files that are written completely or not at all, and limits on the size of what is read."""

from __future__ import annotations

__all__ = ["MAX_BYTES", "atomic_write", "check_size"]

import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from itertools import count
from pathlib import Path

from pyro_genmodels.utils.errors import ArgumentError

MAX_BYTES = 10**9
"""Default limit on the size in bytes of a file that is read, and of what it unpacks to."""

LEFTOVER_SECONDS = 86_400.0
"""Age in seconds from which a temporary file of a process that is not found is a leftover, not one of another container's."""

_HOST = sha256(socket.gethostname().encode()).hexdigest()[:8]
_PROCESS = secrets.token_hex(4)
"""Text that tells this process from an earlier one with the same number; a fork has the same text and another number."""
_numbers = count()


def check_size(what: str, size: int, max_bytes: int) -> None:
    """Raise an error if something is too large to be read.

    Args:
        what: subject of the error message.
        size: its size in bytes.
        max_bytes: largest size.

    Raises:
        ArgumentError: if it is larger. This is a ValueError too.

    Example:
        >>> check_size("it", 30, max_bytes=20)
        Traceback (most recent call last):
        pyro_genmodels.utils.errors.ArgumentError: it takes 30 bytes, but at most 20 are read. If you trust it, raise max_bytes.
    """
    if size > max_bytes:
        raise ArgumentError(
            f"{what} takes {size:,} bytes, but at most {max_bytes:,} are read. If you trust it, raise max_bytes.",
            argument="max_bytes",
            example=str(size),
        )


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write a file completely or not at all, also if several processes write it at once; the last one to finish wins.

    Temporary files of the same target that processes of this machine left behind when they were killed are removed when they
    are a day old. A younger one may be of a process in another container, whose number means nothing here.

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
    prefix = f".{sha256(target.name.encode()).hexdigest()[:12]}-{_HOST}-"
    temporary = target.with_name(f"{prefix}{os.getpid()}-{_PROCESS}-{next(_numbers)}{path.suffix}")
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target.parent, prefix)
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


def _remove_leftovers(folder: Path, prefix: str) -> None:
    """Remove temporary files whose name begins with `prefix`, which are a day old, and whose process has ended."""
    if os.name != "posix":  # elsewhere signal 0 of `os.kill` ends the process
        return
    for path in folder.glob(f"{prefix}*"):
        number, _, rest = path.name.removeprefix(prefix).partition("-")
        if number.isdecimal() and not _is_alive(int(number), rest.partition("-")[0]):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                    path.unlink()


def _is_alive(number: int, process: str) -> bool:
    """Return True if a process may still be running, given its number and the text that tells it from others."""
    if number == os.getpid():
        return process == _PROCESS
    try:
        with suppress(PermissionError):  # it is another user's
            os.kill(number, 0)
    except (ProcessLookupError, OverflowError):
        return False
    return True
