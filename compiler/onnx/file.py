"""Reads an ONNX file: its nodes, constants, inputs and outputs, checked before they are used.

The `onnx` package parses and checks the structure. The numbers of the weights never pass through
it: the file is mapped, the bytes of each large tensor are found by walking the protobuf encoding,
and are copied once, straight into a torch tensor. What a file may refer to outside itself (external
data) are regular files in its own folder.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ...errors import ArtifactError

INSTALL = "reading ONNX files needs the onnx package: pip install 'onnx>=1.16'"
OLDEST_OPSET, NEWEST_OPSET = 9, 27
DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32,
    7: torch.int64, 9: torch.bool, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip
"""Of TensorProto.DataType (onnx.proto)."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
LARGE = 1024
"""Bytes of a field from which the parser does not see it."""
GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9
"""Field numbers of ModelProto.graph, GraphProto.initializer and TensorProto.raw_data."""
MOST_NODES = 100_000
PIECE = 1 << 23
"""Bytes of a mapped file that are copied at a time, and then need no memory."""


class Node(NamedTuple):
    """One operator call. inputs, outputs: names of values, "" for one that is left out."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]


class Branch(NamedTuple):
    """A graph that is an attribute, of If; it reads values of the graph around it as well."""

    nodes: tuple[Node, ...]
    constants: Mapping[str, torch.Tensor]
    outputs: tuple[str, ...]

    def renamed(self, name_of: Callable[[str], str]) -> Branch:
        """With other names of values, in the branches inside it too."""
        nodes = []
        for node in self.nodes:
            attributes = {
                key: value.renamed(name_of) if isinstance(value, Branch) else value
                for key, value in node.attributes.items()
            }
            inputs, outputs = (tuple(map(name_of, each)) for each in (node.inputs, node.outputs))
            nodes.append(Node(node.op, node.name, inputs, outputs, attributes))
        constants = {name_of(name): tensor for name, tensor in self.constants.items()}
        return Branch(tuple(nodes), constants, tuple(map(name_of, self.outputs)))


class Input(NamedTuple):
    """An input of the graph. shape: sizes, or the name of one that the file leaves open."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class File:
    """What an ONNX file says. constants: its initializers by name."""

    name: str
    opset: int
    nodes: tuple[Node, ...]
    constants: Mapping[str, torch.Tensor]
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]


def onnx_package() -> Any:
    """The onnx package.

    Raises: ArtifactError where it is not installed.
    """
    try:
        import onnx
        import onnx.checker
        import onnx.helper
        import onnx.inliner
        import onnx.numpy_helper
    except ImportError as error:
        raise ArtifactError(INSTALL) from error
    return onnx


def read(path: Path) -> File:
    """The file at `path`, checked; its weights are copies.

    Raises: ArtifactError naming the file and what is wrong with it.
    """
    onnx = onnx_package()
    try:
        return _read(onnx, path)
    except _Damaged as error:
        raise ArtifactError(f"{path} {error}") from error
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is not valid ONNX: a name in it is not UTF-8") from error
    except OSError as error:
        reason = error.strerror or error
        raise ArtifactError(f"{path} cannot be read: {reason}") from error


class _Damaged(Exception):
    """What is wrong with the file, without its path."""


def _read(onnx: Any, path: Path) -> File:
    data = _mapped(path)
    skeleton, places = _without_weights(data)
    try:
        model = onnx.ModelProto.FromString(skeleton)
    except Exception as error:  # protobuf's DecodeError, which has no base class of its own.
        raise _Damaged(f"is not an ONNX model: {error}") from error
    opset = _opset(model)
    if len(model.graph.sparse_initializer):
        raise _Damaged("has sparse initializers, which are not supported: make them dense")
    constants = {}
    for index, tensor in enumerate(model.graph.initializer):
        if tensor.name in constants:
            raise _Damaged(f"has two initializers named '{tensor.name}'")
        constants[tensor.name] = _tensor(onnx, tensor, data, places.get(index), path.parent)
    _check(onnx, model, constants)
    if len(model.functions):
        model = onnx.inliner.inline_local_functions(model)
    graph = model.graph
    if len(graph.node) > MOST_NODES:
        raise _Damaged(f"has {len(graph.node)} nodes; expected at most {MOST_NODES}")
    nodes = tuple(_node(onnx, node, index, path) for index, node in enumerate(graph.node))
    inputs = tuple(_input(value) for value in graph.input if value.name not in constants)
    outputs = tuple(value.name for value in graph.output)
    return File(path.stem, opset, nodes, constants, inputs, outputs)


