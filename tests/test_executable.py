"""What `convloom.compile` returns: ownership of tensors, repeatability, reports, inspection."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import convloom
import pytest
import torch
import torch.nn.functional as F
from convloom.compiler.graph.memory import Memory
from convloom.compiler.plan.plan import KernelStep
from convloom.compiler.run.executable import Executable
from convloom.compiler.run.runtime import bind_launch
from convloom.errors import InvalidInputError, KernelError, TargetUnavailableError
from convloom.kernels.contract.spec import FLOAT_DTYPES
from torch import nn

from . import nets
from .nets import Made, make

IMAGE = (2, 3, 9, 8)
RUNNABLE = ("reference", "interpreter")
every_target = pytest.mark.parametrize("target", RUNNABLE)


@pytest.fixture(scope="module", autouse=True)
def exporting_once() -> Iterator[None]:
    with nets.exporting_once():
        yield


def small() -> Made:
    """Two convolutions with everything around them, a residual and a classifier."""

    def function(m: Any, x: torch.Tensor) -> Any:
        y = torch.relu(m.norm1(m.conv1(x)))
        z = torch.relu(m.norm2(m.conv2(m.drop(y))) + y)
        return m.head(F.max_pool2d(z, 2).flatten(1)), z

    return make(
        function,
        IMAGE,
        conv1=nn.Conv2d(3, 8, 3, padding=1, bias=False),
        norm1=nn.BatchNorm2d(8),
        drop=nn.Dropout(),
        conv2=nn.Conv2d(8, 8, 3, padding=1),
        norm2=nn.BatchNorm2d(8),
        head=nn.Linear(8 * 4 * 4, 5),
    )


@cache
def shared() -> Made:
    return small()


def compiled(target: str = "interpreter", **options: Any) -> tuple[Executable, Made]:
    """An executable of its own, and the module and inputs that all tests share."""
    return convloom.compile(*shared(), target=target, **options), shared()


def same(a: Any, b: Any) -> bool:
    pairs = zip(nets.tensors_of(a), nets.tensors_of(b), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


# Ownership.


@pytest.mark.interpreter
@pytest.mark.parametrize("passes", ["default", "none"])
@every_target
def test_weights_are_those_of_the_moment_of_compilation(target: str, passes: str) -> None:
    module, inputs = small()
    exe = convloom.compile(module, inputs, target=target, passes=passes)
    before = exe(*inputs)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.mul_(3).add_(1)
    assert same(exe(*inputs), before)
    module.conv1 = None
    assert same(exe(*inputs), before)


@pytest.mark.interpreter
def test_whatever_reads_the_weights_later_sees_those_of_compilation(tmp_path: Path) -> None:
    module, inputs = small()
    exe, rebuilt = (convloom.compile(module, inputs, target="interpreter") for _ in range(2))
    before = exe(*inputs)
    exe.save(tmp_path / "before.loom")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.mul_(3).add_(1)
    rebuilt.save(tmp_path / "after.loom")
    files = [(tmp_path / name).read_bytes() for name in ("before.loom", "after.loom")]
    assert files[0] == files[1]
    for target in RUNNABLE:
        for got, wanted in zip(
            convloom.load(tmp_path / "after.loom", device=target)(*inputs), before, strict=True
        ):
            torch.testing.assert_close(got, wanted)
    assert max(row.compiled for row in exe.errors(*inputs)) < 1e-4


@every_target
def test_nothing_that_is_kept_lies_in_the_memory_of_the_module(target: str) -> None:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        first, second = m.conv.weight.split(4)
        y = F.conv2d(F.conv2d(x, m.conv.weight), second) + m.shift[1:]
        return m.bn(torch.relu(y)) @ m.matrix.T + F.conv2d(x, first)

    module, inputs = make(
        forward,
        (2, 8, 6, 6),
        conv=nn.Conv2d(8, 8, 1, bias=False),
        bn=nn.BatchNorm2d(4),
    )
    module.shift, module.matrix = nn.Parameter(torch.randn(5, 1, 1)), torch.randn(6, 6)
    exe = convloom.compile(module, inputs, target=target, passes="none")
    own = {tensor.untyped_storage().data_ptr() for tensor in module.state_dict().values()}
    own.add(module.matrix.untyped_storage().data_ptr())
    kept = (*exe.graph.tensors.values(), *exe.plan.constants.values())
    assert len(kept) > 6 and not [t for t in kept if t.untyped_storage().data_ptr() in own]


def test_the_account_of_weights_beside_constants_that_the_graph_makes() -> None:
    """It folds constants without their values, which it does not have."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return x + torch.cat([m.fc.weight, torch.ones(2, 4)])

    module, inputs = make(forward, (6, 4), fc=nn.Linear(4, 4))
    exe = convloom.compile(module, inputs, target="reference")
    assert exe.ledger.account().nodes and exe.to_bytes()


