"""Devices that the checks of a GPU run on: the GPU itself, and one that is only rehearsed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from convloom.compiler.run.runtime import bind_launch
from convloom.kernels.contract import epilogue as ep
from convloom.kernels.contract import targets
from convloom.kernels.contract.op import NONE, Launch, Operand, Ref
from convloom.kernels.contract.targets import Target
from convloom.kernels.devices import interpreter, offline
from convloom.kernels.devices.offline import CompileRequest

from .harness import Interpreter

DISTURBANCE = 1024
"""Side of the matrices that are multiplied beside the kernels under test."""


class Gpu(Interpreter):
    """This machine's GPU: launches are compiled, bound and started as an executable's are."""

    name = "cuda"

    def __init__(self) -> None:
        self.target = targets.parse("cuda")
        self.place = torch.device("cuda", torch.cuda.current_device())
        self._side: Any = None

    def run(
        self,
        launch: Launch,
        tensor_of: Callable[[Ref], torch.Tensor],
        batch: int,
        places: Mapping[Ref, Operand] = NONE,
    ) -> None:
        self.bound(launch, tensor_of, batch)()
        self.wait()

    def bound(
        self, launch: Launch, tensor_of: Callable[[Ref], torch.Tensor], batch: int
    ) -> Callable[[], None]:
        """The launch as a call that does not wait for its end."""
        wanted = offline.request(launch, lambda ref: tensor_of(ref).dtype, self.target)
        return bind_launch(launch, self.compiled(launch, wanted), tensor_of, batch)

    def compiled(self, launch: Launch, wanted: CompileRequest) -> Any:
        """What `compiled[grid](*arguments)` starts."""
        return offline.compile_request(wanted)

    def wait(self) -> None:
        """Until everything that was started has ended; a fault of the device is told here."""
        torch.cuda.synchronize()

    def disturb(self) -> None:
        """Starts something on another stream, so that programs arrive in another order."""
        if self._side is None:
            make: Any = torch.cuda.Stream
            self._side = make(), torch.randn(DISTURBANCE, DISTURBANCE, device=self.place)
            self.wait()
        stream, matrix = self._side
        with torch.cuda.stream(stream):
            torch.mm(matrix, matrix)


class Rehearsed(Gpu):
    """A GPU that is not here: configurations are chosen for it, arguments are bound as for it, and
    the interpreter stands for the machine code. Every line of a check runs, but for the driver."""

    name = "interpreter"

    def __init__(self, target: Target) -> None:
        self.target, self.place = target, torch.device("cpu")

    def compiled(self, launch: Launch, wanted: CompileRequest) -> Any:
        return _Interpreted(launch)

    def wait(self) -> None:
        """Nothing runs beside the caller."""

    def disturb(self) -> None:
        """Nothing can be disturbed."""


class _Interpreted:
    """Stands for Triton's compiled kernel."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        kernel, constants = self._launch.kernel, ep.resolved(self._launch.constexprs)

        def start(*ordered: Any) -> None:
            given = dict(zip(kernel.arg_names, ordered, strict=True))
            arguments = {name: value for name, value in given.items() if name not in constants}
            with interpreter.interpreting():
                interpreter.run(kernel, grid, arguments, constants)

        return start