def _mapped(path: Path) -> memoryview:
    """The bytes of a regular file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # A FIFO would wait for a writer.
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise _Damaged("is not a regular file")
        if status.st_size == 0:
            raise _Damaged("is empty")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


# The protobuf encoding: fields of (number << 3 | wire type), of which type 2 is a length and so
# many bytes (protobuf.dev, "Encoding").


class _Field(NamedTuple):
    number: int
    start: int
    """Of the whole field."""
    payload: int
    """Where its bytes begin, behind the length; -1 where it is no length-delimited field."""
    end: int


def _fields(data: memoryview, start: int, end: int) -> Iterator[_Field]:
    at = start
    while at < end:
        tag, payload = _varint(data, at, end)
        kind, begins = tag & 7, -1
        if kind == 0:
            _, stop = _varint(data, payload, end)
        elif kind == 1:
            stop = payload + 8
        elif kind == 2:
            length, begins = _varint(data, payload, end)
            stop = begins + length
        elif kind == 5:
            stop = payload + 4
        else:
            raise _Damaged(f"is not an ONNX model: wire type {kind} at byte {at}")
        if stop > end:
            raise _Damaged(f"is truncated: the field at byte {at} ends at {stop} of {end}")
        yield _Field(tag >> 3, at, begins, stop)
        at = stop


def _varint(data: memoryview, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _Damaged(f"is truncated or damaged at byte {at}")


def _encoded(number: int, payload: bytes) -> bytes:
    """A length-delimited field."""
    return _as_varint(number << 3 | 2) + _as_varint(len(payload)) + payload


def _as_varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _without_weights(data: memoryview) -> tuple[bytes, dict[int, tuple[int, int]]]:
    """The model without the raw bytes of large initializers, and where those begin and end, by the
    initializer's place in the list."""
    places: dict[int, tuple[int, int]] = {}
    model = bytearray()
    count = 0
    for field in _fields(data, 0, len(data)):
        if field.number != GRAPH or field.payload < 0:
            model += data[field.start : field.end]
            continue
        graph = bytearray()
        for inner in _fields(data, field.payload, field.end):
            if inner.number != INITIALIZER or inner.payload < 0:
                graph += data[inner.start : inner.end]
                continue
            tensor = bytearray()
            for part in _fields(data, inner.payload, inner.end):
                if part.number == RAW_DATA and part.end - part.payload >= LARGE:
                    places[count] = part.payload, part.end
                else:
                    tensor += data[part.start : part.end]
            graph += _encoded(INITIALIZER, bytes(tensor))
            count += 1
        model += _encoded(GRAPH, bytes(graph))
    return bytes(model), places


# Tensors.


def _tensor(
    onnx: Any, tensor: Any, data: memoryview, place: tuple[int, int] | None, folder: Path
) -> torch.Tensor:
    """The tensor of a TensorProto. place: of its raw bytes in `data`, where they were taken out."""
    shape, dtype = tuple(tensor.dims), DTYPES.get(tensor.data_type)
    what = f"initializer '{tensor.name}'"
    if dtype is None:
        names = onnx.TensorProto.DataType
        kind = names.Name(tensor.data_type) if tensor.data_type in names.values() else "unknown"
        raise _Damaged(f"{what} has data type {kind}, which is not supported")
    if any(size < 0 for size in shape):
        raise _Damaged(f"{what} has the shape {shape}; expected sizes of at least 0")
    needed = math.prod(shape) * dtype.itemsize
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return _external(tensor, what, folder, shape, dtype, needed)
    if place is not None:
        found = data[place[0] : place[1]]
    elif tensor.HasField("raw_data"):
        found = memoryview(tensor.raw_data)
    else:
        return _typed(onnx, tensor, what, shape, dtype)
    if len(found) != needed:
        raise _Damaged(f"{what} has {len(found)} bytes; its shape {shape} takes {needed}")
    return _copied(found, shape, dtype)


