"""The zip around the members, in the one form that is written and accepted.

Members are stored uncompressed, sorted by name, aligned to 64 bytes, without times, comments or
attributes. Reading therefore parses next to nothing: names, sizes and checksums are taken from the
central directory, everything else is made again from them and must be equal to what the file holds.
A compressed member, a duplicate, a gap, a path that climbs, a stranger's zip all differ somewhere.

Source: PKWARE's APPNOTE 6.3; the alignment by an extra field is that of Android's zipalign.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import stat
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import IO

from ...atomic import replacing
from ...errors import ArtifactError

ALIGNMENT = 64
"""Bytes; of each member's data in the file, so that tensors can be mapped."""
LARGEST_FILE = 2**32 - 1
MOST_MEMBERS = 16_384
LONGEST_NAME = 64
NAME = re.compile(
    r"(graph|ledger|manifest|plan)\.json|weights\.safetensors"
    r"|kernels/sm_[0-9]{2,3}/[0-9a-f]{32}\.(cubin|ptx)"
)
NAME_DIGITS = 32
"""Of its sha256, in the name of a kernel and of a tensor."""
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS

# Version 2.0, no flags, stored; midnight of 1 January 1980, the first moment of zip's calendar.
_FIXED = (20, 0, 0, 0, 0x21)
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_EXTRA = struct.Struct("<2H")
_PADDING = 0xD935
"""The extra field that zipalign pads with."""

Content = Sequence[bytes | memoryview]
"""A member's bytes in pieces."""


@dataclass(frozen=True)
class Entry:
    name: str
    size: int
    checksum: int


def write(path: Path, members: Mapping[str, Content]) -> None:
    """Writes the members under a temporary name, syncs, and renames.

    Raises: ArtifactError where the file cannot be written or would be larger than a zip can be.
    """
    names = sorted(members)
    entries = [Entry(name, _size(members[name]), _checksum(members[name])) for name in names]
    if not _fits(entries):
        raise ArtifactError(
            f"cannot write '{path}': expected at most 4 GiB in {MOST_MEMBERS:,} members, got "
            f"{sum(entry.size for entry in entries):,} bytes in {len(names):,}; save fewer targets "
            "or batch ranges"
        )
    _, headers, directory = _arrange(entries)
    try:
        with replacing(path) as file:
            for name, header in zip(names, headers, strict=True):
                file.writelines([header, *members[name]])
            file.write(directory)
    except OSError as error:
        raise ArtifactError(f"cannot write '{path}': {error.strerror or error}") from error


def _size(content: Content) -> int:
    return sum(len(piece) for piece in content)


def _checksum(content: Content) -> int:
    checksum = 0
    for piece in content:
        checksum = zlib.crc32(piece, checksum)
    return checksum


def digest(content: Content) -> str:
    hashed = hashlib.sha256()
    for piece in content:
        hashed.update(piece)
    return hashed.hexdigest()


def _fits(entries: Sequence[Entry]) -> bool:
    """Whether members of these sizes fit into a zip, whatever lies around them."""
    around = _LOCAL.size + _CENTRAL.size + 2 * LONGEST_NAME + 2 * ALIGNMENT
    total = sum(entry.size + around for entry in entries) + _END.size
    return total <= LARGEST_FILE and len(entries) <= MOST_MEMBERS


def _arrange(entries: Sequence[Entry]) -> tuple[list[int], list[bytes], bytes]:
    """Where members begin, the header in front of each, and the directory behind them all."""
    starts, headers, listed = [], [], []
    position = 0
    for entry in entries:
        name = entry.name.encode("ascii")
        start = position + _LOCAL.size + len(name)
        # An extra field has four bytes at least.
        padding = -start % ALIGNMENT
        padding += ALIGNMENT if 0 < padding < _EXTRA.size else 0
        extra = _EXTRA.pack(_PADDING, padding - _EXTRA.size) if padding else b""
        sizes = (entry.checksum, entry.size, entry.size, len(name))
        headers.append(
            _LOCAL.pack(b"PK\3\4", *_FIXED, *sizes, padding) + name + extra.ljust(padding, b"\0")
        )
        listed.append(_CENTRAL.pack(b"PK\1\2", 20, *_FIXED, *sizes, 0, 0, 0, 0, 0, position) + name)
        starts.append(start + padding)
        position = start + padding + entry.size
    central = b"".join(listed)
    count = len(entries)
    end = _END.pack(b"PK\5\6", 0, 0, count, count, len(central), position, 0)
    return starts, headers, central + end


