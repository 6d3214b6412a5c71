"""An ONNX file as an nn.Module, whose submodules and weights bear the names of the file."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...errors import InvalidInputError, UnsupportedOpError
from . import file, images, pointwise, shapes  # noqa: F401 (their operators enter the table)
from .operator import OPERATORS, Call, Value
from .shapes import IF


def load(path: str | Path) -> OnnxModule:
    """The network in an ONNX file (opset 9 to 27), in eval mode.

    Its weights are copies. `forward` takes the inputs of the file in their order and returns its
    outputs: a tensor, or a tuple.

    Raises: ArtifactError where the file is damaged or the onnx package is missing,
    UnsupportedOpError naming every operator that is not supported, CaptureError for a use of one
    that is not.
    """
    source = file.read(Path(path))
    # A class of its own: results and errors name a network by its class.
    named: type[OnnxModule] = type(source.name, (OnnxModule,), {})
    return named(source).eval()


class OnnxModule(nn.Module):
    """The nodes of an ONNX file, run in the order of the file.

    What depends on constants alone is computed once. A node is the submodule of its own name, a
    constant the buffer of its own name: the ledger speaks the language of the file.
    """

    def __init__(self, source: file.File) -> None:
        super().__init__()
        _refuse_unknown(source.name, source.nodes)
        self.title, self.inputs, self.outputs = source.name, source.inputs, source.outputs
        self.constants: dict[str, str] = {}
        known = _numbers(source.constants)
        sizes: set[str] = set()
        """Values that are numbers, and known once the shapes are."""
        self.steps: list[_Step] = []
        waiting = deque(source.nodes)
        while waiting:
            node = waiting.popleft()
            call = Call(node.op, node.name, source.opset, node.attributes)
            if node.op == IF:
                (name,) = node.inputs
                condition = known.get(name)
                if condition is None and name in sizes:
                    condition = self._for_the_shapes_of_the_file(name, call, known)
                    check = replace(call, attributes={"taken": bool(condition.all())})
                    self.steps.append(_Step(check, node.inputs, (), sizes, known))
                branch = _taken(call, node, condition)
                _refuse_unknown(source.name, branch.nodes)
                waiting.extendleft(reversed(branch.nodes))
                known |= _numbers(branch.constants)
                continue
            given = [name for name in node.inputs if name]
            if all(name in known for name in given):
                results = _listed(_compute(call, node.inputs, known))
                known |= _numbers(dict(zip(node.outputs, results, strict=False)))
                continue
            if node.op in ("Shape", "Size") or all(
                name in sizes or (name in known and _is_small(known[name])) for name in given
            ):
                sizes |= set(node.outputs)
            self.steps.append(_Step(call, node.inputs, node.outputs, sizes, known))
        self._read = {*self.outputs, *(name for step in self.steps for name in step.read)}
        for name in sorted(self._read & known.keys()):
            if isinstance(tensor := known[name], torch.Tensor):
                self.constants[name] = self._place_buffer(name, tensor)
        for step in self.steps:
            self._place_module(step)
        self._last = _last_uses(self.steps, self.outputs)

    def example(self, batch: int = 1) -> tuple[torch.Tensor, ...]:
        """Inputs of the shapes and dtypes that the file says; `batch` where it leaves the first
        size open.

        Raises: InvalidInputError where another size is open.
        """
        made = []
        for name, dtype, shape in self.inputs:
            open_sizes = [size for size in shape[1:] if isinstance(size, str)]
            if open_sizes:
                raise InvalidInputError(
                    f"input '{name}' of {self.title} has the shape {shape}: the file leaves "
                    f"{', '.join(open_sizes)} open; pass example inputs"
                )
            sizes = [batch if isinstance(size, str) else size for size in shape]
            made.append(torch.zeros(sizes, dtype=dtype))
        return tuple(made)

    def forward(self, *inputs: torch.Tensor) -> Any:
        """inputs: as many as `self.inputs`, of their shapes."""
        if len(inputs) != len(self.inputs):
            raise InvalidInputError(
                f"{self.title} takes {len(self.inputs)} inputs; got {len(inputs)}"
            )
        values: dict[str, Value] = dict(
            zip((each.name for each in self.inputs), inputs, strict=True)
        )
        for name, path in self.constants.items():
            values[name] = self.get_buffer(path)
        for at, step in enumerate(self.steps):
            given = [values[name] if name in step.read else None for name in step.inputs]
            results = _listed(self.get_submodule(step.path)(*given))
            if (lacking := self._read.intersection(step.outputs[len(results) :])) != set():
                raise step.call.fail(f"its output '{min(lacking)}' is not supported")
            values.update(zip(step.outputs, results, strict=False))
            for name in self._last.get(at, ()):
                values.pop(name, None)
        results = [values[name] for name in self.outputs]
        return results[0] if len(results) == 1 else tuple(results)

    def _for_the_shapes_of_the_file(self, name: str, call: Call, known: Mapping[str, Any]) -> Any:
        """A value that the steps so far compute from sizes.

        Raises: CaptureError where the file does not say the sizes.
        """
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            try:
                inputs = self.example()
            except InvalidInputError as error:
                reason = f"its condition '{name}' is computed from sizes: {error}"
                raise call.fail(reason) from error
            given = zip((each.name for each in self.inputs), inputs, strict=True)
            values: dict[str, Any] = {**known, **dict(given)}
            for step in self.steps:
                results = step(*(values.get(each) for each in step.inputs))
                values.update(zip(step.outputs, _listed(results), strict=False))
        return values[name]

    def _place_buffer(self, name: str, tensor: torch.Tensor) -> str:
        parent, leaf, path = self._parent(name)
        parent.register_buffer(leaf, tensor)
        return path

    def _place_module(self, step: _Step) -> None:
        parent, leaf, step.path = self._parent(step.call.name)
        parent.add_module(leaf, step)

    def _parent(self, name: str) -> tuple[nn.Module, str, str]:
        """The module that holds this name, what it is called there, and its whole path. Dots
        divide it, as in torch; a name that is taken gets an underscore."""
        *parents, leaf = (part or "_" for part in name.split("."))
        module: nn.Module = self
        path = []
        for part in parents:
            while hasattr(module, part) and part not in module._modules:
                part += "_"
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
            path.append(part)
        while hasattr(module, leaf):
            leaf += "_"
        return module, leaf, ".".join([*path, leaf])


class _Step(nn.Module):
    """One node."""

    def __init__(
        self, call: Call, inputs: Sequence[str], outputs: Sequence[str], sizes: set[str],
        known: Mapping[str, Any],
    ) -> None:  # fmt: skip
        super().__init__()
        entry = OPERATORS[call.op]
        self.call, self.inputs, self.outputs, self.path = call, tuple(inputs), tuple(outputs), ""
        is_of_arrays = all(name in sizes for name in outputs) and call.op not in ("Shape", "Size")
        self.known: dict[int, Any] = {}
        """Inputs that are constants, and given as arrays."""
        for at, name in enumerate(inputs):
            value = known.get(name)
            if isinstance(value, torch.Tensor) and (
                is_of_arrays or at in entry.known or (entry.takes_numbers and value.numel() == 1)
            ):
                value = _as_array(value)
            if value is not None and not isinstance(value, torch.Tensor):
                self.known[at] = value
        self.read = {n for at, n in enumerate(inputs) if n and at not in self.known}
        of_arrays = entry.of_arrays
        if is_of_arrays and of_arrays is None:
            raise call.fail("it computes sizes, and is supported for pixels only")
        self.function = of_arrays if is_of_arrays and of_arrays else entry.function

    def forward(self, *given: Value) -> Any:
        while_known = [self.known.get(at, value) for at, value in enumerate(given)]
        return self.function(self.call, *while_known)

    def extra_repr(self) -> str:
        return f"{self.call.op}, {', '.join(self.inputs)} -> {', '.join(self.outputs)}"


def _taken(call: Call, node: file.Node, condition: Any) -> file.Branch:
    """The branch of an If whose condition is known, as nodes that may stand in its place.

    Raises: CaptureError where it is not.
    """
    if condition is None:
        raise call.fail(
            f"its condition '{node.inputs[0]}' is computed from pixels; expected a constant, or "
            "one of sizes. Export the model for the case that is meant"
        )
    branch: file.Branch = call.attributes["then_branch" if condition.all() else "else_branch"]
    own = {*branch.constants, *(name for each in branch.nodes for name in each.outputs)}
    branch = branch.renamed(lambda name: f"{node.name}/{name}" if name and name in own else name)
    results = zip(branch.outputs, node.outputs, strict=True)
    named = [file.Node("Identity", node.name, (it,), (name,), {}) for it, name in results]
    return branch._replace(nodes=(*branch.nodes, *named))


def _refuse_unknown(title: str, nodes: Sequence[file.Node]) -> None:
    """Every operator without a function, at once; of an If, those of the branch that is taken."""
    where: dict[str, list[str]] = {}
    for node in nodes:
        if node.op not in OPERATORS:
            where.setdefault(node.op, []).append(node.name)
    if not where:
        return
    counts = Counter({op: len(names) for op, names in where.items()})
    lines = [
        f"  {op}, {count} times: {', '.join(where[op][:3])}{', ...' if count > 3 else ''}"
        for op, count in counts.most_common()
    ]
    told = f"{title} has ONNX operators that are not supported; write the network without them and "
    told += "export it again:"
    raise UnsupportedOpError("\n".join((told, *lines)))


def _compute(call: Call, inputs: Sequence[str], known: Mapping[str, Any]) -> Any:
    """The results of a node that reads constants only."""
    entry, given = OPERATORS[call.op], [known.get(name) for name in inputs]
    no_tensors = bool(inputs) and not any(isinstance(each, torch.Tensor) for each in given)
    function = (entry.of_arrays if no_tensors else None) or entry.function
    given = [
        _as_array(value) if at in entry.known and isinstance(value, torch.Tensor) else value
        for at, value in enumerate(given)
    ]
    try:
        with torch.no_grad():
            return function(call, *given)
    except (
        ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError,
    ) as error:  # fmt: skip
        raise call.fail(f"its constants do not fit it: {error}") from error


def _numbers(values: Mapping[str, Any]) -> dict[str, Value]:
    """Known values: whole numbers and truth values as arrays, other numbers as tensors."""
    return {
        name: _as_array(value)
        if isinstance(value, torch.Tensor) and not value.is_floating_point() else value
        for name, value in values.items()
        if value is not None
    }  # fmt: skip


def _is_small(value: Any) -> bool:
    """Whether a constant may be sizes: an array, or a tensor of few numbers."""
    return not isinstance(value, torch.Tensor) or value.numel() < 64


def _as_array(tensor: torch.Tensor) -> Any:
    return np.asarray(np.array(tensor.tolist(), object)).reshape(tuple(tensor.shape))


def _listed(results: Any) -> Sequence[Any]:
    return results if isinstance(results, tuple | list) else (results,)


def _last_uses(steps: Sequence[_Step], outputs: Sequence[str]) -> dict[int, list[str]]:
    """The values that are read for the last time by each step."""
    last = {name: at for at, step in enumerate(steps) for name in step.read}
    freed: dict[int, list[str]] = {}
    for name, at in last.items():
        if name not in outputs:
            freed.setdefault(at, []).append(name)
    return freed
