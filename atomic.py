"""Files that are whole or not there, whoever writes them and whenever the power fails; and folders
for files that will be trusted, which nobody else may write."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_UNFINISHED: set[str] = set()
"""Files that are being written."""


def remove_unfinished() -> None:
    """Removes what is being written, before the process ends in the middle of it."""
    for temporary in tuple(_UNFINISHED):
        with suppress(OSError):
            os.unlink(temporary)


@contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[IO[bytes]]:
    """A new file that takes the place of `path` once it is written and on the disk; where that
    fails, what was there stays and nothing is left behind. mode: its permissions, less the umask.

    Raises: OSError.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    _UNFINISHED.add(temporary)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fchmod(handle, mode & ~_umask())
            os.fsync(handle)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    finally:
        _UNFINISHED.discard(temporary)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # Makes the rename last; some file systems cannot, and then it lasts when they say so.
        with suppress(OSError):
            os.fsync(folder)
    finally:
        os.close(folder)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


PRIVATE = 0o600
"""Permissions of files that only this user reads and writes."""


def private_folder(folder: Path, *below: str) -> Path:
    """The folder `below` another, both made for this user alone where they are not there.

    Raises: OSError, PermissionError too where somebody else may write there.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    refuse_others(folder)
    for name in below:
        folder = folder / name
        folder.mkdir(mode=0o700, exist_ok=True)
        refuse_others(folder)
    return folder


def refuse_others(path: Path) -> None:
    """Raises PermissionError where a user other than this one and root may write a file or folder;
    OSError where it cannot be asked."""
    found = path.stat()
    mode = stat.S_IMODE(found.st_mode)
    if found.st_uid not in (os.geteuid(), 0):
        who = f"it belongs to user {found.st_uid}, this is {os.geteuid()}"
    elif mode & 0o022:
        who = f"its permissions are {mode:o}; expected 700, chmod go-w"
    else:
        return
    raise PermissionError(errno.EPERM, f"others may write it: {who}", str(path))