def test_shared_weights_are_one_constant() -> None:
    fc = nn.Linear(4, 4)
    module, inputs = make(lambda m, x: m.b(torch.relu(m.a(x))), (3, 4), a=fc, b=nn.Linear(4, 4))
    module.b.weight = fc.weight
    exe = convloom.compile(module, inputs, target="reference")
    assert len(exe.graph.tensors) == 3


@pytest.mark.interpreter
@every_target
def test_returned_weights_are_copies(target: str) -> None:
    module, inputs = make(lambda m, x: (m.fc.weight, x, m.fc(x)), (3, 4), fc=nn.Linear(4, 4))
    exe = convloom.compile(module, inputs, target=target)
    weight, x, _ = exe(*inputs)
    weight.zero_()
    x.zero_()
    nets.check(exe(*inputs), module, inputs)
    assert module.fc.weight.abs().sum() > 0 and inputs[0].abs().sum() > 0


@pytest.mark.interpreter
@every_target
def test_inputs_are_not_modified(target: str) -> None:
    module, inputs = make(lambda m, x: (torch.relu_(x * 1.0), x.clone().add_(1)), IMAGE)
    exe = convloom.compile(module, inputs, target=target)
    kept, version = inputs[0].clone(), inputs[0]._version
    nets.check(exe(*inputs), module, inputs)
    assert torch.equal(inputs[0], kept) and inputs[0]._version == version


@pytest.mark.interpreter
@every_target
def test_results_belong_to_the_caller(target: str) -> None:
    exe, (_, (x,)) = compiled(target)
    first = exe(x)
    kept = [tensor.clone() for tensor in nets.tensors_of(first)]
    second = exe(x * 2.0)
    assert same(first, kept) and not same(first, second)
    for tensor in nets.tensors_of(second):
        tensor.fill_(float("nan"))
    assert same(exe(x), kept), "a result lies in the executable's own memory"
    storages = [tensor.untyped_storage().data_ptr() for tensor in nets.tensors_of(exe(x))]
    assert len(set(storages)) == len(storages), "results share memory"
    assert not any(tensor.requires_grad for tensor in nets.tensors_of(first))


def variants(x: torch.Tensor) -> dict[str, torch.Tensor]:
    wide = torch.zeros(*x.shape[:3], 2 * x.shape[3])
    wide[..., ::2] = x
    large = torch.full((x.shape[0] + 2, *(size + 3 for size in x.shape[1:])), float("nan"))
    inside = large[1:-1, 1:-2, 2:-1, 3:]
    inside.copy_(x)
    return {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "every second": wide[..., ::2],
        "inside": inside,
        "expanded": x[:1, :, :1].expand(x.shape),
        "flipped": x.flip(3).flip(3),
        "requires grad": x.clone().requires_grad_(),
    }


@pytest.mark.interpreter
@every_target
def test_any_strides_are_accepted(target: str) -> None:
    exe, (module, (x,)) = compiled(target)
    for name, variant in variants(x).items():
        kept = variant.detach().clone()
        result = exe(variant)
        nets.check(result, module, (variant.detach(),))
        assert torch.equal(variant.detach(), kept), name
        for tensor in nets.tensors_of(result):
            assert tensor.is_contiguous(), name


@pytest.mark.interpreter
@every_target
def test_an_executable_is_bitwise_repeatable(target: str) -> None:
    exe, (_, (x,)) = compiled(target)
    first = exe(x)
    exe(torch.full_like(x, float("nan")))
    exe(torch.full_like(x, float("inf")))
    assert same(exe(x), first), "memory of an earlier call is read"
    assert same(compiled(target)[0](x), first), "compilation is not deterministic"


