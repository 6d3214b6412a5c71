"""No kernel of several ops that the zoo's default configurations make keeps registers in memory."""

from __future__ import annotations

import pytest
import torch
from convloom import zoo
from convloom.compiler.api import lowered
from convloom.compiler.run.runtime import compile_requests
from convloom.kernels import registry
from convloom.kernels.contract import targets
from convloom.kernels.devices import offline

TARGETS = ("cuda:sm_80", "cuda:sm_90", "cuda:sm_100")
BATCH = 32


def fused_requests(model: str, target: str) -> dict[offline.CompileRequest, str]:
    """The distinct kernels in fp16 whose op no captured call is, and a step that is one."""
    x = torch.zeros(BATCH, *zoo.entry(model).input_shape)
    torch.manual_seed(0)
    module = zoo.build(model).eval()
    _, plan, _ = lowered(module, (x,), target=target, dtype=torch.float16)
    wanted = compile_requests(plan, targets.parse(target))
    pairs = zip(plan.kernels, wanted, strict=True)
    return {
        request: f"{step.name} of {step.module_path}"
        for (step, _), request in pairs
        if not registry.get(step.op).aten
    }


def check(model: str, target: str) -> None:
    found = fused_requests(model, target)
    offline.compile_all(list(found))
    spilling = {
        where: resources.spill_bytes
        for request, where in found.items()
        if (resources := offline.resources(request)).spill_bytes
    }
    assert not spilling, f"bytes of registers in memory: {spilling}"


def test_small_networks() -> None:
    assert fused_requests("lenet5", "cuda:sm_90")
    check("lenet5", "cuda:sm_90")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("model", zoo.names())
def test_the_zoo(model: str, target: str) -> None:
    check(model, target)
