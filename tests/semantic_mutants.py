"""Six saved networks, and a seeded mutator that changes what one of them says and makes every hash
right again: numbers, names, orders, enumerations, references between members, contents."""

from __future__ import annotations

import copy
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import convloom
import torch
from convloom.compiler.artifact import tensors
from convloom.compiler.artifact.archive import digest
from convloom.compiler.graph.typed import DTYPES, dump
from torch import nn
from torch.nn import functional

from .artifact_files import members_of, write
from .nets import Made, make

Members = dict[str, bytes]
IMAGE = (2, 4, 6, 5)


def chain() -> Made:
    return make(
        lambda m, x: m.linear(torch.relu(m.two(torch.relu(m.one(x)))).flatten(1)), IMAGE,
        one=nn.Conv2d(4, 8, 1), two=nn.Conv2d(8, 8, 3, padding=1), linear=nn.Linear(240, 4),
    )  # fmt: skip


def residual() -> Made:
    return make(
        lambda m, x: torch.relu(m.norm(m.conv(m.first(x))) + m.first(x)).mean((2, 3)), IMAGE,
        first=nn.Conv2d(4, 8, 1), conv=nn.Conv2d(8, 8, 3, padding=1), norm=nn.BatchNorm2d(8),
    )  # fmt: skip


def branches() -> Made:
    def function(m: Any, x: torch.Tensor) -> Any:
        pooled = functional.max_pool2d(x, 3, 1, 1)
        joined = torch.cat([torch.relu(m.left(x)), m.right(pooled), m.wide(x)], 1)
        return torch.sigmoid(m.after(joined))

    return make(
        function, IMAGE, left=nn.Conv2d(4, 8, 1), right=nn.Conv2d(4, 8, 1),
        wide=nn.Conv2d(4, 16, 3, padding=1), after=nn.Conv2d(32, 6, 1),
    )  # fmt: skip


def separable() -> Made:
    def function(m: Any, x: torch.Tensor) -> Any:
        y = functional.hardswish(m.point(torch.relu(m.depth(x))))
        return y * torch.sigmoid(m.squeeze(y.mean((2, 3), keepdim=True)))

    return make(
        function, IMAGE, depth=nn.Conv2d(4, 4, 3, padding=1, groups=4), point=nn.Conv2d(4, 8, 1),
        squeeze=nn.Conv2d(8, 8, 1),
    )  # fmt: skip


def tokens() -> Made:
    def function(m: Any, x: torch.Tensor) -> Any:
        y = m.embed(x).flatten(2).transpose(1, 2)
        seen = torch.softmax(y @ y.transpose(1, 2), -1) @ m.norm(y)
        return seen.reshape(-1, 6, 5, 8).permute(0, 3, 1, 2)[:, 2:6]

    return make(function, IMAGE, embed=nn.Conv2d(4, 8, 1), norm=nn.LayerNorm(8))