@pytest.mark.interpreter
@every_target
def test_batches_may_alternate(target: str) -> None:
    exe, _ = compiled(target, dynamic_batch=(1, 4))
    images = {batch: nets.inputs_of((batch, *IMAGE[1:]), seed=batch)[0] for batch in (1, 2, 4)}
    first = {batch: exe(image) for batch, image in images.items()}
    for batch in (4, 1, 1, 2, 4):
        assert same(exe(images[batch]), first[batch])
    if target == "interpreter":
        # Samples do not see each other.
        assert same([t[:1] for t in nets.tensors_of(exe(images[4]))], exe(images[4][:1]))


@pytest.mark.interpreter
@every_target
def test_nan_stays_in_its_sample(target: str) -> None:
    exe, (module, (x,)) = compiled(target)
    broken = x.clone()
    broken[1, 0, 4, 4] = float("nan")
    nets.check(exe(broken), module, (broken,))
    assert all(torch.isfinite(tensor[0]).all() for tensor in nets.tensors_of(exe(broken)))


# Dtypes.


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@every_target
def test_computing_in_another_dtype_keeps_the_outer_one(target: str, dtype: torch.dtype) -> None:
    exe, (module, inputs) = compiled(target, dtype=dtype)
    result = exe(*inputs)
    assert all(tensor.dtype is torch.float32 for tensor in nets.tensors_of(result))
    nets.check(result, module, inputs, dtype)
    inner = {b.dtype for b in exe.plan.buffers.values() if b.kind in ("arena", "fixed")}
    assert dtype in inner and inner <= {dtype, torch.float32}


@pytest.mark.interpreter
@pytest.mark.parametrize("inner", [None, torch.float32])
@pytest.mark.parametrize("outer", FLOAT_DTYPES[1:])
def test_half_precision_modules(outer: torch.dtype, inner: torch.dtype | None) -> None:
    module, (x,) = small()
    module, x = module.to(outer), x.to(outer)
    exe = convloom.compile(module, (x,), target="interpreter", dtype=inner)
    result = exe(x)
    assert all(tensor.dtype is outer for tensor in nets.tensors_of(result))
    nets.check(result, module, (x,), outer)


