"""The same checks on a real GPU: every op of the registry, and whole models through CUDA graphs.

Run with `pytest -m gpu` on a machine that has one; nothing here needs the interpreter.
"""

from __future__ import annotations

import convloom
import pytest
import torch
from convloom import zoo
from convloom.kernels import execute, offline, registry, targets, tolerance
from convloom.kernels.op import Op, Problem, Ref
from hypothesis import given
from hypothesis import strategies as st

from . import harness

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def run_on_gpu(
    op: Op, problem: Problem, tensors: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """The problem's outputs by its compiled kernels, in the default configuration."""
    target = targets.parse("cuda")
    packs = op.packs(problem.attributes)
    buffers: dict[Ref, torch.Tensor] = {}
    for index, (operand, tensor) in enumerate(zip(problem.inputs, tensors, strict=True)):
        pack = packs.get(index)
        flat = harness.buffer_for(operand, tensor) if pack is None else None
        packed = flat if pack is None else pack(problem.attributes, tensor)
        assert packed is not None
        buffers[Ref("input", index)] = packed.cuda()
    for index, operand in enumerate(problem.outputs):
        buffers[Ref("output", index)] = harness.buffer_for(operand, None).cuda()

    def dtype_of(ref: Ref) -> torch.dtype:
        return buffers[ref].dtype

    for launch in op.launches(problem, op.default(problem, target), target):
        wanted = offline.request(launch, dtype_of, target)
        everything = {**buffers, **execute.scratch(launch, "cuda")}
        arguments = execute.bind(launch, everything.__getitem__, 1) | dict(launch.constexprs)
        start = offline.compile_request(wanted)[launch.grid_at(1)]
        start(*(arguments[name] for name in launch.kernel.arg_names))
    torch.cuda.synchronize()
    return tuple(
        harness.view_of(buffers[Ref("output", index)].cpu(), operand)
        for index, operand in enumerate(problem.outputs)
    )


@pytest.mark.parametrize("name", sorted(registry.BY_NAME))
@given(data=st.data(), seed=harness.seeds, pad=harness.pads)
def test_op_agrees_with_its_reference(name: str, data: st.DataObject, seed: int, pad: int) -> None:
    op = registry.get(name)
    case = data.draw(harness.cases(op, data.draw(harness.dtypes)))
    problem = harness.problem_for(op, case.attributes, case.specs, pad=pad)
    tensors = case.tensors(seed)
    harness.compare(op, problem, run_on_gpu(op, problem, tensors), tensors)


@pytest.mark.parametrize("name", sorted(registry.BY_NAME))
@given(data=st.data(), seed=harness.seeds)
def test_op_keeps_nan_and_infinity(name: str, data: st.DataObject, seed: int) -> None:
    op = registry.get(name)
    case = data.draw(harness.cases(op))
    problem = harness.problem_for(op, case.attributes, case.specs)
    packs = op.packs(case.attributes)
    tensors = tuple(
        tensor if index in packs else harness.with_special_values(tensor, seed + index)
        for index, tensor in enumerate(case.tensors(seed))
    )
    harness.compare(op, problem, run_on_gpu(op, problem, tensors), tensors)


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("name", ["lenet5", "resnet18", "resnet50", "googlenet", "mobilenet_v2"])
def test_model_agrees_with_fp64(name: str, batch: int, dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model = zoo.build(name).eval()
    x = torch.randn(batch, *zoo.entry(name).input_shape)
    exe = convloom.compile(model, (x.cuda(),), target="cuda", dtype=dtype)
    result = exe(x.cuda()).cpu()
    with torch.no_grad():
        exact = model.double()(x.double())
        peer = model.to(dtype or torch.float32).cuda()(x.to(dtype or torch.float32).cuda())
    worst = tolerance.compare(result.to(peer.dtype), exact, peer.cpu(), depth=4096)
    assert worst is None, worst


def test_replay_follows_its_inputs_and_is_repeatable() -> None:
    model = zoo.lenet5(weights="digits").eval()
    images = [torch.rand(batch, 1, 32, 32, device="cuda") for batch in (1, 3, 8, 3)]
    exe = convloom.compile(model, (images[0],), target="cuda", dynamic_batch=(1, 8))
    first = [exe(image) for image in images]
    second = [exe(image) for image in images]
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[1], first[3])