def several() -> Made:
    def function(m: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
        up = functional.interpolate(m.conv(x), size=(12, 10))
        return {"up": up, "rest": [functional.avg_pool2d(x - y, 2), 3, functional.pad(y, (1, 1))]}

    return make(function, IMAGE, IMAGE, conv=nn.Conv2d(4, 4, 3, padding=1))


NETWORKS: dict[Callable[[], Made], tuple[tuple[str, ...], dict[str, Any]]] = {
    chain: (("cuda:sm_80",), {"dynamic_batch": (1, 4)}),
    residual: (("interpreter", "cuda:sm_80"), {"dtype": torch.float16}),
    branches: (("cuda:sm_90",), {}),
    separable: (("interpreter", "reference"), {"dynamic_batch": (1, 3)}),
    tokens: (("interpreter",), {}),
    several: (("cuda:sm_80",), {}),
}
"""With the targets that they are saved for, and how they are compiled."""


def saved(network: Callable[[], Made], folder: Path) -> Path:
    """The network as a file."""
    module, inputs = network()
    names, options = NETWORKS[network]
    every = [
        convloom.compile(module, inputs, target=name, tuning="heuristic", **options)
        for name in names
    ]
    path = folder / f"{network.__name__}.loom"
    every[0].save(path, *every[1:])
    return path


@dataclass(frozen=True)
class Mutant:
    """Members, and in words what was changed."""

    members: Members
    what: str

    def changes(self, original: Members) -> set[str]:
        """The members that are not the original's, by name; machine code as "kernels"."""
        names = {*self.members, *original} - {"manifest.json"}
        differ = {name for name in names if self.members.get(name) != original.get(name)}
        return {"kernels" if name.startswith("kernels/") else name for name in differ}


class Mutator:
    """Mutants of one file."""

    def __init__(self, path: Path, seed: int) -> None:
        self.original = members_of(path)
        self.draw = random.Random(seed)
        self.parsed = {
            name: json.loads(self.original[name])
            for name in ("plan.json", "graph.json", "ledger.json")
        }
        self.places = {name: list(_leaves(data)) for name, data in self.parsed.items()}
        self.lists = {name: list(_lists(data)) for name, data in self.parsed.items()}
        self.alike: dict[str, list[Any]] = defaultdict(list)
        for name, places in self.places.items():
            for place in places:
                value = _at(self.parsed[name], place)
                if value not in self.alike[_kind(place)]:
                    self.alike[_kind(place)].append(value)

    def __iter__(self) -> Iterator[Mutant]:
        kinds = (
            self._number, self._alike, self._alike, self._order, self._text, self._flag,
            self._left_out, self._weights, self._kernel, self._exchange, self._spec, self._source,
        )  # fmt: skip
        while True:
            mutant = self.draw.choice(kinds)()
            if mutant is not None and mutant.changes(self.original):
                yield mutant

    def _member(self) -> str:
        return self.draw.choice(("plan.json", "plan.json", "graph.json", "graph.json",
                                 "ledger.json"))  # fmt: skip

    def _leaf(self, kind: type) -> tuple[str, Any, Any]:
        """A member, a place in it that holds such a value, and the value. What nests deeply is
        drawn as often as what does not: by the name of the field first."""
        name = self._member()
        places = [p for p in self.places[name] if type(_at(self.parsed[name], p)) is kind]
        if not places:
            return self._leaf(kind)
        field = self.draw.choice(sorted({_kind(place) for place in places}))
        place = self.draw.choice([place for place in places if _kind(place) == field])
        return name, place, _at(self.parsed[name], place)

    def _changed(self, name: str, place: tuple[Any, ...], value: Any) -> Mutant:
        data = copy.deepcopy(self.parsed[name])
        _at(data, place[:-1])[place[-1]] = value
        return self._with(name, data, f"{name} {'.'.join(map(str, place))} = {value!r:.60}")

    def _with(self, name: str, data: Any, what: str) -> Mutant:
        """With a member of JSON replaced, and the hashes of graphs made right."""
        changed = {**self.original, name: dump(data)}
        if name == "graph.json":
            plan = json.loads(changed["plan.json"])
            plan["graphs"] = [digest([dump(graph)]) for graph in data["graphs"]]
            changed["plan.json"] = dump(plan)
        return Mutant(changed, what)

    # One kind of change each.

    def _number(self) -> Mutant:
        kind = self.draw.choice((int, int, int, float))
        name, place, value = self._leaf(kind)
        others = (value + 1, value - 1, value * 2, value // 2, -value, 0, 2**31, 2**40)
        if kind is float:
            others = (value * 2, -value, 0.0, value + 1e-3, 1e30, {"float": "nan"})
        return self._changed(name, place, self.draw.choice(others))

    def _alike(self) -> Mutant:
        """Another value that fields of this name have: an enumeration, a reference, a size."""
        name, place, _ = self._leaf(self.draw.choice((str, str, int)))
        return self._changed(name, place, self.draw.choice(self.alike[_kind(place)]))

    def _text(self) -> Mutant:
        name, place, value = self._leaf(str)
        other = self.draw.choice(("", value + "x", value[:-1], "\x1b[2J", "a" * 5000, "../../x"))
        return self._changed(name, place, other)

    def _flag(self) -> Mutant:
        name, place, value = self._leaf(bool)
        return self._changed(name, place, not value)

    def _order(self) -> Mutant:
        name = self._member()
        places = self.lists[name]
        field = self.draw.choice(sorted({_kind(place) for place in places}))
        place = self.draw.choice([place for place in places if _kind(place) == field])
        data = copy.deepcopy(self.parsed[name])
        items = _at(data, place)
        if self.draw.random() < 0.5:
            items.reverse()
        else:
            at = self.draw.randrange(len(items))
            items.insert(self.draw.randrange(len(items)), items.pop(at))
        return self._with(name, data, f"{name} {'.'.join(map(str, place))} in another order")

    def _left_out(self) -> Mutant:
        name = self._member()
        place = self.draw.choice(self.lists[name])
        data = copy.deepcopy(self.parsed[name])
        items = _at(data, place)
        at = self.draw.randrange(len(items))
        if self.draw.random() < 0.5:
            items.insert(at, copy.deepcopy(items[at]))
        else:
            items.pop(at)
        return self._with(name, data, f"{name} {'.'.join(map(str, place))} longer or shorter")

    def _exchange(self) -> Mutant:
        """Two values of fields of one name, exchanged."""
        name, place, value = self._leaf(self.draw.choice((str, int)))
        others = [p for p in self.places[name] if _kind(p) == _kind(place)]
        other = self.draw.choice(others)
        data = copy.deepcopy(self.parsed[name])
        _at(data, place[:-1])[place[-1]] = _at(self.parsed[name], other)
        _at(data, other[:-1])[other[-1]] = value
        return self._with(name, data, f"{name} {place} and {other} exchanged")

    def _node(self, data: Any) -> Any:
        """Any node of a graph that reads something."""
        graph = self.draw.choice(data["graphs"])
        return graph, self.draw.choice([node for node in graph["nodes"] if node["inputs"]])

    def _spec(self) -> Mutant:
        """The dtype or the layout of a node or constant."""
        data = copy.deepcopy(self.parsed["graph.json"])
        graph = self.draw.choice(data["graphs"])
        node = self.draw.choice([node for node in graph["nodes"] if node["outputs"]])
        spec = self.draw.choice(node["outputs"])
        field = self.draw.choice(("dtype", "layout"))
        layouts = ("dense", "nhwc")
        spec[field] = self.draw.choice(tuple(DTYPES) if field == "dtype" else layouts)
        return self._with("graph.json", data, f"{node['name']}: {field} {spec[field]}")

    def _source(self) -> Mutant:
        """Another value that a node reads, of the same shape where there is one."""
        data = copy.deepcopy(self.parsed["graph.json"])
        graph, node = self._node(data)
        shapes = {each["name"]: each["outputs"][0]["shape"] for each in graph["nodes"]
                  if each["outputs"]}  # fmt: skip
        slot = self.draw.choice(node["inputs"])
        same = [name for name, shape in shapes.items() if shape == shapes[slot[0]]]
        slot[0] = self.draw.choice(same if self.draw.random() < 0.8 else sorted(shapes))
        return self._with("graph.json", data, f"{node['name']} reads {slot[0]}")

    def _weights(self) -> Mutant | None:
        """Numbers of a tensor, under its old name or, wherever it is named, under its new one."""
        whole = bytearray(self.original[tensors.MEMBER])
        length = int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8 : 8 + length])
        name = self.draw.choice(sorted(header))
        start, end = (8 + length + at for at in header[name]["data_offsets"])
        if header[name]["dtype"] not in ("F16", "F32") or end == start:
            return None
        dtype = torch.float16 if header[name]["dtype"] == "F16" else torch.float32
        flat = torch.frombuffer(whole[start:end], dtype=dtype).clone()
        flat[self.draw.randrange(flat.numel())] *= -2
        content = flat.view(torch.uint8).numpy().tobytes()
        if self.draw.random() < 0.5:
            whole[start:end] = content
            return Mutant({**self.original, tensors.MEMBER: bytes(whole)}, f"numbers of {name}")
        pool = tensors.Pool()
        for each, entry in header.items():
            kind = {code: dtype for dtype, code in tensors.CODES.items()}[entry["dtype"]]
            begin, stop = (8 + length + at for at in entry["data_offsets"])
            data = content if each == name else bytes(whole[begin:stop])
            pool.add(torch.frombuffer(bytearray(data), dtype=kind) if data else
                     torch.empty(0, dtype=kind))  # fmt: skip
        (new,) = set(pool.tensors) - set(header)
        renamed = {
            each: self.original[each].replace(name.encode(), new.encode())
            for each in ("plan.json", "graph.json")
        }
        changed = {**self.original, **renamed, tensors.MEMBER: b"".join(pool.content())}
        mutant = self._with("graph.json", json.loads(renamed["graph.json"]), "")
        plan = json.loads(renamed["plan.json"])
        plan["graphs"] = json.loads(mutant.members["plan.json"])["graphs"]
        return Mutant({**changed, "plan.json": dump(plan)}, f"numbers of {name}, now {new}")

    def _kernel(self) -> Mutant | None:
        """Machine code or PTX, under its old name or, in the plan too, under its new one."""
        names = sorted(name for name in self.original if name.startswith("kernels/"))
        if not names:
            return None
        name = self.draw.choice(names)
        code = bytearray(self.original[name])
        code[self.draw.randrange(64, len(code))] ^= 1
        if self.draw.random() < 0.3:
            return Mutant({**self.original, name: bytes(code)}, f"code of {name}")
        folder, _, file = name.rpartition("/")
        new = f"{folder}/{digest([bytes(code)])[:32]}.{file.rpartition('.')[2]}"
        plan = self.original["plan.json"].replace(name.encode(), new.encode())
        rest = {each: data for each, data in self.original.items() if each != name}
        return Mutant({**rest, new: bytes(code), "plan.json": plan}, f"code of {name}, now {new}")


def _leaves(data: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from _leaves(value, (*place, key))
    elif data is not None:
        yield place


def _lists(data: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(data, list) and len(data) > 1:
        yield place
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from _lists(value, (*place, key))


def _at(data: Any, place: tuple[Any, ...]) -> Any:
    for step in place:
        data = data[step]
    return data


def _kind(place: tuple[Any, ...]) -> str:
    """The names of the last two fields on the way to a place: what its value is."""
    return ".".join([step for step in place if isinstance(step, str)][-2:])


def write_mutant(path: Path, mutant: Mutant) -> None:
    """The mutant with a manifest that is right."""
    write(path, mutant.members)
