"""Frozen dataclasses as plain data and back: every field by its annotation, nothing guessed.

Understood are dataclasses, tuples, unions, strings, numbers, booleans, None, `torch.dtype` and
enumerations. Numbers that JSON lacks are written as {"float": "inf"}.
"""

from __future__ import annotations

import enum
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from functools import lru_cache
from typing import Any, NoReturn

import torch

from ...errors import ArtifactError

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool)
}
MOST_VALUES = 1 << 21
"""Of one JSON text: a list of them takes 130 MB, the largest network of the zoo 1/20 of them."""
LONGEST_LIST = 1 << 16
LARGEST = 2**62
"""No size, offset or count of a tensor that exists is as large."""


def plain(value: Any, tagged: tuple[type, ...] = ()) -> Any:
    """The value as JSON can hold it; of dataclasses of the `tagged` types with their own names."""
    if is_dataclass(value):
        data = {item.name: plain(getattr(value, item.name), tagged) for item in fields(value)}
        return {"is": type(value).__name__, "has": data} if isinstance(value, tagged) else data
    if isinstance(value, Mapping):
        return {key: plain(item, tagged) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, tagged) for item in value]
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    return value


def dump(value: Any) -> bytes:
    """The one JSON text of a plain value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return f"{text}\n".encode("ascii")


def parse(data: bytes, source: str) -> Any:
    """The plain value of a text that `dump` wrote; `source` names it in errors.

    Raises: ArtifactError for any other text, of the same value too, and for one of more values
    than any network needs, before they are built.
    """
    values = sum(map(data.count, (b"[", b"{", b",")))
    if values > MOST_VALUES:
        raise ArtifactError(
            f"{source} is damaged: expected at most {MOST_VALUES:,} values, got about {values:,}"
        )
    try:
        value = json.loads(data.decode("ascii"))
        same = dump(value) == data
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{source} is damaged: expected JSON: {error}") from error
    if not same:
        raise ArtifactError(f"{source} is damaged: expected JSON in its canonical form")
    return value


Laws = Mapping[type, Mapping[str, tuple[Callable[[Any], bool], str]]]
"""By dataclass and field: what must hold beside the type, and in words."""


def one_of(*values: str) -> tuple[Callable[[Any], bool], str]:
    """The law of a field that has one of these values."""
    return values.__contains__, f"one of {', '.join(values)}"


@lru_cache(maxsize=256)
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


@dataclass(frozen=True)
class Reader:
    """Reads plain data as annotated types.

    source: what is read, for errors. loose: fields that a dataclass does not have are skipped.
    laws: what must hold of fields.
    """

    source: str
    loose: bool = False
    laws: Laws = field(default_factory=dict)

    def read(self, kind: Any, data: Any, where: str) -> Any:
        """`data` as a value of the type `kind`.

        Raises: ArtifactError naming the field.
        """
        if isinstance(kind, type) and is_dataclass(kind):
            return self.read_dataclass(kind, data, where)
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
            return self._read_union(typing.get_args(kind), data, where)
        if typing.get_origin(kind) is tuple:
            return self._read_tuple(typing.get_args(kind), data, where)
        if kind is float:
            return self._read_float(data, where)
        if kind is torch.dtype:
            if not isinstance(data, str) or data not in DTYPES:
                self.refuse(where, f"one of {', '.join(DTYPES)}", data)
            return DTYPES[data]
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            if data not in [member.value for member in kind]:
                self.refuse(where, f"one of {', '.join(str(m.value) for m in kind)}", data)
            return kind(data)
        if kind is types.NoneType:
            kind = type(None)
        if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
            self.refuse(where, f"a value of type {kind.__name__}", data)
        if kind is int and not -LARGEST < data < LARGEST:
            self.refuse(where, f"a number below {LARGEST}", data)
        return data

    def read_dataclass(self, kind: type, data: Any, where: str) -> Any:
        """`data`, an object, as the dataclass `kind`."""
        found = data if isinstance(data, dict) else {}
        names = [item.name for item in fields(kind)]
        missing = [name for name in names if name not in found]
        if missing:
            self.refuse(where, f"the field {missing[0]!r}", data)
        unknown = [name for name in found if name not in names]
        if unknown and not self.loose:
            self.refuse(where, f"no field {unknown[0]!r}", data)
        hints = _hints(kind)
        read = {name: self.read(hints[name], found[name], f"{where}.{name}") for name in names}
        for name, (holds, expected) in self.laws.get(kind, {}).items():
            if not holds(read[name]):
                self.refuse(f"{where}.{name}", expected, read[name])
        return kind(**read)

    def refuse(self, where: str, expected: str, got: Any) -> NoReturn:
        """Raises the error for a value that is not what it should be."""
        shown = repr(got)
        shown = shown if len(shown) <= 40 else f"{shown[:40]}..."
        raise ArtifactError(
            f"'{self.source}' is damaged: at {where} expected {expected}, got {shown}"
        )

    def _read_float(self, data: Any, where: str) -> float:
        if isinstance(data, dict) and list(data) == ["float"]:
            data = data["float"]
            if data not in ("inf", "-inf", "nan"):
                self.refuse(where, "inf, -inf or nan", data)
            return float(data)
        if isinstance(data, bool) or not isinstance(data, int | float):
            self.refuse(where, "a value of type float", data)
        if isinstance(data, int) and not -LARGEST < data < LARGEST:
            self.refuse(where, f"a number below {LARGEST}", data)
        return float(data)

    def _read_union(self, parts: tuple[Any, ...], data: Any, where: str) -> Any:
        if data is None and type(None) in parts:
            return None
        kinds = [part for part in parts if part is not type(None)]
        for kind in kinds[:-1]:
            try:
                return self.read(kind, data, where)
            except ArtifactError:
                continue
        return self.read(kinds[-1], data, where)

    def _read_tuple(self, parts: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
        if not isinstance(data, list | tuple):
            self.refuse(where, "a list", data)
        if len(data) > LONGEST_LIST:
            self.refuse(where, f"at most {LONGEST_LIST:,} values", f"{len(data):,} values")
        if parts[-1] is Ellipsis:
            parts = (parts[0],) * len(data)
        if len(parts) != len(data):
            self.refuse(where, f"{len(parts)} values", data)
        pairs = zip(parts, data, strict=True)
        return tuple(
            self.read(part, item, f"{where}[{at}]") for at, (part, item) in enumerate(pairs)
        )
