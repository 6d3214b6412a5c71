"""Tuning records: their keys, their files, and who gets which."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from convloom.compiler.records import choose, keys, rank, records, store
from convloom.compiler.records.keys import key_of
from convloom.compiler.records.records import Record, Rejected
from convloom.compiler.records.store import Store
from convloom.errors import ArtifactError, InvalidInputError
from convloom.kernels import registry
from convloom.kernels.contract.epilogue import Stage
from convloom.kernels.contract.op import Config, Problem, config
from convloom.kernels.contract.spec import Layout, Operand, TensorSpec
from convloom.kernels.contract.targets import INTERPRETER, REFERENCE, parse
from convloom.kernels.devices import kernel_hash
from convloom.kernels.movement.pointwise import Pointwise
from convloom.kernels.tile.conv_geometry import Conv2d

from . import harness

SM_90 = parse("cuda:sm_90")
CONV = registry.get("conv2d")


def conv(n: int = 8, c: int = 64, k: int = 64, size: int = 56, pad: int = 0) -> Problem:
    """A 3x3 convolution with bias and ReLU in fp16."""
    x = TensorSpec((n, c, size, size), torch.float16, Layout.NHWC)
    w = TensorSpec((k, c, 3, 3), torch.float16)
    bias = TensorSpec((k, 1, 1), torch.float32)
    stages = (Stage("add"), Stage("relu"))
    return harness.problem_for(CONV, Conv2d(padding=(1,) * 4), (x, w), stages, (bias,), pad)


def relu(*shape: int) -> Problem:
    """A small problem whose tuning space is large."""
    spec = TensorSpec(shape or (4, 64), torch.float32)
    return harness.problem_for(registry.get("relu"), Pointwise(), (spec,))


def record_of(
    problem: Problem,
    tile: Config | None = None,
    time_us: float = 10.0,
    status: str = "measured",
    **changes: Any,
) -> Record:
    """A record of the problem's second best configuration on sm_90, or of another one."""
    op = registry.get(problem.op)
    made = Record(
        key=key_of(problem, SM_90),
        config=tile or rank.space(op, problem, SM_90)[1],
        status=status,
        time_us=time_us,
        spread_us=0.5,
        warm_us=8.0,
        device="NVIDIA H200" if status == "measured" else "model",
        driver="570.1",
        date="2026-01-02T03:04:05+00:00",
        complete=True,
        rejected=(
            Rejected(op.default(problem, SM_90), "slower", "takes 1.2 times as long", 12.0),
            Rejected(config(4, 1, BLOCK_ROWS=1, BLOCK_COLUMNS=32), "wrong", "NaN pattern"),
        ),
    )
    return replace(made, **changes)


def stale(record: Record, **changes: str) -> Record:
    """The record as another version of the kernels or of Triton would have made it."""
    return replace(record, key=replace(record.key, **(changes or {"source": "0" * 16})))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "records"


@pytest.fixture
def known(tmp_path: Path) -> choose.Records:
    """Records to look into: nothing shipped, nothing of the user's, on an H200."""
    return choose.Records(Store(tmp_path / "shipped"), Store(tmp_path / "own"), "NVIDIA H200")


# The source of kernels.


def test_every_op_has_kernels_and_a_hash() -> None:
    for op in registry.OPS:
        found = kernel_hash.kernels_of(op)
        assert found, op.name
        assert all(name.startswith("convloom.kernels.") for name in found)
        assert len(kernel_hash.source_hash(op.name)) == kernel_hash.HASH_DIGITS


def test_the_kernels_of_an_op_are_found_through_modules_and_nested_calls() -> None:
    names = {name.rpartition(".")[2] for name in kernel_hash.kernels_of(CONV)}
    wanted = {"tile_kernel", "tap", "store", "gemm_kernel", "depthwise_kernel", "tile_index"}
    assert wanted <= names
    assert "softmax" not in str(names)