@pytest.mark.interpreter
def test_casts_inside_a_module() -> None:
    def function(m: Any, x: torch.Tensor) -> Any:
        return m.fc(torch.relu(x.half()).float()), x.to(torch.bfloat16)

    module, inputs = make(function, (3, 8), fc=nn.Linear(8, 4))
    exe = convloom.compile(module, inputs, target="interpreter")
    first, second = exe(*inputs)
    assert first.dtype is torch.float32 and second.dtype is torch.bfloat16
    with torch.no_grad():
        want = module(*inputs)
    torch.testing.assert_close(first, want[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(second, want[1])


# Reports.


def test_compile_logs_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="convloom"):
        exe, _ = compiled("reference")
    lines = [r.getMessage() for r in caplog.records if r.name == "convloom"]
    assert lines == [f"Net: {exe.summary_line()}"]
    assert exe.summary_line() == (
        f"13 -> {len(exe.kernels)} kernels (every op alone -> this plan), 2 convs"
    )


def test_summary() -> None:
    exe, _ = compiled()
    counts = exe.summary
    assert counts == exe.plan.summary()
    assert counts["convs"] == 2 and counts["torch_fallbacks"] == 0
    assert counts["kernels"] == len(exe.kernels) == len(exe.plan.kernels)
    assert 0 < counts["arena_bytes"] < counts["activation_bytes"]


@pytest.mark.parametrize("passes", ["default", "none"])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_every_captured_node_has_one_record(passes: str, dtype: torch.dtype | None) -> None:
    exe, _ = compiled("reference", passes=passes, dtype=dtype)
    records = exe.ledger.account().nodes
    assert len({record.node for record in records}) == len(records)
    steps = {step.name for step in exe.plan.steps}
    for record in records:
        assert record.kernel in {*steps, "view", "in place", "removed", "constant"}, record
    ops = {record.op for record in records}
    assert {"conv2d", "batch_norm", "relu", "identity", "add", "max_pool2d", "linear"} <= ops
    if passes == "default":
        by_path = {r.module_path: r for r in records if r.op in ("conv2d", "batch_norm")}
        assert by_path["norm1"].kernel == by_path["conv1"].kernel
        assert by_path["norm1"].rules[0].startswith("batch_norm(heavy")


def test_ledger() -> None:
    exe, _ = compiled("reference")
    data = json.loads(json.dumps(exe.ledger.to_json()))
    assert len(data["nodes"]) == len(exe.ledger.account().nodes)
    assert len(data["events"]) == len(exe.ledger.events)
    assert exe.ledger.bytes_saved == sum(event["bytes_saved"] for event in data["events"]) > 0
    text = exe.ledger.to_text()
    assert text.count("-> ") >= len(data["nodes"])
    assert "\nconv2 " in text and "by       batch_norm(heavy" in text


def test_explain() -> None:
    exe, _ = compiled("reference")
    head, _, rest = exe.explain().partition("\n\n")
    assert head.startswith(f"Net on reference: {exe.summary_line()}\narena ")
    assert f"{exe.summary['arena_bytes']:,} bytes of {exe.summary['activation_bytes']:,}" in head
    assert rest == exe.ledger.to_text()


def test_refusals_are_explained() -> None:
    def function(m: Any, x: torch.Tensor) -> Any:
        y = m.conv(x)
        return m.norm(y) + y

    layers = {"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4)}
    exe = convloom.compile(*make(function, IMAGE, **layers), target="reference")
    assert "refused  batch_norm(heavy(x, w) + b)" in exe.explain()
    assert "is also read by" in exe.explain()


# Kernels.


def test_kernels_show_their_source() -> None:
    exe, _ = compiled()
    (second,) = (k for k in exe.kernels if (k.module_path, k.step.op) == ("conv2", "conv2d"))
    source = exe.kernel(second.name).source()
    assert "def gemm" in source or ("def tile_kernel" in source and "def store(" in source)
    assert "def epilogue(acc, rows, columns" in source
    assert "relu(acc)" in source and "# add" in source and "tl.load(extras[0]" in source
    assert f"# {second.name}: " in source and ("BLOCK_M=" in source or "TILE.M=" in source)
    assert set(second.ops) > {second.step.name}, "it stands for several captured nodes"
    names = [kernel.name for kernel in exe.kernels]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("precision", "exact"), [("ieee", True), ("tf32", False)])
def test_precision_reaches_the_kernels(precision: str, exact: bool) -> None:
    exe, _ = compiled("reference", precision=precision)
    (conv,) = (k for k in exe.kernels if (k.module_path, k.step.op) == ("conv2", "conv2d"))
    used = conv.launch.constexprs["TILE"].precision
    assert (used in ("ieee", "tf32x3")) is exact and f"TILE.precision={used}" in conv.source()


@pytest.mark.interpreter
def test_heuristic_tuning_is_the_default_without_records() -> None:
    exe, (_, inputs) = compiled()
    other, _ = compiled(tuning="heuristic")
    assert [step.config for step in kernel_steps(exe)] == [s.config for s in kernel_steps(other)]
    assert same(exe(*inputs), other(*inputs))


def kernel_steps(exe: Executable) -> list[KernelStep]:
    return [step for step in exe.plan.steps if isinstance(step, KernelStep)]


def test_an_unknown_kernel_is_refused_with_near_names() -> None:
    exe, _ = compiled()
    name = exe.kernels[1].name
    with pytest.raises(InvalidInputError) as caught:
        exe.kernel(name + "x")
    assert str(caught.value).startswith(f"no kernel named '{name}x'; did you mean {name}")


def test_the_interpreter_has_no_machine_code() -> None:
    exe, _ = compiled()
    for ask in ("report", "ptx", "sass"):
        with pytest.raises(KernelError, match="the interpreter has no machine code"):
            getattr(exe.kernels[0], ask)()


@pytest.mark.interpreter
def test_profile() -> None:
    exe, (_, inputs) = compiled()
    times = exe.profile(*inputs)
    assert [name for name, _ in times] == [step.name for step in exe.plan.steps]
    assert all(time_us > 0 for _, time_us in times)


@pytest.mark.interpreter
def test_a_batch_of_nothing_has_no_profile() -> None:
    exe, (_, (x,)) = compiled(dynamic_batch=(0, 2))
    with pytest.raises(InvalidInputError, match="batch"):
        exe.profile(x[:0])


@pytest.mark.interpreter
def test_errors_per_step() -> None:
    exe, (_, inputs) = compiled()
    rows = exe.errors(*inputs)
    named = {row.step: row for row in rows}
    assert named.keys() <= {step.name for step in exe.plan.steps} and len(rows) >= 3
    assert {"conv1", "conv2", "head"} <= {row.module_path for row in rows}
    for row in rows:
        assert 0 <= row.compiled < 1e-5 and 0 <= row.eager < 1e-5, row
    half, _ = compiled(dtype=torch.float16)
    assert max(row.compiled for row in half.errors(*inputs)) > 1e-5


def test_a_launch_on_a_tensor_that_is_not_aligned_is_refused() -> None:
    """Kernels are compiled for addresses that are multiples of 16 bytes."""
    module, inputs = make(lambda m, x: m.linear(x), (4, 16), linear=nn.Linear(16, 16))
    plan = convloom.compile(module, inputs, target="cuda:sm_80", tuning="heuristic").plan
    ((_, launch),) = plan.kernels
    memory = torch.zeros(1024)
    aligned = bind_launch(launch, {launch.grid_at(1): "code"}, lambda ref: memory, 1)
    assert callable(aligned)
    with pytest.raises(KernelError, match=r"kernel: argument \w+ is not aligned to 16 bytes"):
        bind_launch(launch, {}, lambda ref: memory[1:], 1)


def test_errors_are_relative() -> None:
    module, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), torch.randn(1, 3, 6, 6)
    exe = convloom.compile(module, (x,), target="interpreter")
    for row in exe.errors(x * 1e6):
        assert 0 < row.compiled < 1e-5 and 0 < row.eager < 1e-5, row