class Archive:
    """A file of the one accepted form, in memory; what its members hold is checked by `verify`.

    All of it is read at once: what is checked is what is used, whoever changes the file or cuts it
    off afterwards. `members` are views of it.
    """

    def __init__(self, path: Path) -> None:
        """Raises: ArtifactError for anything but what `write` writes."""
        self.path = path
        try:
            with _opened(path) as file:
                size = os.fstat(file.fileno()).st_size
                entries = _directory(path, file, size)
                # Whole pages, which torch may take for its own and which start at one.
                data = memoryview(mmap.mmap(-1, size, flags=PRIVATE))
                file.seek(0)
                if file.readinto(data) != size or file.read(1):
                    raise damaged(path, "it was changed while it was read")
        except OSError as error:
            raise ArtifactError(f"cannot read '{path}': {error.strerror or error}") from error
        self.members = _members(path, data, entries)
        self._checksums = {entry.name: entry.checksum for entry in entries}

    def verify(self, digests: Mapping[str, tuple[int, str]]) -> None:
        """Raises ArtifactError unless the members but the manifest are those with these sizes and
        sha256, and kernels are named by theirs."""
        expected = sorted({*digests, "manifest.json"})
        if expected != sorted(self.members):
            differing = sorted(set(expected) ^ set(self.members))
            raise damaged(self.path, f"'{differing[0]}' is not in both manifest.json and the file")
        for name, (size, sha256) in digests.items():
            data = self.members[name]
            if size != len(data):
                raise damaged(
                    self.path, f"'{name}' has {len(data)} bytes, manifest.json says {size}"
                )
            if zlib.crc32(data) != self._checksums[name] or digest([data]) != sha256:
                raise damaged(self.path, f"the sha256 of '{name}' is not manifest.json's")
            if name.startswith("kernels/") and Path(name).stem != sha256[:NAME_DIGITS]:
                raise damaged(self.path, f"'{name}' is not named by its sha256, {sha256}")

    def read(self, name: str, most_bytes: int) -> bytes:
        """A member's bytes, checked against the zip's own checksum.

        Raises: ArtifactError where it is missing, too large or damaged.
        """
        if name not in self.members:
            raise ArtifactError(f"'{self.path}' is not a convloom executable: it has no '{name}'")
        data = self.members[name]
        if len(data) > most_bytes:
            raise damaged(self.path, f"'{name}' has {len(data):,} bytes, more than {most_bytes:,}")
        if zlib.crc32(data) != self._checksums[name]:
            raise damaged(self.path, f"the checksum of '{name}' is wrong")
        return bytes(data)


def _opened(path: Path) -> BufferedReader:
    """The file, open for reading. What is no file, a pipe that nobody writes into, is not waited
    for.

    Raises: ArtifactError for it, and for what is no path; OSError.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:
        raise ArtifactError(f"cannot read {str(path)!r}: no file has this name: {error}") from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        kind = "Is a directory" if path.is_dir() else "it is no file, but a pipe or a device"
        raise ArtifactError(f"cannot read '{path}': {kind}")
    return open(handle, "rb")


def damaged(path: Path, what: str) -> ArtifactError:
    """The error for a file that once was an executable."""
    return ArtifactError(f"'{path}' is damaged: {what}. Build it again, or copy it again")


def _directory(path: Path, file: IO[bytes], size: int) -> list[Entry]:
    """The members by the central directory, nothing of which is believed yet."""
    if not _END.size <= size <= LARGEST_FILE:
        raise ArtifactError(
            f"'{path}' is not a convloom executable: expected {_END.size} bytes to 4 GiB, got "
            f"{size:,}"
        )
    file.seek(size - _END.size)
    mark, _, _, count, _, length, start, _ = _END.unpack(file.read(_END.size))
    if mark != b"PK\5\6" or start + length + _END.size != size:
        raise ArtifactError(
            f"'{path}' is not a convloom executable, or it was cut off: it does not end as one"
        )
    if count > MOST_MEMBERS or length > count * (_CENTRAL.size + LONGEST_NAME):
        raise damaged(path, f"its directory of {count} members has {length} bytes")
    file.seek(start)
    central, entries = memoryview(file.read(length)), []
    while central:
        if len(central) < _CENTRAL.size:
            raise damaged(path, "its directory ends within an entry")
        values = _CENTRAL.unpack_from(central)
        end = _CENTRAL.size + values[10]
        name = str(central[_CENTRAL.size : end], "latin-1")
        if not NAME.fullmatch(name):
            raise ArtifactError(
                f"'{path}' is not a convloom executable: it holds {name[:LONGEST_NAME]!r}"
            )
        entries.append(Entry(name, size=values[9], checksum=values[7]))
        central = central[end:]
    return entries


def _members(path: Path, data: memoryview, entries: Sequence[Entry]) -> dict[str, memoryview]:
    """Members by name, once everything around them is what `_arrange` makes."""
    names = [entry.name for entry in entries]
    if not _fits(entries):
        raise damaged(path, "its members are larger than a zip can be")
    if names != sorted(set(names)):
        raise damaged(path, "its members are not each there once, in order")
    starts, headers, directory = _arrange(entries)
    members, end = {}, 0
    for entry, start, header in zip(entries, starts, headers, strict=True):
        if data[start - len(header) : start] != header:
            raise damaged(path, f"the header of '{entry.name}' is not what convloom writes")
        end = start + entry.size
        members[entry.name] = data[start:end]
    if data[end:] != directory:
        raise damaged(path, "its directory is not what convloom writes")
    return members


def manifest_of(members: Mapping[str, Content]) -> dict[str, dict[str, int | str]]:
    return {
        name: {"size": _size(content), "sha256": digest(content)}
        for name, content in sorted(members.items())
    }