def test_the_hash_is_that_of_the_code_not_of_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = kernel_hash.kernels_of(CONV)
    kernel = next(found for name, found in kernels.items() if name.endswith(".tile_kernel"))
    before, text = kernel_hash.hash_of(CONV), kernel.src
    sources = {id(found): found.src for found in kernels.values()}
    assert before == kernel_hash.source_hash("conv2d")

    def now(changed: str) -> str:
        texts = sources | {id(kernel): changed}
        monkeypatch.setattr(type(kernel), "src", property(lambda self: texts[id(self)]))
        return kernel_hash.hash_of(CONV)

    assert "One tile of the output" in text
    assert now(text.replace("One tile of the output", "Another docstring")) == before
    assert now(f"{text}\n\n    # A comment.\n") == before
    assert now(f"{text}\n    changed = 1\n") != before


# Keys.


def test_a_key_says_what_matters_for_speed() -> None:
    key = key_of(conv(), SM_90)
    assert key.op == "conv2d" and key.attributes == "padding=1x1x1x1"
    assert key.inputs == ("float16 8x64x56x56 nhwc", "float16 64x64x3x3 dense")
    assert key.epilogue == ("add channel", "relu") and key.prologue == ()
    assert key.architecture == "sm_90" and key.aligned and not key.wide
    assert key.current == key and key.stale is None
    assert str(key) == "conv2d float16 8x64x56x56 * 64x64x3x3 -> 8x64x56x56 [add channel, relu]"
    assert key_of(replace(conv(), precision="tf32"), SM_90) == key, "fp16 has one precision"


def test_keys_differ_where_speed_may() -> None:
    problem = conv()
    strided = key_of(conv(pad=3), SM_90)
    assert not strided.aligned and strided != key_of(problem, SM_90)
    others = [
        strided,
        key_of(problem, INTERPRETER),
        key_of(conv(n=1), SM_90),
        key_of(replace(problem, epilogue=(Stage("add"),)), SM_90),
    ]
    digests = {key.digest for key in (key_of(problem, SM_90), *others)}
    assert len(digests) == 1 + len(others)
    eight = replace(problem.inputs[0], pitch=72, offset=8)
    assert key_of(replace(problem, inputs=(eight, problem.inputs[1])), SM_90).aligned


@pytest.mark.parametrize(
    ("shape", "layout", "kind"),
    [
        ((8, 64, 56, 56), Layout.NHWC, "full"),
        ((64, 1, 1), Layout.DENSE, "channel"),
        ((), Layout.DENSE, "scalar"),
        ((1, 1, 1), Layout.DENSE, "scalar"),
        ((8, 64, 1, 1), Layout.NHWC, "part"),
    ],
)
def test_operands_of_an_epilogue_are_told_by_kind(
    shape: tuple[int, ...], layout: Layout, kind: str
) -> None:
    operand = Operand.dense(TensorSpec(shape, torch.float32, layout))
    stages = (Stage("mul", literal=2.0), Stage("add"))
    problem = replace(conv(), epilogue=stages, operands=(operand,))
    assert key_of(problem, SM_90).epilogue == ("mul literal", f"add {kind}")


def test_distances() -> None:
    key = key_of(conv(), SM_90)
    assert keys.distance(key, key) == 0
    twice, four = key_of(conv(n=16), SM_90), key_of(conv(n=32), SM_90)
    assert 0 < keys.distance(key, twice) < keys.distance(key, four) < keys.NEAR
    assert keys.distance(key, twice) == keys.distance(twice, key)
    assert keys.distance(key, key_of(conv(n=128), SM_90)) > keys.NEAR
    strided = replace(key, attributes="stride=2x2")
    assert keys.distance(key, strided) == keys.OTHER_ATTRIBUTES
    for name, value in {
        "epilogue": (), "architecture": "sm_80", "aligned": False, "inputs": key.inputs[:1],
        "outputs": ("float32 8x64x56x56 nhwc",), "op": "linear",
    }.items():  # fmt: skip
        assert keys.distance(key, replace(key, **{name: value})) == float("inf"), name


# Reading.


