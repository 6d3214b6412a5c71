"""No kernel of several ops that the zoo is compiled to keeps registers in memory."""

from __future__ import annotations

import pytest
import torch
from convloom import zoo
from convloom.compiler.api import lowered
from convloom.compiler.plan.plan import KernelStep
from convloom.compiler.run.runtime import compile_requests
from convloom.kernels import registry
from convloom.kernels.contract import targets
from convloom.kernels.devices import offline

from .properties.compiled import assert_gives_way

TARGETS = ("cuda:sm_80", "cuda:sm_90", "cuda:sm_100")
BATCH = 32
MOST_REPLACED = 1
"""Problems of a network whose default spills a few bytes, so that another configuration is made."""


def fused_steps(model: str, target: str) -> dict[offline.CompileRequest, KernelStep]:
    """The distinct kernels in fp16 whose op no captured call is, and a step that is one."""
    x = torch.zeros(BATCH, *zoo.entry(model).input_shape)
    torch.manual_seed(0)
    module = zoo.build(model).eval()
    _, plan, _ = lowered(module, (x,), target=target, dtype=torch.float16)
    wanted = compile_requests(plan, targets.parse(target))
    pairs = zip(plan.kernels, wanted, strict=True)
    return {request: step for (step, _), request in pairs if not registry.get(step.op).aten}


def check(model: str, target: str) -> None:
    found = fused_steps(model, target)
    offline.compile_all(list(found))
    spilling = {
        step.problem for request, step in found.items() if offline.resources(request).spill_bytes
    }
    assert len(spilling) <= MOST_REPLACED, [problem.op for problem in spilling]
    for problem in spilling:
        assert_gives_way(problem, targets.parse(target))


def test_small_networks() -> None:
    assert fused_steps("lenet5", "cuda:sm_90")
    check("lenet5", "cuda:sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("model", zoo.names())
def test_the_zoo(model: str, target: str) -> None:
    check(model, target)
