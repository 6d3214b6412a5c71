"""Named tuples as compile-time arguments of kernels: numbers, words and functions in them reach the
interpreter, the compiler, worker processes and every hash."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from convloom.kernels.contract import epilogue as ep
from convloom.kernels.contract import targets
from convloom.kernels.contract.op import Launch, Ref, X, Y
from convloom.kernels.devices import execute, kernel_hash, offline
from convloom.kernels.devices.emulator import launch as emulator
from convloom.kernels.devices.interpreter import interpreting

ROWS, SIZE = 5, 16
SM90 = targets.parse("cuda:sm_90")


@triton.jit
def twice(x):
    return x * 2


@triton.jit
def negated(x):
    return -x


class Inner(NamedTuple):
    function: Any = negated
    word: str = "plain"


class Outer(NamedTuple):
    size: int
    steps: int
    row_offset: Any
    inner: Inner = Inner()


@triton.jit
def walk(x, rows, OUTER: tl.constexpr):
    return OUTER.inner.function(tl.load(x + OUTER.row_offset(rows)))


@triton.jit
def tuple_kernel(x, y, extras, m, OUTER: tl.constexpr, UNUSED: tl.constexpr):
    SIZE: tl.constexpr = OUTER.size
    STEPS: tl.constexpr = OUTER.steps
    rows = tl.arange(0, SIZE)
    acc = tl.zeros((SIZE,), tl.float32)
    for _ in tl.static_range(STEPS):
        acc += walk(x, rows, OUTER)
    if OUTER.inner.word == "plain":
        acc += 1
    tl.store(y + rows, acc, mask=rows < m)


def launch(**inner: Any) -> Launch:
    """y[i] = 3 f(x[7 i]) + 1 for the first ROWS of SIZE numbers."""
    outer = Outer(SIZE, 3, ep.row_offset_function((SIZE,), (7,)), Inner(**inner))
    return Launch(
        kernel=tuple_kernel,
        pointers={"x": X, "y": Y},
        rows=ROWS,
        block_rows=SIZE,
        columns=1,
        constexprs={"OUTER": outer, "UNUSED": (1, (2, twice))},
    )


def request(**inner: Any) -> offline.CompileRequest:
    return offline.request(launch(**inner), lambda ref: torch.float32, SM90)


def run(device: str, **inner: Any) -> torch.Tensor:
    tensors: dict[Ref, torch.Tensor] = {
        X: torch.arange(7.0 * SIZE), Y: torch.zeros(SIZE),
    }  # fmt: skip
    if device == "emulator":
        emulator.run(launch(**inner), tensors.__getitem__, 1, SM90, {})
    else:
        with interpreting():
            execute.interpret(launch(**inner), tensors.__getitem__, 1)
    return tensors[Y]


@pytest.mark.parametrize("device", ["interpreter", "emulator"])
def test_fields_and_functions_reach_the_kernel(device: str) -> None:
    x = 7 * torch.arange(float(ROWS))
    assert torch.equal(run(device)[:ROWS], -3 * x + 1)
    assert torch.equal(run(device, function=twice, word="other")[:ROWS], 6 * x)
    assert not run(device)[ROWS:].any()


def test_requests_are_sent_to_other_processes() -> None:
    wanted = request()
    assert pickle.loads(pickle.dumps(wanted)) == wanted
    assert hash(wanted) == hash(request())
    assert wanted != request(function=twice)
    leaves = ep.flat(dict(wanted.constexprs)).values()
    generated = [leaf.name for leaf in leaves if isinstance(leaf, ep.GeneratedFunction)]
    assert generated == ["row_offset"]
    outer = dict(wanted.constexprs)["OUTER"]
    assert isinstance(outer, Outer), "kernels read fields by name"
    assert outer.inner.function == ep.FunctionName(__name__, "negated")


def test_what_is_kept_on_disk_depends_on_the_source_of_functions_in_tuples() -> None:
    before = offline._source(request()).hash()
    assert before == offline._source(request()).hash()
    assert before != offline._source(request(function=twice)).hash()
    source = negated.src
    try:
        negated._unsafe_update_src(source.replace("-x", "0 - x"))
        tuple_kernel.hash = None
        assert before != offline._source(request()).hash()
    finally:
        negated._unsafe_update_src(source)


def test_constants_are_shown_by_the_names_of_their_fields() -> None:
    shown = ep.flat(ep.named(launch().constexprs))
    assert shown["OUTER.size"] == SIZE and shown["OUTER.inner.word"] == "plain"
    assert shown["UNUSED.0"] == 1 and shown["UNUSED.1.1"] == ep.FunctionName(__name__, "twice")


def test_the_hash_of_an_op_knows_functions_in_tuples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a launch puts there, and those that fields have by default."""
    from convloom.kernels import registry

    def launches(problem: Any, tile: Any, target: Any) -> tuple[Launch, ...]:
        return (replace(launch(), constexprs={"OUTER": (Inner(), twice)}),)

    monkeypatch.setattr(kernel_hash, "ROOM", __name__)
    op = replace(registry.get("conv2d"), launches=launches)
    names = {name.rpartition(".")[2] for name in kernel_hash.kernels_of(op)}
    assert {"tuple_kernel", "walk", "negated", "twice"} <= names