def test_records_survive_their_file() -> None:
    record = record_of(conv())
    text = records.to_text(record)
    assert records.from_text(text) == record
    assert '"BLOCK_M": ' in text and json.loads(text)["time_us"] == 10.0
    assert all(len(line) < 160 for line in text.splitlines())


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "format": (lambda d: d.update(format="1"), "format: expected 1, got '1'"),
    "future": (lambda d: d.update(format=2), "a record from the future: format 2"),
    "past": (lambda d: d.update(format=0), "format: expected 1, got 0"),
    "no key": (lambda d: d.pop("key"), "expected an object with a format and a key"),
    "missing": (lambda d: d.pop("device"), "record: expected the field 'device'"),
    "unknown": (lambda d: d.update(speed=1), "record: expected no field 'speed'"),
    "status": (lambda d: d.update(status="guessed"), "expected one of measured, modelled"),
    "time": (lambda d: d.update(time_us=-1.0), "time_us: expected microseconds"),
    "zero": (lambda d: d.update(time_us=0), "time_us: expected microseconds"),
    "nan": (lambda d: d.update(time_us=float("nan")), "time_us: expected microseconds"),
    "text time": (lambda d: d.update(time_us="10"), "time_us: expected a value of type"),
    "true time": (lambda d: d.update(spread_us=True), "spread_us: expected a value"),
    "date": (lambda d: d.update(date="yesterday"), "date: expected ISO 8601"),
    "local date": (lambda d: d.update(date="2026-01-02"), "date: expected ISO 8601 with a time"),
    "complete": (lambda d: d.update(complete=1), "complete: expected a value"),
    "op": (lambda d: d["key"].update(op="../../etc"), "key.op: expected the name of an op"),
    "gpu": (lambda d: d["key"].update(architecture="sm_1"), "key.architecture: expected one of"),
    "tensor": (lambda d: d["key"].update(inputs=["8x64"]), "expected tensors such as"),
    "inputs": (lambda d: d["key"].update(inputs=[8]), "key.inputs[0]: expected a value"),
    "key": (lambda d: d["key"].update(extra=1), "key: expected no field 'extra'"),
    "warps": (lambda d: d["config"].update(num_warps=3), "num_warps: expected a power of two"),
    "stages": (lambda d: d["config"].update(num_stages=0), "num_stages: expected 1 to 16"),
    "block": (lambda d: d["config"].update(BLOCK_M=-1), "config.BLOCK_M: expected 0 to"),
    "block name": (lambda d: d["config"].update({"rm -rf": 1}), "config: expected sizes by name"),
    "block size": (lambda d: d["config"].update(BLOCK_M=1.5), "config: expected sizes by name"),
    "rejected": (lambda d: d.update(rejected=[1]), "rejected[0]: expected the field 'config'"),
    "stage": (lambda d: d["rejected"][0].update(stage="x"), "rejected[0].stage: expected one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_reading_is_strict(name: str) -> None:
    damage, message = DAMAGE[name]
    data = json.loads(records.to_text(record_of(conv())))
    damage(data)
    with pytest.raises(ArtifactError) as caught:
        records.from_json(data)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1", "[]", "3", '"x"', "{}", "[" * 100_000])
def test_other_files_are_no_records(text: str) -> None:
    with pytest.raises(ArtifactError, match="not a tuning record"):
        records.from_text(text)


# Files.


def test_a_store_keeps_one_file_for_each_key(folder: Path) -> None:
    first, second = record_of(conv()), record_of(conv(n=1))
    kept = Store(folder)
    assert kept.get(first.key) is None and kept.all() == []
    kept.put(first)
    kept.put(second)
    kept.put(replace(first, time_us=9.0))
    fresh = Store(folder)
    assert fresh.get(first.key) == replace(first, time_us=9.0)
    assert sorted(each.key.digest for each in fresh.of("sm_90", "conv2d")) == sorted(
        (first.key.digest, second.key.digest)
    )
    assert fresh.of("sm_80", "conv2d") == [] and len(list(fresh.files())) == 2
    assert kept.path(first.key) == folder / "sm_90" / "conv2d" / f"{first.key.digest}.json"
    assert not list(folder.rglob(".*")), "temporary files are left"


def _truncated(path: Path) -> None:
    path.write_text(path.read_text()[:200])


def _empty(path: Path) -> None:
    path.write_text("")


def _binary(path: Path) -> None:
    path.write_bytes(bytes(range(256)))


def _huge(path: Path) -> None:
    path.write_text(" " * (store.LARGEST_FILE + 1))


def _other_key(path: Path) -> None:
    path.write_text(records.to_text(record_of(conv(n=2))))


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [_truncated, _empty, _binary, _huge, _other_key, _folder])
def test_a_bad_file_is_a_miss_with_one_warning(
    damage: Callable[[Path], None], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = record_of(conv())
    Store(folder).put(record)
    path = Store(folder).path(record.key)
    damage(path)
    fresh = Store(folder)
    with caplog.at_level(logging.WARNING, "convloom"):
        assert fresh.get(record.key) is None and fresh.get(record.key) is None
        assert fresh.of("sm_90", "conv2d") == []
    (message,) = caplog.messages
    assert str(path) in message and "is ignored" in message
    if damage is not _folder:
        fresh.put(record)
        assert Store(folder).get(record.key) == record


def _write_many(folder: Path, writer: int, problem: Problem) -> None:
    kept = Store(folder)
    for turn in range(25):
        kept.put(record_of(problem, time_us=1.0 + writer + turn / 100))


def test_eight_writers_at_once_leave_whole_records(folder: Path) -> None:
    """A reader meanwhile sees some writer's record, never half of one."""
    problem = relu()
    record = record_of(problem)
    Store(folder).put(record)
    # Forked: they touch files only, and importing torch eight times takes a minute.
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=_write_many, args=(folder, number, problem)) for number in range(8)
    ]
    for writer in writers:
        writer.start()
    reads = 0
    while any(writer.is_alive() for writer in writers):
        assert store.read(Store(folder).path(record.key)).key == record.key
        reads += 1
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 8 and reads
    assert Store(folder).get(record.key) is not None
    assert len(list(folder.rglob("*"))) == 3, "two folders and one file"