@pytest.mark.parametrize("ask", ["profile", "errors"])
def test_what_only_some_targets_can_tell(ask: str) -> None:
    exe, (_, inputs) = compiled("reference")
    with pytest.raises(KernelError, match=r"reference|interpreter"):
        getattr(exe, ask)(*inputs)


# Cross-compilation.


def tiny() -> Made:
    layers = {"conv": nn.Conv2d(16, 16, 3, padding=1, bias=False), "norm": nn.BatchNorm2d(16)}
    return make(lambda m, x: torch.relu(m.norm(m.conv(x)) + x), (1, 16, 8, 8), **layers)


@pytest.fixture(scope="module", params=["cuda:sm_80", "cuda:sm_90"])
def cross_compiled(request: pytest.FixtureRequest) -> tuple[Executable, Made]:
    made = tiny()
    return convloom.compile(*made, target=request.param, dtype=torch.float16), made


def test_a_cross_compiled_executable_reports_every_kernel(
    cross_compiled: tuple[Executable, Made],
) -> None:
    exe, _ = cross_compiled
    assert exe.kernels
    for kernel in exe.kernels:
        report = kernel.report()
        assert 0 < report.registers <= exe.target.registers_per_thread, kernel.name
        assert report.spill_bytes == 0, kernel.name
        assert 0 <= report.shared_bytes <= exe.target.shared_bytes, kernel.name
        assert report.count("LDG") + report.count("LDGSTS") + report.count("UTMALDG") > 0
        assert report.count("EXIT") >= 1


def test_machine_code_can_be_read(cross_compiled: tuple[Executable, Made]) -> None:
    exe, _ = cross_compiled
    (kernel,) = (kernel for kernel in exe.kernels if kernel.step.op == "conv2d")
    assert f".target sm_{exe.target.capability}" in kernel.ptx()
    assert "EXIT" in kernel.sass()
    assert "mma" in kernel.ptx(), "tensor cores"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU may be the one compiled for")
def test_a_cross_compiled_executable_refuses_to_run(
    cross_compiled: tuple[Executable, Made],
) -> None:
    exe, (_, inputs) = cross_compiled
    with pytest.raises(TargetUnavailableError) as caught:
        exe(*inputs)
    assert exe.target.name in str(caught.value) and "interpreter" in str(caught.value)


def test_a_cross_compiled_plan_is_explained(cross_compiled: tuple[Executable, Made]) -> None:
    exe, _ = cross_compiled
    assert f"Net on {exe.target.name}: 6 -> 3 kernels" in exe.explain()
    assert json.loads(json.dumps(exe.plan.to_json()))["target"] == exe.target.name


def test_memory_that_nobody_wrote_is_nan_where_it_is_checked() -> None:
    """A kernel that reads more than was written shows, whatever lay there before."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        plan = convloom.compile(
            net, (torch.zeros(1, 3, 8, 8),), target="interpreter", dtype=dtype
        ).plan
        memory = Memory(plan, plan.constants, 1)
        unwritten = [name for name, each in plan.buffers.items() if each.kind != "constant"]
        assert any(plan.buffers[name].kind == "arena" for name in unwritten)
        assert all(memory.flat(name).isnan().all() for name in unwritten)
