"""Processes made by fork() in the middle of a call, interruptions, and defaults of the caller's."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import convloom
import pytest
import torch
from convloom.compiler.plan.plan import Step
from convloom.compiler.run.executable import Executable
from convloom.errors import InvalidInputError
from convloom.kernels.devices import interpreter
from convloom.kernels.devices.interpreter import interpreting
from torch import nn
from triton.language import core
from triton.runtime import interpreter as upstream
from triton.runtime.jit import JITFunction

from . import nets
from .semantic_mutants import residual, separable, tokens

pytestmark = pytest.mark.interpreter
DOT = core.dot


def compiled(target: str = "interpreter", **options: Any) -> tuple[Executable, torch.Tensor]:
    """A network, and its input."""
    module, inputs = residual()
    return convloom.compile(module, inputs, target=target, tuning="heuristic", **options), inputs[0]


# fork().


def _call_in_child(exe: Executable, x: torch.Tensor, expected: torch.Tensor) -> None:
    other, _ = compiled("reference")
    same = torch.equal(exe(x), expected)
    os._exit(0 if same and torch.allclose(other(x), expected, 1e-3, 1e-3) else 1)


@pytest.mark.parametrize("target", ["interpreter", "emulator:sm_90"])
def test_a_child_made_in_the_middle_of_another_threads_call_can_call(target: str) -> None:
    """Neither the lock of the executable nor the patched language is left to it."""
    exe, x = compiled(target)
    expected = exe(x)
    inside, done = threading.Event(), threading.Event()

    def wait(step: Step, output: torch.Tensor) -> None:
        inside.set()
        done.wait(60)

    caller = threading.Thread(target=exe.watch, args=((x,), wait))
    caller.start()
    assert inside.wait(60)
    child = multiprocessing.get_context("fork").Process(
        target=_call_in_child, args=(exe, x, expected)
    )
    child.start()
    child.join(60)
    done.set()
    caller.join()
    assert child.exitcode == 0
    assert torch.equal(exe(x), expected)


def test_a_child_of_the_thread_that_interprets_goes_on_interpreting() -> None:
    with interpreting():
        child = os.fork()
        if not child:
            os._exit(0 if _is_patched() else 1)
        _, status = os.waitpid(child, 0)
    assert status == 0 and not _is_patched()


def _is_patched() -> bool:
    return JITFunction.__call__ is interpreter._call_nested or core.dot is not DOT


def test_an_interruption_while_the_language_is_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of upstream's own loop over the builtins, in its middle."""
    patch, patched = upstream._patch_attr, []

    def interrupted(*given: Any) -> None:
        patched.append(given[1])
        patch(*given)
        if len(patched) == 40:
            raise KeyboardInterrupt

    before = {name: vars(core)[name] for name in dir(core)}
    monkeypatch.setattr(upstream, "_patch_attr", interrupted)
    with pytest.raises(KeyboardInterrupt), interpreting():
        pass
    assert len(patched) == 40 and not _is_patched()
    assert all(vars(core)[name] is value for name, value in before.items())


