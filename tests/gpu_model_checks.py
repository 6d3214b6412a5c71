"""What is asked of whole executables on a device; each check is a function of the device.

Truth is fp64 on the same device: on a CPU it would take longer than everything else. PyTorch's own
results beside it are computed there too, without TF32.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import convloom
import pytest
import torch
from convloom import settings, zoo
from convloom.benchmarks.measure import products
from convloom.compiler.fusion.pattern import Rule
from convloom.compiler.passes import PASSES
from convloom.compiler.run import parity
from convloom.compiler.run.executable import Executable
from convloom.errors import InvalidInputError
from convloom.kernels.contract import tolerance
from convloom.kernels.tile.torch_convolution import SoundConvolutions
from torch import nn

from . import nets, test_fusions
from .fuzz.contract import AGAIN, NOISE_RUNS, OTHER, UNFUSED, Noise, check_many, same
from .fuzz.grammar import generate
from .gpu_checks import dtype_of
from .harness import Interpreter
from .properties import rules as rules_of

TF32_UNIT = 2.0**-11
MODEL_SEED = 1
"""Seed 0 draws an EfficientNet-B0 that magnifies rounding ten thousand times, in eager too."""


# Fused rules.


def check_rule(device: Interpreter, name: str, precision: str) -> bool:
    """The rule's example, with the passes up to the rule's own and with none, against fp64.

    Whether the rule fired: it is forced where the cost model of the device would not choose it, but
    its kernel may not fit the device in that precision.
    """
    subject = test_fusions.SUBJECTS[name]
    rule, ((module, inputs), _) = subject.rule, rules_of.example_of(subject)
    if inputs[0].dtype is not torch.float32:
        module = copy.deepcopy(module).float()
        inputs = tuple(x.float() for x in inputs)
    options: dict[str, Any] = {
        "target": device.name, "dtype": _half(precision), "tuning": "heuristic",
        "precision": "tf32" if precision == "tf32" else "ieee",
    }  # fmt: skip
    with nets.exporting_once():
        fused = _compiled_with(rule, module, inputs, options)
        alone = convloom.compile(module, inputs, passes="none", **options)
    truth = nets.Truth(module, inputs, dtype_of(precision))
    unit = TF32_UNIT if precision == "tf32" else tolerance.UNIT_ROUNDOFF[dtype_of(precision)]
    for how, exe in (("fused", fused), ("alone", alone)):
        placed = (x.to(device.place) for x in inputs)
        results = [tensor.cpu() for tensor in nets.tensors_of(exe(*placed))]
        wrong = _differences(results, truth, module, inputs, unit)
        assert not wrong, f"{name}, {how}: {wrong[0]}"
    return _fired(rule, fused)


def _compiled_with(
    rule: Rule, module: nn.Module, inputs: Sequence[torch.Tensor], options: dict[str, Any]
) -> Executable:
    """By the passes up to the rule's own; with force where it does not fire without."""
    last = PASSES.index(rules_of.owners()[id(rule)])
    names = tuple(step.name for step in PASSES[: last + 1])
    exe = convloom.compile(module, inputs, passes=names, **options)
    if _fired(rule, exe) or not rule.label:
        return exe
    try:
        return convloom.compile(module, inputs, passes=names, force=[rule.label], **options)
    except InvalidInputError:  # Nothing came of it.
        return exe


def _fired(rule: Rule, exe: Executable) -> bool:
    return any(event.rule == rule.name and event.accepted for event in exe.ledger.events)


def _half(precision: str) -> torch.dtype | None:
    dtype = dtype_of(precision)
    return None if dtype is torch.float32 else dtype


