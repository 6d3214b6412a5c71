"""Folders of tuning records: `ARCHITECTURE/OP/HASH.json`, one file for each key.

Files are written under a temporary name beside their own, synced and renamed, so that a reader sees
a whole record or none, however many processes write and wherever one of them dies. A file that is
not what it claims is a miss with a warning, never an error, and never deleted unasked.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ... import settings
from ...atomic import PRIVATE, private_folder, refuse_others, replacing
from ...errors import ArtifactError
from .keys import Key
from .records import NewerRecordError, Record, from_text, to_text

LOG = logging.getLogger("convloom")
SHIPPED = Path(__file__).resolve().parents[2] / "kernels" / "records"
"""The records that come with the package."""
LARGEST_FILE = 1 << 20
"""Bytes; a record is a few kilobytes."""


def user_folder() -> Path:
    return settings.read().cache_dir / "records"


class Store:
    """The records of one folder. Files are read when first asked for and then remembered."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[Path, Record | None] = {}

    def path(self, key: Key) -> Path:
        return self.folder / key.architecture / key.op / f"{key.digest}.json"

    def get(self, key: Key) -> Record | None:
        """The record of exactly this key, or None."""
        return self._load(self.path(key))

    def of(self, architecture: str, op: str) -> list[Record]:
        """Every valid record of an op on a GPU generation, in the order of the files' names."""
        paths = _listed(self.folder / architecture / op)
        return [record for path in paths if (record := self._load(path)) is not None]

    def files(self) -> Iterator[Path]:
        """Every file that should be a record."""
        for architecture in _listed(self.folder, ""):
            for op in _listed(architecture, ""):
                yield from _listed(op)

    def all(self) -> list[Record]:
        return [record for path in self.files() if (record := self._load(path)) is not None]

    def _load(self, path: Path) -> Record | None:
        if path not in self._known:
            self._known[path] = None
            try:
                record = read(path)
                if self.folder != SHIPPED:  # That one is as safe as the package that it is in.
                    for each in (self.folder, *path.parents[:2], path):
                        refuse_others(each)
                self._known[path] = record
            except (FileNotFoundError, NotADirectoryError):
                pass
            except (ArtifactError, OSError) as error:
                LOG.warning("tuning record %s is ignored: %s", path, error)
        return self._known[path]

    def put(self, record: Record) -> None:
        """Writes the record, in place of the one that the key has.

        Raises: ArtifactError where it cannot be written; what was there before is then untouched.
        """
        path = self.path(record.key)
        try:
            private_folder(self.folder, record.key.architecture, record.key.op)
            with replacing(path, PRIVATE) as file:
                file.write(to_text(record).encode())
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            advice = "Free some space" if full else "Pass --to FOLDER, or set CONVLOOM_CACHE_DIR"
            problem = f"cannot write tuning record '{path}': {error.strerror or error}"
            raise ArtifactError(f"{problem}. {advice}") from error
        self._known[path] = record

    def remove(self, path: Path) -> None:
        """Deletes a file of this store.

        Raises: ArtifactError where it cannot be deleted.
        """
        self._known.pop(path, None)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise ArtifactError(f"cannot delete '{path}': {error.strerror or error}") from error


def _listed(folder: Path, suffix: str = ".json") -> list[Path]:
    """The entries of a folder that may not exist; temporary files start with a dot."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [folder / name for name in names if name.endswith(suffix) and not name.startswith(".")]


def read(path: Path) -> Record:
    """The record in a file.

    Raises: ArtifactError where the file is no valid record, or that of another key; OSError where
    it cannot be read.
    """
    record = read_anywhere(path)
    if path.stem != record.key.digest:
        raise ArtifactError(f"it holds the record of {record.key}, which is {record.key.digest}")
    if path.parts[-3:-1] != (record.key.architecture, record.key.op):
        raise ArtifactError(f"it belongs in {record.key.architecture}/{record.key.op}")
    return record


def read_anywhere(path: Path) -> Record:
    """The record in a file of any name.

    Raises: ArtifactError where the file is no valid record; OSError where it cannot be read.
    """
    if path.stat().st_size > LARGEST_FILE:
        raise ArtifactError(f"not a tuning record: larger than {LARGEST_FILE} bytes")
    try:
        return from_text(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ArtifactError("not a tuning record: no text") from error


# Records of other machines, and records that have had their day.


@dataclass(frozen=True)
class Merged:
    """What became of one file. outcome: "added", "better", "kept" (ours) or "refused"."""

    path: Path
    outcome: str
    reason: str = ""
    record: Record | None = None


def merge(store: Store, sources: list[Path]) -> list[Merged]:
    """Takes records over from files, and from every .json file below folders.

    Where both sides have a record, the better one stays: measured before modelled, then the faster
    one. A file that is no valid record is refused and changes nothing.

    Raises: ArtifactError for a source without any, or where the store cannot be written.
    """
    files = {it: sorted(it.rglob("*.json")) if it.is_dir() else [it] for it in sources}
    for source, paths in files.items():
        if not paths or not source.exists():
            why = "no such file or folder" if paths else "a folder without records (*.json)"
            raise ArtifactError(f"records to merge '{source}': {why}")
    return [_merge_file(store, path) for paths in files.values() for path in paths]


def _merge_file(store: Store, path: Path) -> Merged:
    try:
        record = read_anywhere(path)
    except ArtifactError as error:
        return Merged(path, "refused", str(error))
    except OSError as error:
        return Merged(path, "refused", error.strerror or str(error))
    # Those for another Triton are somebody's, and never in the way; those of other kernels are not.
    if (reason := record.key.of_other_kernels) is not None:
        return Merged(path, "refused", reason, record)
    ours = store.get(record.key)
    if ours is not None and not record.beats(ours):
        return Merged(path, "kept", f"ours: {ours}; theirs: {record}", record)
    store.put(record)
    return Merged(path, "added" if ours is None else "better", str(record), record)


def prune(store: Store) -> list[Merged]:
    """Deletes stale and unreadable records; returns one entry for each.

    A record of a newer format stays: the version that wrote it may come back.
    """
    dropped = []
    for path in list(store.files()):
        try:
            record = read(path)
            reason = record.key.stale
        except (NewerRecordError, OSError):
            continue
        except ArtifactError as error:
            record, reason = None, str(error)
        if reason is not None:
            store.remove(path)
            dropped.append(Merged(path, "dropped", reason, record))
    return dropped
