"""Whole networks as people write them (`whole_nets.py`): compiled, planned for a GPU, compared."""

from __future__ import annotations

import convloom
import pytest
import torch
from convloom.compiler import api

from . import nets, whole_nets


@pytest.mark.interpreter
@pytest.mark.parametrize("name", whole_nets.NETWORKS)
def test_whole_networks(name: str) -> None:
    """No op is torch's; fused by the kernels and as captured by torch ops it is the module; and a
    GPU's plan has every kernel, with no more launches."""
    module, inputs = whole_nets.made(name)
    with nets.exporting_once():
        truth = nets.Truth(module, inputs)
        exe = convloom.compile(module, inputs, target="interpreter")
        plain = convloom.compile(module, inputs, target="reference", passes="none")
        planned = api.plan(module, inputs, target="cuda:sm_90", dtype=torch.float16)
    for each in (exe, plain):
        truth.check(each(*inputs))
    summaries = [each.summary for each in (exe, plain, planned)]
    assert [summary["torch_fallbacks"] for summary in summaries] == [0, 0, 0]
    kernels = [summary["kernels"] for summary in summaries]
    # A GPU's plan converts inputs to float16 by a kernel of its own.
    assert kernels[0] < kernels[1] and kernels[2] <= kernels[0] + len(inputs)


@pytest.mark.parametrize("name", ["stylegan2", "unet_by_slices", "yolov3", "yolov5"])
def test_whole_networks_of_any_batch(name: str) -> None:
    """Those that make tensors of the batch's size themselves."""
    module, inputs = whole_nets.made(name)
    exe = convloom.compile(module, inputs, target="reference", dynamic_batch=(1, 3))
    for batch in (1, 3):
        some = nets.inputs_of(*((batch, *x.shape[1:]) for x in inputs), seed=batch)
        nets.check(exe(*some), module, some)


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", whole_nets.NETWORKS)
def test_whole_networks_in_halves(name: str, dtype: torch.dtype) -> None:
    """About as far from float64 as eager is; a QAT network's ops are none of torch's in halves."""
    module, inputs = whole_nets.made(name)
    exe = convloom.compile(module, inputs, target="interpreter", dtype=dtype)
    (exact,) = nets.run(module, inputs, torch.float64)
    (eager,) = nets.run(module, inputs, torch.float32 if name == "qat_resnet" else dtype)
    scale = exact.square().mean().sqrt()
    ours, theirs = ((y.double() - exact).square().mean().sqrt() for y in (exe(*inputs), eager))
    assert ours <= 2 * theirs + 4 * torch.finfo(dtype).eps * scale
