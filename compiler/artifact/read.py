"""File -> `Artifact`: everything in it, checked; nothing loaded onto a device yet."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ... import extensions
from ...errors import ArtifactError, InvalidInputError
from ..graph.typed import Reader, dump, parse
from . import archive, tensors
from .archive import Archive
from .check import check_document
from .program import Document, Program, read_document

LARGEST_JSON = 1 << 28
_VERSION = re.compile(r"[A-Za-z0-9._-]{1,60} [A-Za-z0-9.+!_-]{1,60}")


@dataclass(frozen=True)
class Artifact:
    """An opened file. graphs, ledgers: as plain data, read when somebody asks for them.

    tensors: views of what was read; nothing is asked of the file again.
    """

    path: Path
    document: Document
    tensors: dict[str, torch.Tensor]
    graphs: tuple[Any, ...]
    ledgers: tuple[Any, ...]
    archive: Archive

    @property
    def programs(self) -> tuple[Program, ...]:
        """Sorted by target and batch."""
        return self.document.programs

    @property
    def sha256(self) -> str:
        """Of the manifest, and through it of everything in the file."""
        return archive.digest([self.archive.read("manifest.json", LARGEST_JSON)])

    def code(self, member: str) -> bytes:
        return bytes(self.archive.members[member])

    def size_bytes(self, kind: str) -> int:
        """Bytes of the members whose name ends in `.kind`."""
        members = self.archive.members.items()
        return sum(len(data) for name, data in members if name.endswith(f".{kind}"))

    def holds(self) -> str:
        """The targets and batches, for errors."""
        return ", ".join(
            each.target + (" (batch {} to {})".format(*each.batch) if each.batch else "")
            for each in self.programs
        )


def open_artifact(path: str | Path) -> Artifact:
    """The checked contents of a file.

    Raises: ArtifactError for anything that `save` did not write as it is, or that does not hold
    together, and where an extension that it was made with is missing or has another version;
    InvalidInputError for what is no path.
    """
    if not isinstance(path, str | Path):
        raise InvalidInputError(f"path: expected a file's name, got {type(path).__name__}")
    path = Path(path)
    opened = Archive(path)
    opened.verify(_digests(_json(opened, "manifest.json"), path))
    document = read_document(_json(opened, "plan.json"), f"plan.json of '{path}'")
    for name, version in document.versions:
        if not _VERSION.fullmatch(f"{name} {version}"):
            raise archive.damaged(path, "the name or number of a version in it is malformed")
    if reasons := list(extensions.missing(document.versions)):
        raise ArtifactError(f"'{path}' cannot be used: it was {'; and '.join(reasons)}")
    graphs = _list(opened, "graph.json", "graphs")
    ledgers = _list(opened, "ledger.json", "ledgers")
    if tuple(archive.digest([dump(graph)]) for graph in graphs) != document.graphs:
        raise archive.damaged(path, "plan.json was not made of the graphs in graph.json")
    held = tensors.read(opened)
    counts = len(graphs), len(ledgers)
    source = f"plan.json of '{path}'"
    check_document(document, opened.members.keys(), held, counts, source)
    for name, data in opened.members.items():
        if name.endswith(".cubin") and bytes(data[:4]) != b"\x7fELF":
            raise archive.damaged(path, f"'{name}' is not machine code")
    return Artifact(path, document, held, graphs, ledgers, opened)


def _json(opened: Archive, name: str) -> Any:
    return parse(opened.read(name, LARGEST_JSON), f"{name} of '{opened.path}'")


def _list(opened: Archive, name: str, key: str) -> tuple[Any, ...]:
    data = _json(opened, name)
    if not isinstance(data, dict) or list(data) != [key] or not isinstance(data[key], list):
        raise archive.damaged(opened.path, f"'{name}' is not a list of {key}")
    return tuple(data[key])


@dataclass(frozen=True)
class _Listed:
    size: int
    sha256: str


def _digests(manifest: Any, path: Path) -> dict[str, tuple[int, str]]:
    listed = manifest.get("members") if isinstance(manifest, dict) else None
    if not isinstance(listed, dict) or list(manifest) != ["members"]:
        raise ArtifactError(f"'{path}' is damaged: manifest.json lists no members")
    reader = Reader(f"manifest.json of '{path}'")
    entries = {name: reader.read(_Listed, entry, name[:80]) for name, entry in listed.items()}
    return {name: (entry.size, entry.sha256) for name, entry in entries.items()}