def _fails(number: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize(
    ("number", "call", "advice"),
    [
        (errno.ENOSPC, "fsync", "Free some space"),
        (errno.EDQUOT, "fsync", "Free some space"),
        (errno.EROFS, "replace", "CONVLOOM_CACHE_DIR"),
        (errno.EACCES, "replace", "CONVLOOM_CACHE_DIR"),
    ],
)
def test_a_record_that_cannot_be_written_changes_nothing(
    number: int, call: str, advice: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = record_of(conv())
    Store(folder).put(record)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, _fails(number))
        with pytest.raises(ArtifactError, match="cannot write tuning record") as caught:
            Store(folder).put(replace(record, time_us=1.0))
    assert os.strerror(number) in str(caught.value) and advice in str(caught.value)
    assert Store(folder).get(record.key) == record
    assert not list(folder.rglob(".*")), "temporary files are left"


def _write_beyond_the_limit(folder: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
    try:
        Store(folder).put(record_of(conv()))
    except ArtifactError:
        os._exit(7)


def test_a_disk_that_takes_half_a_record_has_none(folder: Path) -> None:
    """The kernel itself refuses the rest of the file."""
    writer = multiprocessing.get_context("fork").Process(
        target=_write_beyond_the_limit, args=(folder,)
    )
    writer.start()
    writer.join()
    assert writer.exitcode == 7
    assert [path for path in folder.rglob("*") if path.is_file()] == []


def test_a_record_may_be_deleted_twice(folder: Path) -> None:
    """By two processes that prune the same folder."""
    store = Store(folder)
    store.put(record_of(conv()))
    (path,) = folder.rglob("*.json")
    store.remove(path)
    store.remove(path)
    assert not path.exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"Pass --to FOLDER, or set CONVLOOM_CACHE_DIR"):
        Store(tmp_path / "file" / "records").put(record_of(conv()))
    assert Store(tmp_path / "file" / "records").all() == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(folder: Path) -> None:
    record = record_of(conv())
    Store(folder).put(record)
    os.chmod(Store(folder).path(record.key).parent, 0o555)
    with pytest.raises(ArtifactError, match="Permission denied"):
        Store(folder).put(replace(record, time_us=1.0))
    assert Store(folder).get(record.key) == record


def test_the_shipped_records_are_valid() -> None:
    shipped = Store(store.SHIPPED)
    for path in shipped.files():
        assert store.read(path).key.of_other_kernels is None, path


# Choosing.


def source_of(known: choose.Records, problem: Problem) -> str:
    """Where the problem's configuration comes from."""
    op = registry.get(problem.op)
    choice = known.choose(op, problem, SM_90)
    assert rank.illegal_reason(op, problem, choice.config, SM_90) is None
    return choice.source


def test_without_records_the_default_is_chosen(known: choose.Records) -> None:
    problem = conv()
    choice = known.choose(CONV, problem, SM_90)
    assert choice == choose.Choice(CONV.default(problem, SM_90), "heuristic")
    assert known.choose(CONV, problem, REFERENCE).source == "heuristic"


def test_shipped_records_come_before_the_users_unless_those_are_better(
    known: choose.Records,
) -> None:
    shipped = record_of(conv(), time_us=10.0)
    known.shipped.put(shipped)
    assert source_of(known, conv()) == "record: measured 10.0 us on NVIDIA H200"
    known.own.put(record_of(conv(), time_us=11.0))
    assert known.exact(shipped.key) == shipped
    known.own.put(record_of(conv(), status="modelled", time_us=1.0))
    assert known.exact(shipped.key) == shipped
    known.own.put(record_of(conv(), time_us=9.0))
    assert source_of(known, conv()) == "record: measured 9.0 us on NVIDIA H200"
    known.own.put(record_of(conv(), time_us=9.0, device="NVIDIA H100 PCIe"))
    assert known.exact(shipped.key) == shipped, "measured on this device"


def test_modelled_records_say_so(known: choose.Records) -> None:
    known.own.put(record_of(conv(), status="modelled"))
    assert source_of(known, conv()) == "record: modelled"


def test_the_nearest_shape_lends_its_configuration(known: choose.Records) -> None:
    known.own.put(record_of(conv(n=16), time_us=16.0))
    known.own.put(record_of(conv(n=32), time_us=32.0))
    expected = "nearest record, float16 16x64x56x56 nhwc: measured 16.0 us on NVIDIA H200"
    assert source_of(known, conv()) == expected
    assert source_of(known, conv(n=128)) != "heuristic"
    assert source_of(known, conv(n=1, size=7)) == "heuristic", "too far away"
    assert known.choose(CONV, conv(), parse("cuda:sm_80")).source == "heuristic"


def test_a_neighbour_whose_configuration_does_not_fit_is_passed_over(
    known: choose.Records,
) -> None:
    near, far = conv(n=16), conv(n=32)
    known.own.put(record_of(near, config(4, 9, BLOCK_M=7)))
    known.own.put(record_of(far))
    assert "float16 32x64x56x56" in source_of(known, conv())


def test_a_record_outside_the_tuning_space_is_not_used(
    known: choose.Records, caplog: pytest.LogCaptureFixture
) -> None:
    known.own.put(record_of(conv(), config(8, 3, BLOCK_M=128, BLOCK_N=128, BLOCK_K=64, GROUP_M=8)))
    with caplog.at_level(logging.WARNING, "convloom"):
        assert source_of(known, conv()) == "heuristic"
        source_of(known, conv())
    (message,) = caplog.messages
    assert "is not used" in message and "is not in the tuning space of conv2d" in message


@pytest.mark.parametrize("change", [{"source": "0" * 16}, {"triton": "3.5.0"}], ids=str)
def test_stale_records_are_hints_that_the_model_ranks(
    change: dict[str, str], known: choose.Records, caplog: pytest.LogCaptureFixture
) -> None:
    problem = conv()
    default = CONV.default(problem, SM_90)
    ranked = rank.rank(CONV, problem, SM_90, rank.space(CONV, problem, SM_90))
    slowest = ranked[-1].config
    known.own.put(stale(record_of(problem, slowest, time_us=0.1), **change))
    with caplog.at_level(logging.WARNING, "convloom"):
        choice = known.choose(CONV, problem, SM_90)
        known.choose(CONV, problem, SM_90)
    assert choice == choose.Choice(default, "heuristic (a stale record ranks behind it)")
    (message,) = caplog.messages
    assert "are stale" in message and "only hints" in message
    better = rank.rank(CONV, problem, SM_90, [default, ranked[0].config])[0].config
    fresh = choose.Records(known.shipped, Store(known.own.folder))
    fresh.own.put(stale(record_of(problem, better), **change))
    assert fresh.choose(CONV, problem, SM_90).config == better


def test_stale_records_are_no_neighbours(known: choose.Records) -> None:
    known.own.put(stale(record_of(conv(n=16))))
    assert source_of(known, conv()) == "heuristic"


# Merging and pruning.


@pytest.fixture
def theirs(tmp_path: Path) -> Iterator[Store]:
    yield Store(tmp_path / "theirs")


def outcomes(results: list[store.Merged]) -> list[str]:
    return [each.outcome for each in results]


def test_merging_keeps_the_better_record(folder: Path, theirs: Store) -> None:
    record = record_of(conv())
    ours = Store(folder)
    merge = partial(store.merge, ours, [theirs.folder])
    theirs.put(replace(record, status="modelled", time_us=1.0))
    assert outcomes(merge()) == ["added"]
    theirs.put(record)
    assert outcomes(merge()) == ["better"], "measured beats modelled"
    theirs.put(replace(record, time_us=11.0))
    assert outcomes(merge()) == ["kept"]
    theirs.put(replace(record, time_us=5.0, complete=False))
    assert outcomes(merge()) == ["kept"], "an interrupted search has not seen the best yet"
    theirs.put(replace(record, time_us=9.0))
    assert outcomes(merge()) == ["better"]
    assert Store(folder).get(record.key) == replace(record, time_us=9.0)


def test_merging_refuses_what_is_no_record(folder: Path, theirs: Store, tmp_path: Path) -> None:
    theirs.put(stale(record_of(conv())))
    theirs.put(stale(record_of(conv()), triton="3.5.0"))
    (theirs.folder / "notes.json").write_text("[]")
    results = store.merge(Store(folder), [theirs.folder])
    assert sorted(outcomes(results)) == ["added", "refused", "refused"]
    reasons = " ".join(each.reason for each in results)
    assert "not a tuning record" in reasons and "kernels of conv2d have changed since" in reasons
    with pytest.raises(ArtifactError, match="no such file or folder"):
        store.merge(Store(folder), [tmp_path / "missing"])
    future = tmp_path / "future.json"
    future.write_text('{"format": 99, "key": {}}')
    (refused,) = store.merge(Store(folder), [future])
    assert refused.outcome == "refused" and "Update convloom" in refused.reason


def test_pruning_drops_stale_and_damaged_records_only(folder: Path) -> None:
    ours = Store(folder)
    good, old = record_of(conv()), stale(record_of(conv(n=1)))
    other = stale(record_of(conv(n=2)), triton="3.5.0")
    for each in (good, old, other):
        ours.put(each)
    damaged = ours.path(good.key).with_name("damaged.json")
    damaged.write_text("{")
    future = ours.path(good.key).with_name("future.json")
    future.write_text('{"format": 99, "key": {}}')
    dropped = store.prune(Store(folder))
    assert {each.path for each in dropped} == {ours.path(old.key), ours.path(other.key), damaged}
    assert all(each.reason for each in dropped)
    assert {*Store(folder).files()} == {ours.path(good.key), future}


def test_listing(known: choose.Records) -> None:
    known.shipped.put(record_of(conv()))
    known.own.put(stale(record_of(relu())))
    found = choose.listed(known)
    assert [(origin, stale is None) for _, origin, stale in found] == [
        ("shipped", True), ("yours", False),
    ]  # fmt: skip
    assert [record.key.op for record, _, _ in choose.listed(known, "relu")] == ["relu"]
    with pytest.raises(InvalidInputError, match="unknown op 'conv'; did you mean"):
        choose.listed(known, "conv")
