"""Compiled kernels on disk: Triton's cache inside ours, whose entries carry their own hash.

What is read from here runs as this user, and travels in saved executables. Folders are this user's
alone; every file stands beside its sha256, and one that does not agree with it (a crash, a full
disk) or that others may write is a miss with a warning: it is compiled and written again.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import triton
from triton.runtime.cache import FileCacheManager

from ... import settings
from ...atomic import PRIVATE, private_folder, refuse_others
from ...errors import KernelError
from .entries import content_hash

LOG = logging.getLogger("convloom")
SUM = ".sha256"


class CheckedCache(FileCacheManager):  # type: ignore[misc]
    """Triton's files of one kernel."""

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        """Writes a file, then its hash: whoever comes between sees a miss."""
        content = data if isinstance(data, bytes) else str(data).encode()
        path: str = super().put(content, filename)
        beside = super().put(content_hash(content).encode(), filename + SUM)
        for written in (path, beside):
            os.chmod(written, PRIVATE)
        return path

    def get_file(self, filename: str) -> str | None:
        """The path of a file that is what was written, or None."""
        path: str | None = super().get_file(filename)
        beside = super().get_file(filename + SUM)
        if path is None or beside is None:
            return None
        try:
            for each in (self.cache_dir, path):
                refuse_others(Path(each))
            if content_hash(Path(path).read_bytes()) == Path(beside).read_text():
                return path
            reason: object = "its sha256 is another"
        except (OSError, ValueError) as error:
            reason = error
        LOG.warning("compiled kernel %s is ignored and compiled again: %s", path, reason)
        return None

    def get_group(self, filename: str) -> dict[str, str] | None:
        """The files of a kernel by name, all or none."""
        path = self.get_file(f"__grp__{filename}")
        if path is None:
            return None
        names = json.loads(Path(path).read_text())["child_paths"]
        paths = {name: self.get_file(name) for name in names}
        return None if None in paths.values() else {n: p for n, p in paths.items() if p}


@contextmanager
def triton_cache() -> Iterator[Path]:
    """Triton's cache inside ours, for the duration of the block.

    Raises: KernelError where nothing can be kept there, or others may write there.
    """
    root, knobs = settings.read().cache_dir, triton.knobs.cache
    try:
        folder = private_folder(root, "triton")
    except OSError as error:
        raise unwritable(root, error) from error
    previous = knobs.dir, knobs.manager_class
    knobs.dir, knobs.manager_class = str(folder), knobs.manager_class or CheckedCache
    try:
        yield root
    finally:
        knobs.dir, knobs.manager_class = previous


def unwritable(root: Path, error: OSError) -> KernelError:
    """The error for a cache folder in which nothing can be kept."""
    return KernelError(
        f"the cache folder {root} cannot be written: {error.strerror or error}. Set "
        "CONVLOOM_CACHE_DIR to a folder of yours that can"
    )
