"""What will run: steps, the buffers they read and write, and where each tensor lies.

A plan is made once for a range of batches. Sizes are those of the largest batch; buffers that hold
a batch, and their place in the arena, scale linearly with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...kernels.contract.op import Config, Launch, Problem, Ref
from ...kernels.contract.targets import Target
from ..graph.interface import Port, Structure
from ..graph.memory import Buffer, BufferSlice
from ..graph.torch_call import TorchCall


@dataclass(frozen=True)
class KernelStep:
    """One op application: the problem, the chosen configuration, its launches and their tensors.

    chosen_by: where the configuration came from, "heuristic" or which tuning record, in words.
    """

    name: str
    op: str
    problem: Problem
    config: Config
    launches: tuple[Launch, ...]
    buffers: Mapping[Ref, str]
    module_path: str = ""
    origins: tuple[str, ...] = ()
    chosen_by: str = "heuristic"


@dataclass(frozen=True)
class TorchStep:
    """A call that runs as a torch op (fallback="torch")."""

    name: str
    call: TorchCall
    inputs: tuple[BufferSlice, ...]
    outputs: tuple[BufferSlice, ...]
    module_path: str = ""
    origins: tuple[str, ...] = ()


Step = KernelStep | TorchStep


@dataclass(frozen=True)
class Plan:
    """Everything the runtime needs except the machine code.

    precision, in_place: of the `Options` it was lowered with; a file that is loaded for another
    target is lowered with them again. streams: of each step, where independent ones may run side by
    side (`branches.py`); empty where all run in one.
    """

    target: Target
    steps: tuple[Step, ...]
    buffers: Mapping[str, Buffer]
    constants: Mapping[str, torch.Tensor]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    structure: Structure
    arena_bytes: int
    activation_bytes: int
    batch: tuple[int, int] | None = None
    convs: int = 0
    views: int = 0
    precision: str = "ieee"
    in_place: bool = True
    streams: tuple[int, ...] = ()

    @property
    def kernels(self) -> tuple[tuple[KernelStep, Launch], ...]:
        """Every launch with its step, in order."""
        steps = (step for step in self.steps if isinstance(step, KernelStep))
        return tuple((step, launch) for step in steps for launch in step.launches)

    @property
    def torch_fallbacks(self) -> int:
        return sum(isinstance(step, TorchStep) for step in self.steps)

    def summary(self) -> dict[str, int]:
        """The counts that `compile` logs."""
        return {
            "convs": self.convs,
            "kernels": len(self.kernels),
            "torch_fallbacks": self.torch_fallbacks,
            "arena_bytes": self.arena_bytes,
            "activation_bytes": self.activation_bytes,
        }

    def to_text(self) -> str:
        """One line per step."""
        lines = []
        for step in self.steps:
            if isinstance(step, TorchStep):
                lines.append(f"{step.name:<28} torch  {step.call}")
                continue
            epilogue = ", ".join(map(str, step.problem.epilogue))
            prologue = ", ".join(map(str, step.problem.prologue))
            stages = (f" <{prologue}>" if prologue else "") + (f" [{epilogue}]" if epilogue else "")
            inputs = ", ".join(str(operand.spec) for operand in step.problem.inputs)
            output = step.problem.output.spec
            chosen = f"{step.config} ({step.chosen_by})"
            lines.append(f"{step.name:<28} {step.op}({inputs}){stages} -> {output} | {chosen}")
        return "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, Any]:
        """Plain data: steps, buffers, ports; constants by shape and dtype."""
        return {
            "target": self.target.name,
            "batch": list(self.batch) if self.batch else None,
            "summary": self.summary(),
            "steps": [_step_json(step) for step in self.steps],
            "buffers": [
                {"name": buffer.name, "kind": buffer.kind,
                 "dtype": str(buffer.dtype).removeprefix("torch."),
                 "size_bytes": buffer.size_bytes, "scales_with_batch": buffer.batch is not None,
                 "offset": buffer.offset}
                for buffer in self.buffers.values()
            ],
            "inputs": [{"name": port.name, "spec": str(port.spec)} for port in self.inputs],
            "outputs": [{"name": port.name, "spec": str(port.spec)} for port in self.outputs],
        }  # fmt: skip


def _step_json(step: Step) -> dict[str, Any]:
    common = {"name": step.name, "module": step.module_path, "ops": list(step.origins)}
    if isinstance(step, TorchStep):
        return {**common, "torch": str(step.call)}
    return {
        **common,
        "op": step.op,
        "attributes": str(step.problem.attributes),
        "epilogue": list(map(str, step.problem.epilogue)),
        "prologue": list(map(str, step.problem.prologue)),
        "config": {**dict(step.config.blocks), "num_warps": step.config.num_warps,
                   "num_stages": step.config.num_stages},
        "chosen_by": step.chosen_by,
        "buffers": {f"{ref.kind}{ref.index}": name for ref, name in step.buffers.items()},
        "launches": [
            {"kernel": launch.kernel.fn.__name__, "rows": launch.rows,
             "programs": launch.grid_at(launch.batch or 1)[0]}
            for launch in step.launches
        ],
    }  # fmt: skip