def _differences(
    results: Sequence[torch.Tensor], truth: nets.Truth, module: nn.Module,
    inputs: Sequence[torch.Tensor], unit: float,
) -> list[str]:  # fmt: skip
    """What is wrong, where rounding each value of the network otherwise does not explain it."""
    found = []
    for at, (got, exact, eager) in enumerate(zip(results, truth.exact, truth.eager, strict=True)):
        report = tolerance.compare(got.to(truth.dtype), exact, eager, truth.depth)
        if report is not None and report.startswith("element"):
            worst = torch.zeros_like(exact)
            for seed in range(NOISE_RUNS):
                with Noise(unit, seed):
                    other = nets.run(module, inputs, torch.float64)[at]
                worst = worst.maximum((other - exact).abs().nan_to_num(0.0, 0.0, 0.0))
            peer = (exact + worst).to(truth.dtype)
            report = tolerance.compare(got.to(truth.dtype), exact, peer, truth.depth)
        if report is not None:
            found.append(f"result {at}: {report}")
    return found


# Models.


@dataclass(frozen=True)
class Run:
    """One executable of a model, and the batches it is called with; several are one executable
    for a range."""

    precision: str
    batches: tuple[int, ...]


RUNS = (Run("float16", (1,)), Run("float16", (8,)), Run("float32", (1, 8)))
MORE_RUNS = (*RUNS, Run("bfloat16", (8, 1)), Run("tf32", (1,)))


def check_model(
    device: Interpreter, name: str, runs: Sequence[Run] = RUNS
) -> Iterator[dict[str, Any]]:
    """Compiles and calls a model of the zoo with random weights: for each run and batch
    {model, precision, batch, compiled, eager, kernels, problem}; errors are the largest, relative
    to the rms of the outputs. Nothing is asserted: whoever asks wants all of them."""
    module = nets.randomise(zoo.build(name), MODEL_SEED)
    most = max(batch for run in runs for batch in run.batches)
    (images,) = nets.inputs_of((most, *zoo.entry(name).input_shape))
    module = nets.within_half(module, images[:1])
    with nets.exporting_once():
        for run in runs:
            with products(tf32=run.precision == "tf32"):
                yield from _run_model(device, name, module, images, run)
    nets.forget(module)


def _run_model(
    device: Interpreter, name: str, module: nn.Module, images: torch.Tensor, run: Run
) -> Iterator[dict[str, Any]]:
    dtype = dtype_of(run.precision)
    several = (min(run.batches), max(run.batches)) if len(run.batches) > 1 else None
    exe = convloom.compile(
        module, (images[: run.batches[0]],), target=device.name, dtype=_half(run.precision),
        dynamic_batch=several, precision="tf32" if run.precision == "tf32" else "ieee",
        tuning="heuristic",
    )  # fmt: skip
    twins = [copy.deepcopy(module).to(device.place, each) for each in (torch.float64, dtype)]
    for batch in run.batches:
        x = images[:batch].to(device.place)
        results = nets.tensors_of(exe(x))
        exact, eager = (_by_sample(twin, x) for twin in twins)
        rows = parity.parity(
            [f"output {at}" for at in range(len(results))], results, (exact, eager), dtype,
            nets.depth_of(module),
        )  # fmt: skip
        yield {
            "model": name, "precision": run.precision, "batch": batch,
            "compiled": max(row.compiled for row in rows), "eager": max(row.eager for row in rows),
            "kernels": len(exe.kernels),
            "problem": next((row.problem for row in rows if row.problem is not None), None),
        }  # fmt: skip


