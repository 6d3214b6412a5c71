"""Named intermediate activations: `convloom.compile(model, x, outputs=["fc6", "layer3.1.relu"])`.

While torch.export traces the module, forward hooks note what the wanted submodules return and make
the module return that, as a dict by name, instead of its own result. The activations are then
ordinary outputs of the graph: no rewrite may remove or change them, and what only the dropped
result needed is dead. Hooks rather than `nn_module_stack`, because a hook sees the module's result
with its structure, one call at a time. Each tensor is cloned on the spot: an in-place operation
behind the module (`relu(inplace=True)`) does not reach it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ...errors import InvalidInputError, near_names

OWN_OUTPUT = ""
"""The name of what the module itself returns."""


@dataclass(frozen=True)
class Feature:
    """One wanted activation: what `path` returns at its `call`-th call (None: at its last)."""

    name: str
    path: str
    call: int | None = None


@dataclass
class _Calls:
    """What the observed submodules returned, call by call, in the present run of the module."""

    results: dict[str, list[Any]] = field(default_factory=dict)

    def clear(self) -> None:
        self.results = {path: [] for path in self.results}

    def note(self, path: str, _: torch.nn.Module, __: Any, result: Any) -> None:
        """Takes down a call, as a forward hook."""
        self.results[path].append(pytree.tree_map_only(torch.Tensor, torch.clone, result))

    def pick(self, feature: Feature) -> Any:
        """The feature's value; None where there was no such call."""
        made = self.results[feature.path]
        at = len(made) - 1 if feature.call is None else feature.call
        return made[at] if 0 <= at < len(made) else None


def features_of(module: torch.nn.Module, outputs: Sequence[str]) -> tuple[Feature, ...]:
    """The features that `outputs` name: module paths, "" for the module itself; "path:1" is the
    second call of a module that is called several times, "path" the last.

    Raises: InvalidInputError, with the nearest paths, for a name that is none.
    """
    if isinstance(outputs, str) or not all(isinstance(name, str) for name in outputs):
        raise InvalidInputError(f"outputs: expected a list of module paths, got {outputs!r}")
    if not outputs:
        raise InvalidInputError(
            'outputs: expected at least one module path ("" is the module\'s own output), got none'
        )
    paths = {path for path, _ in module.named_modules(remove_duplicate=False)}
    return tuple(_feature(name, paths) for name in dict.fromkeys(outputs))


def _feature(name: str, paths: set[str]) -> Feature:
    path, mark, call = name.rpartition(":")
    if name in paths:
        return Feature(name, name)
    if mark and path in paths and path != OWN_OUTPUT and call.isdecimal():
        return Feature(name, path, int(call))
    raise InvalidInputError(
        f"outputs: the model has no module {name!r}; {near_names(name, paths - {OWN_OUTPUT})}"
    )


@contextmanager
def observed(module: torch.nn.Module, outputs: Sequence[str] | None) -> Iterator[None]:
    """Inside the block the module returns {name: activation} for the names in `outputs` (None: its
    own result, as ever). It is left as it was found.

    Raises: InvalidInputError for unknown names and, at the end of the block, for those of modules
    that were not called as often as asked, or returned no tensor.
    """
    if outputs is None:
        yield
        return
    features = features_of(module, outputs)
    calls = _Calls({feature.path: [] for feature in features if feature.path != OWN_OUTPUT})
    handles = [module.register_forward_pre_hook(lambda *_: calls.clear())]
    for path in calls.results:
        hook = partial(calls.note, path)
        handles.append(module.get_submodule(path).register_forward_hook(hook))

    def answer(_: torch.nn.Module, __: Any, result: Any) -> dict[str, Any]:
        values = {
            feature.name: result if feature.path == OWN_OUTPUT else calls.pick(feature)
            for feature in features
        }
        # Something must be returned even where nothing was found: the check below says what.
        return values if any(map(_tensors, values.values())) else {OWN_OUTPUT: result}

    handles.append(module.register_forward_hook(answer))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for feature in features:
        _check(feature, calls)


def _tensors(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))


def _check(feature: Feature, calls: _Calls) -> None:
    if feature.path == OWN_OUTPUT:
        return
    made = calls.results[feature.path]
    if not made:
        raise InvalidInputError(
            f"outputs: module '{feature.path}' is not called for this input, so it has no output"
        )
    if feature.call is not None and feature.call >= len(made):
        raise InvalidInputError(
            f"outputs: {feature.name!r} asks for call {feature.call} of a module that is called "
            f"{len(made)} time(s); calls count from 0"
        )
    if not _tensors(calls.pick(feature)):
        found = type(calls.pick(feature)).__name__
        raise InvalidInputError(
            f"outputs: module '{feature.path}' returns {found}, which holds no tensor"
        )
