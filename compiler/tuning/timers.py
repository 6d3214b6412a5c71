"""Who says how long a configuration takes: a device, or the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ...errors import KernelError, TargetUnavailableError
from ...kernels import registry
from ...kernels.contract.op import Config, Problem
from ...kernels.contract.targets import INTERPRETER, Target
from ...kernels.devices import offline
from ...kernels.devices.offline import Resources
from ..records import rank
from ..records.choose import local_device
from ..records.records import MEASURED, MODELLED
from ..run.workers import Handler, WorkerError, WorkerProcess
from .bench import InterpreterBackend, Trial, handler_of

TRIAL_TIMEOUT_S = 180.0
"""One configuration, the exact result included; what takes longer hangs."""


class Model:
    """Times by the cost model and by what the compiler made of a configuration; results are not
    verified."""

    status, device, driver, margin = MODELLED, "model", "", 0.05

    def __init__(self, target: Target) -> None:
        self._target = target

    def open(self) -> None:
        """Nothing has to be made ready."""

    def close(self) -> None:
        """There is no device."""

    def trial(
        self, problem: Problem, config: Config, reports: Sequence[Resources], timeout_s: float
    ) -> Trial:
        op = registry.get(problem.op)
        modelled = rank.modelled_us(op, problem, self._target, config, reports or None)
        return Trial(None, modelled, 0.0)


class Measured:
    """Times by running on a device, in a process of its own that a fault cannot harm.

    connect: makes something with `ask(request, timeout_s)` and `close()`, as `WorkerProcess` has.
    """

    status, device, driver, margin = MEASURED, "", "", 0.0

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self._child: Any = None

    def open(self) -> None:
        """Raises: TargetUnavailableError where there is nothing to measure with."""
        self._child = self._connect()
        try:
            self.device, self.driver = self._child.ask(None, TRIAL_TIMEOUT_S)
        except WorkerError as error:
            raise TargetUnavailableError(f"cannot measure here: {error}") from error

    def trial(
        self, problem: Problem, config: Config, reports: Sequence[Resources], timeout_s: float
    ) -> Trial:
        """What the configuration does.

        Raises: WorkerError where it failed; KernelError where the device has been unusable since.
        """
        try:
            trial: Trial = self._child.ask((problem, config), timeout_s)
            return trial
        except WorkerError as error:
            if error.kind != "error":
                # Else a lost device would look like a fault of every configuration left.
                try:
                    self._child.ask(None, TRIAL_TIMEOUT_S)
                except WorkerError as lost:
                    raise KernelError(
                        f"{self.device} cannot be used any more: {lost} (after {config}: {error})"
                    ) from lost
            raise

    def close(self) -> None:
        if self._child is not None:
            self._child.close()


Timer = Model | Measured
"""Tries configurations. status, device and driver are what its records say; margin: how much faster
than the default another must be, as a fraction, before it is believed."""


def interpreter_handler() -> Handler:
    """Trials in the interpreter (in the child)."""
    return handler_of(InterpreterBackend())


def cuda_handler() -> Handler:
    """Trials on the GPU (in the child)."""
    from .cuda import CudaBackend

    return handler_of(CudaBackend())


def compiler_handler() -> Handler:
    """Compiles requests and reads the machine code (in the child)."""
    torch.set_num_threads(1)
    return offline.resources


def can_measure(target: Target) -> bool:
    """Whether this machine runs what is compiled for the target."""
    return target is INTERPRETER or local_device(target) is not None


def measuring(target: Target) -> Measured:
    """The timer that runs configurations for the target on this machine.

    Raises: TargetUnavailableError where there is no such device.
    """
    if not can_measure(target):
        raise TargetUnavailableError(
            f"target {target.name}: this machine has no such GPU to measure on. Pass --offline "
            "(or compile with tuning='search') to compile for it and rank by the model"
        )
    handler = interpreter_handler if target is INTERPRETER else cuda_handler
    return Measured(partial(WorkerProcess, handler))