def _copied(data: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """The little-endian numbers in `data`."""
    if not len(data):
        return torch.empty(shape, dtype=dtype)
    made = torch.empty(shape, dtype=dtype)
    target, source = made.reshape(-1).view(torch.uint8).numpy(), np.frombuffer(data, np.uint8)
    for start in range(0, len(data), PIECE):
        target[start : start + PIECE] = source[start : start + PIECE]
        if isinstance(data.obj, mmap.mmap):
            data.obj.madvise(mmap.MADV_DONTNEED)
    return made


def _typed(
    onnx: Any, tensor: Any, what: str, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """A tensor whose numbers stand in a field of their type."""
    field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
    count = len(getattr(tensor, field))
    if count != math.prod(shape):
        raise _Damaged(f"{what} has {count} numbers; its shape {shape} takes {math.prod(shape)}")
    array = onnx.numpy_helper.to_array(tensor)
    if dtype is torch.bfloat16:  # numpy has no such type.
        array = array.astype(np.float32)
    return torch.from_numpy(np.array(array)).to(dtype)


def _external(
    tensor: Any, what: str, folder: Path, shape: tuple[int, ...], dtype: torch.dtype, needed: int
) -> torch.Tensor:
    """A tensor out of another file of the same folder."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    parts = Path(location).parts
    if not location or "\0" in location or Path(location).is_absolute() or ".." in parts:
        raise _Damaged(f"{what} lies in {location!r}; expected a path inside the model's folder")
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", needed))
    except ValueError as error:
        raise _Damaged(f"{what}: offset and length of its data are not numbers") from error
    if length != needed:
        raise _Damaged(f"{what} has {length} bytes in {location!r}; its shape takes {needed}")
    path, root = folder / location, folder.resolve()
    if path.resolve() != root / location:
        raise _Damaged(f"{what} lies behind a link, {location!r}; expected a regular file")
    try:
        data = _mapped(path)
    except _Damaged as error:
        raise _Damaged(f"{what}: {location!r} {error}") from error
    except FileNotFoundError as error:
        raise _Damaged(f"{what}: there is no file {location!r} beside the model") from error
    if not 0 <= offset <= len(data) - needed:
        raise _Damaged(
            f"{what} has bytes {offset} to {offset + needed} of {location!r}, which has {len(data)}"
        )
    return _copied(data[offset : offset + needed], shape, dtype)


# The graph.


def _opset(model: Any) -> int:
    """The version of the standard operators."""
    versions = [each.version for each in model.opset_import if each.domain in ("", "ai.onnx")]
    if len(versions) != 1:
        raise _Damaged("is not an ONNX model, or does not say which operators it uses")
    if not OLDEST_OPSET <= versions[0] <= NEWEST_OPSET:
        raise _Damaged(
            f"uses operators of opset {versions[0]}; expected {OLDEST_OPSET} to {NEWEST_OPSET}: "
            "export it again, or convert it with onnx.version_converter"
        )
    return int(versions[0])


def _check(onnx: Any, model: Any, constants: Mapping[str, torch.Tensor]) -> None:
    """Holds the structure against the standard: order of nodes, names, attributes. Initializers
    stand among the inputs for it, so that their numbers need not be there."""
    numbers = {dtype: number for number, dtype in DTYPES.items()}
    declared = {value.name for value in model.graph.input}
    for name, tensor in constants.items():
        if name not in declared:
            entry = onnx.helper.make_tensor_value_info(name, numbers[tensor.dtype], tensor.shape)
            model.graph.input.append(entry)
    del model.graph.initializer[:]
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        ops = {node.op_type for node in model.graph.node if node.domain in ("", "ai.onnx")}
        unknown = ", ".join(sorted(op for op in ops if not onnx.defs.has(op)))
        first = f"it has no {unknown}" if unknown else str(error).strip().partition("\n")[0]
        raise _Damaged(f"is not valid ONNX: {first}") from error


def _node(onnx: Any, node: Any, index: int, path: Path) -> Node:
    domain = "" if node.domain in ("", "ai.onnx") else f"{node.domain}::"
    op = domain + node.op_type
    name = node.name or next(filter(None, node.output), f"{op}_{index}")
    attributes = {each.name: _attribute(onnx, each, name, path) for each in node.attribute}
    return Node(op, name, tuple(node.input), tuple(node.output), attributes)


def _attribute(onnx: Any, attribute: Any, node: str, path: Path) -> Any:
    kinds = onnx.AttributeProto
    if attribute.type == kinds.TENSOR:
        return _tensor(onnx, attribute.t, memoryview(b""), None, path.parent)
    if attribute.type == kinds.GRAPH:
        graph, none = attribute.g, memoryview(b"")
        nodes = tuple(_node(onnx, each, index, path) for index, each in enumerate(graph.node))
        constants = {t.name: _tensor(onnx, t, none, None, path.parent) for t in graph.initializer}
        return Branch(nodes, constants, tuple(value.name for value in graph.output))
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return list(value) if attribute.type in (kinds.INTS, kinds.FLOATS) else value


def _input(value: Any) -> Input:
    kind = value.type.tensor_type
    dtype = DTYPES.get(kind.elem_type)
    if dtype not in FLOATS:
        raise _Damaged(f"input '{value.name}' is not a tensor of float32, float16 or bfloat16")
    shape = tuple(
        size.dim_value if size.HasField("dim_value") else size.dim_param or f"{value.name}_{at}"
        for at, size in enumerate(kind.shape.dim)
    )
    return Input(value.name, dtype, shape)