def test_triton_compiler_that_is_first_imported_by_an_interpreted_kernel() -> None:
    """It keeps the language's `min` and `max` as they are when it is imported."""
    code = (
        "from convloom.kernels.devices.interpreter import interpreting\n"
        "with interpreting():\n"
        "    from triton.compiler.code_generator import CodeGenerator\n"
        "from triton.language import core\n"
        "assert CodeGenerator.builtin_namespace['min'] is core.builtin_min"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# KeyboardInterrupt.


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C is heard, which it is not where pytest runs in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """An interruption of whatever runs then, as Ctrl-C is one."""

    def interrupt(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def split() -> nets.Made:
    """A product that several programs share, and count themselves by numbers left at zero."""
    return nets.make(lambda m, x: m.linear(x), (2, 4096), linear=nn.Linear(4096, 8))


@pytest.mark.parametrize("network", [residual, split], ids=lambda network: network.__name__)
def test_an_executable_whose_call_was_interrupted_is_as_before(
    network: Callable[[], nets.Made],
) -> None:
    module, (x,) = network()
    exe = convloom.compile(module, (x,), target="interpreter", tuning="heuristic")
    started = time.perf_counter()
    expected, draw = exe(x), random.Random(3)
    whole = time.perf_counter() - started
    for _ in range(15):
        with interrupted_after(draw.uniform(0.0005, whole)):
            exe(x)
        assert torch.equal(exe(x), expected)
    assert not _is_patched()


def test_an_interruption_inside_a_shape_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy makes a TypeError of whatever a sequence raises that it was given as a shape."""
    exe, x = compiled()
    plain, calls, last = core.tuple.__iter__, 0, 0

    def interrupted(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == last:
            raise KeyboardInterrupt
        return plain(*given)

    monkeypatch.setattr(core.tuple, "__iter__", interrupted)
    exe(x)
    for call in range(1, calls, calls // 60):
        calls, last = 0, call
        with pytest.raises(KeyboardInterrupt):
            exe(x)


@pytest.mark.parametrize(("times", "goes_on"), [(1, True), (2, False)])
def test_an_interruption_waits_for_the_end_of_the_export(times: int, goes_on: bool) -> None:
    ends = []

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        ends.append(x)
        return x + 1

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        convloom.compile(*nets.make(forward, (2, 4)), target="reference")
    assert bool(ends) == goes_on and signal.getsignal(signal.SIGINT) is handler


def test_another_thread_exports_without_handling_signals() -> None:
    module, inputs = residual()
    made: list[Executable] = []
    thread = threading.Thread(
        target=lambda: made.append(convloom.compile(module, inputs, target="reference"))
    )
    thread.start()
    thread.join()
    assert made


def test_a_compilation_that_was_interrupted_can_be_made_again() -> None:
    module, (x,) = residual()
    started = time.perf_counter()
    expected = convloom.compile(module, (x,), target="interpreter", tuning="heuristic")(x)
    whole, draw = time.perf_counter() - started, random.Random(4)
    for _ in range(5):
        with interrupted_after(draw.uniform(0.001, whole)):
            convloom.compile(module, (x,), target="interpreter", tuning="heuristic")
    exe = convloom.compile(module, (x,), target="interpreter", tuning="heuristic")
    assert torch.equal(exe(x), expected)


COMPILING = """
import torch, convloom
from torch import nn
convs = [nn.Conv2d(16 + 8 * at, 24 + 8 * at, 3, padding=1) for at in range(8)]
print("compiling", flush=True)
convloom.compile(nn.Sequential(*convs).eval(), (torch.zeros(1, 16, 20, 20),),
                 target="cuda:sm_90", tuning="heuristic")
print("compiled", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [3.0, 6.0, 9.0])
def test_an_interrupted_compilation_leaves_no_process(seconds: float, tmp_path: Path) -> None:
    environment = {**os.environ, "CONVLOOM_CACHE_DIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", COMPILING], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, start_new_session=True, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "compiling\n"
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(60)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("a process is left")


# Defaults of the caller's, and tensors of other kinds.


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


DEFAULTS: dict[str, tuple[Callable[[], Any], Sequence[str]]] = {
    "meta": (lambda: torch.device("meta"), ("reference", "interpreter", "emulator:sm_90")),
    "float64": (lambda: default_dtype(torch.float64), ("reference", "interpreter")),
    "float16": (lambda: default_dtype(torch.float16), ("interpreter",)),
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("network", [separable, tokens], ids=lambda n: n.__name__)
def test_defaults_of_the_caller_change_nothing(
    network: Callable[[], nets.Made], default: str, tmp_path: Path
) -> None:
    module, inputs = network()
    context, targets = DEFAULTS[default]
    with context():
        for target in targets:
            exe = convloom.compile(module, inputs, target=target, tuning="heuristic")
            result = exe(*inputs)
            assert result.dtype is torch.float32 and result.device.type == "cpu"
            exe.save(tmp_path / "net.loom")
            loaded = convloom.load(tmp_path / "net.loom", target)
            assert torch.equal(loaded(*inputs), result)
    nets.check(result, module, inputs)


KINDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "torch.sparse_coo": lambda x: x.to_sparse(),
    "torch._mkldnn": lambda x: x.to_mkldnn(),
    "a nested one": lambda x: torch.nested.nested_tensor([x[0], x[1]]),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_that_are_not_dense_are_refused(kind: str) -> None:
    exe, x = compiled("reference")
    spoiled = KINDS[kind](x)
    with pytest.raises(InvalidInputError, match=rf"expected a dense tensor .*, got {kind}"):
        exe(spoiled)
    module, _ = residual()
    with pytest.raises(InvalidInputError, match=rf"example input 0: .* dense tensor, got {kind}"):
        convloom.compile(module, (spoiled,), target="reference")
