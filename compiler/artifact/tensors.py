"""`weights.safetensors`: every distinct tensor of the programs and graphs once, flat, named by its
content.

A graph's weight and the same weight packed for a kernel often hold the same numbers in another
order. Such a tensor is stored once, as the kernel wants it; the graph says in which order of its
dimensions it lies there (`Stored.order`).

Source: the safetensors format, https://huggingface.co/docs/safetensors; the file is one that its
library reads, in the one order that is written here (wide types first, then by name).
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...errors import ArtifactError
from ..graph.typed import Reader
from .archive import NAME_DIGITS, Archive, Content, damaged

MEMBER = "weights.safetensors"
LONGEST_HEADER = 1 << 24
CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in CODES.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor of a graph: `shape`, and the order of its dimensions in the stored tensor."""

    tensor: str
    shape: tuple[int, ...]
    order: tuple[int, ...]


@dataclass
class Pool:
    """The tensors of a file that is being written; equal ones are one."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, tensor: torch.Tensor) -> str:
        """The name of a tensor's numbers as they lie in memory."""
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        if flat.dtype not in CODES:
            raise ArtifactError(f"constants of dtype {flat.dtype} cannot be saved")
        hashed = hashlib.sha256(CODES[flat.dtype].encode())
        hashed.update(_bytes_of(flat))
        name = hashed.hexdigest()[:NAME_DIGITS]
        self.tensors.setdefault(name, flat)
        return name

    def find_or_add(self, tensor: torch.Tensor) -> Stored:
        """The stored tensor that has these numbers in some order, or a new one."""
        shape = tuple(tensor.shape)
        orders = [tuple(range(tensor.dim()))]
        if tensor.dim() > 2:
            orders.append((0, *range(2, tensor.dim()), 1))
        for order in orders:
            name = Pool().add(tensor.permute(order))
            if name in self.tensors:
                return Stored(name, shape, order)
        return Stored(self.add(tensor), shape, orders[0])

    def content(self) -> Content:
        """The safetensors file."""
        ordered = sorted(self.tensors, key=lambda name: (-self.tensors[name].itemsize, name))
        sizes = {name: (t.dtype, t.numel()) for name, t in self.tensors.items()}
        header = _header({name: sizes[name] for name in ordered})
        return [header, *(_bytes_of(self.tensors[name]) for name in ordered)]


def _bytes_of(flat: torch.Tensor) -> memoryview:
    return flat.view(torch.uint8).numpy().data


def _header(sizes: Mapping[str, tuple[torch.dtype, int]]) -> bytes:
    """The length, and the description of the tensors, padded so that their data is aligned."""
    described, position = {}, 0
    for name, (dtype, count) in sizes.items():
        end = position + count * dtype.itemsize
        described[name] = {
            "dtype": CODES[dtype],
            "shape": [count],
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(described, separators=(",", ":")).encode("ascii")
    text += b" " * (-(len(text) + 8) % 64)
    return struct.pack("<Q", len(text)) + text


def read(archive: Archive) -> dict[str, torch.Tensor]:
    """The tensors by name, as views of what was read of the file.

    Raises: ArtifactError for anything but what `Pool.content` writes.
    """
    if MEMBER not in archive.members:
        raise ArtifactError(f"'{archive.path}' is not a convloom executable: it has no '{MEMBER}'")
    data = archive.members[MEMBER]
    length = struct.unpack("<Q", data[:8])[0] if len(data) >= 8 else 0
    if not 0 < length <= min(LONGEST_HEADER, len(data) - 8):
        raise damaged(archive.path, f"the header of '{MEMBER}' has {length} bytes")
    sizes = dict(_sizes(archive.path, bytes(data[8 : 8 + length])))
    if _header(sizes) != data[: 8 + length]:
        raise damaged(archive.path, f"the header of '{MEMBER}' is not what convloom writes")
    total = sum(dtype.itemsize * count for dtype, count in sizes.values())
    if 8 + length + total != len(data):
        raise damaged(archive.path, f"'{MEMBER}' has not the size its header says")
    return dict(_map(sizes, data[8 + length :]))


@dataclass(frozen=True)
class _Described:
    dtype: str
    shape: tuple[int]
    data_offsets: tuple[int, int]


def _sizes(path: Path, header: bytes) -> Iterator[tuple[str, tuple[torch.dtype, int]]]:
    where = f"the header of '{MEMBER}'"
    try:
        described = json.loads(header.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"{where} is not JSON") from error
    if not isinstance(described, dict):
        raise damaged(path, f"{where} is not a JSON object")
    reader = Reader(f"{where} of '{path}'")
    for name, entry in described.items():
        tensor: _Described = reader.read(_Described, entry, name[:40])
        if tensor.dtype not in _DTYPES or tensor.shape[0] < 0:
            raise damaged(path, f"'{MEMBER}' describes '{name[:40]}' as no flat tensor")
        yield name, (_DTYPES[tensor.dtype], tensor.shape[0])


def _map(
    sizes: Mapping[str, tuple[torch.dtype, int]], data: memoryview
) -> Iterator[tuple[str, torch.Tensor]]:
    position = 0
    for name, (dtype, count) in sizes.items():
        if count:
            yield name, torch.frombuffer(data, dtype=dtype, count=count, offset=position)
        else:
            yield name, torch.empty(0, dtype=dtype)
        position += count * dtype.itemsize


def logical(stored: Stored, tensors: Mapping[str, torch.Tensor], where: str) -> torch.Tensor:
    """A graph's tensor as a view of the stored one.

    Raises: ArtifactError where there is no such tensor, or it has another size.
    """
    rank = len(stored.shape)
    flat = tensors.get(stored.tensor)
    if flat is None or sorted(stored.order) != list(range(rank)):
        raise ArtifactError(f"{where} names a tensor or an order that the file does not have")
    if min(stored.shape, default=1) < 0 or math.prod(stored.shape) != flat.numel():
        raise ArtifactError(
            f"{where} has shape {stored.shape}, its stored tensor {flat.numel()} elements"
        )
    lies = flat.reshape([stored.shape[dim] for dim in stored.order])
    return lies.permute([stored.order.index(dim) for dim in range(rank)])