def _by_sample(twin: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """What the module returns for each sample, put together: fp64 of eight images at once needs
    more memory than ten processes side by side have."""
    dtype = next(twin.parameters()).dtype
    with torch.no_grad(), SoundConvolutions():
        each = [nets.tensors_of(twin(sample[None].to(dtype))) for sample in x]
    return [torch.cat(parts) for parts in zip(*each, strict=True)]


# Random networks.

SEED_CHECKS = (AGAIN, OTHER, UNFUSED)


def check_seeds(device: Interpreter, seeds: range) -> None:
    """Random networks, fused and op by op, hold the contract."""
    cases = map(generate, seeds)
    check_many([replace(case, checks=SEED_CHECKS, without=None) for case in cases], device)


# Executables.


def check_replay(
    device: Interpreter, name: str = "lenet5", batches: Sequence[int] = (1, 3, 8, 3, 2, 1)
) -> None:
    """Batches and inputs in turns: every call follows its own, twice the same bits, and leaves
    earlier results alone; strided inputs are read as they lie."""
    model = nets.randomise(zoo.build(name))
    shape = zoo.entry(name).input_shape
    drawn = nets.inputs_of(*((batch, *shape) for batch in batches))
    exe = convloom.compile(model, (drawn[0],), target=device.name, dynamic_batch=(1, max(batches)))
    images = [x.to(device.place) for x in drawn]
    first = [exe(image) for image in images]
    kept = [result.clone() for result in first]
    for image, before in reversed(list(zip(images, first, strict=True))):
        same("a call after others", [exe(image)], [before])
    same("earlier results", first, kept)
    for image, result in zip(images, first, strict=True):
        nets.check(result.cpu(), model, (image.cpu(),))
        across = image.transpose(2, 3).contiguous().transpose(2, 3)
        same("a transposed input", [exe(across)], [result])


def check_places(device: Interpreter, name: str = "lenet5") -> None:
    """A module, an example, or both may lie on the device already, as users have them: what comes
    of it is the same, bit for bit."""
    module = nets.randomise(zoo.build(name))
    (x,) = nets.inputs_of((2, *zoo.entry(name).input_shape))
    there = copy.deepcopy(module).to(device.place), x.to(device.place)
    expected = None
    for model, example in itertools.product((module, there[0]), (x, there[1])):
        for batches in (None, (1, 2)):
            exe = convloom.compile(model, (example,), target=device.name, dynamic_batch=batches)
            result = exe(there[1])
            nets.check(result.cpu(), module, (x,))
            expected = result if expected is None else expected
            same("wherever module and example lie", [result], [expected])


def check_without_weights(device: Interpreter) -> None:
    """A network that has no constants."""
    module, (x,) = nets.make(lambda m, x: torch.relu(x) * x.mean((2, 3), keepdim=True), nets.IMAGE)
    exe = convloom.compile(module, (x,), target=device.name)
    nets.check(exe(x.to(device.place)).cpu(), module, (x,))


def check_launch_mode(
    device: Interpreter, mode: str, name: str, batch: int = 8, times: int = 20
) -> int:
    """The model gives the same bits whichever way its kernels follow each other, several times; the
    number of its kernels."""
    module = nets.randomise(zoo.build(name), MODEL_SEED)
    (x,) = nets.inputs_of((batch, *zoo.entry(name).input_shape))
    options: dict[str, Any] = {
        "target": device.name, "dtype": torch.float16, "tuning": "heuristic"
    }  # fmt: skip
    with nets.exporting_once():
        plain = convloom.compile(module, (x,), **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CONVLOOM_LAUNCH", mode)
            assert settings.read().launch == {mode}
            other = convloom.compile(module, (x,), **options)
    nets.forget(module)
    x = x.to(device.place)
    expected = plain(x)
    for _ in range(times):
        same(f"{name} with {mode}", [other(x)], [expected])
    return len(other.kernels)


def check_saved(
    device: Interpreter, folder: Path, name: str, built_for: str, batches: tuple[int, int]
) -> None:
    """A file that was built for a target, without its device, gives the same bits as what is
    compiled in this process."""
    module = nets.randomise(zoo.build(name), MODEL_SEED)
    shape = zoo.entry(name).input_shape
    options: dict[str, Any] = {
        "dtype": torch.float16, "tuning": "heuristic", "dynamic_batch": batches
    }  # fmt: skip
    x = nets.inputs_of((batches[1], *shape))[0]
    path = folder / f"{name}.loom"
    with nets.exporting_once():
        there = copy.deepcopy(module).to(device.place)  # Wherever the weights come from.
        convloom.compile(there, (x,), target=built_for, **options).save(path)
        here = convloom.compile(module, (x,), target=device.name, **options)
    loaded = convloom.load(path, device.name)
    for batch in batches:
        part = x[:batch].to(device.place)
        same(f"{name} loaded, batch {batch}", [loaded(part)], [here(part)])
