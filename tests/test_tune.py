"""The tuner: what it tries, what it believes, what it survives; on a device that is made up, in the
interpreter, and by the model."""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import convloom
import pytest
import torch
from convloom.compiler.plan.plan import KernelStep
from convloom.compiler.records import choose, rank
from convloom.compiler.records.keys import key_of
from convloom.compiler.records.records import shortened
from convloom.compiler.records.store import Store
from convloom.compiler.run.workers import Crew, WorkerError, WorkerProcess
from convloom.compiler.tuning import bench, search
from convloom.compiler.tuning.bench import Bench, InterpreterBackend, Trial
from convloom.compiler.tuning.search import Options, Outcome, Tuner, Work
from convloom.compiler.tuning.timers import Measured, Model
from convloom.errors import KernelError, TargetUnavailableError
from convloom.kernels import registry
from convloom.kernels.contract import cost_model
from convloom.kernels.contract.epilogue import Stage
from convloom.kernels.contract.op import Config, Problem
from convloom.kernels.contract.spec import TensorSpec
from convloom.kernels.contract.targets import GPU_TARGETS, INTERPRETER, Target
from convloom.kernels.devices.offline import KernelReport
from convloom.kernels.products.linear import Linear
from torch import nn

from . import harness
from .domains import domain_of
from .nets import make
from .test_records import SM_90, conv, record_of, relu, stale

Answer = Trial | WorkerError | BaseException
X = (2, 3, 8, 8)


class Device:
    """A made-up device with a child's interface: answers by configuration, remembers what it was
    asked. dead: nothing is answered after a fault."""

    def __init__(self, answer: Callable[[Problem, Config], Answer], dead: bool = False) -> None:
        self.answer, self.dead = answer, dead
        self.asked: list[Config] = []
        self.faulted = self.closed = False

    def ask(self, request: Any, timeout_s: float) -> Any:
        if self.dead and self.faulted:
            raise WorkerError("died", "no such device")
        if request is None:
            return "Made-up GPU", "1.0"
        self.asked.append(request[1])
        found = self.answer(*request)
        if isinstance(found, BaseException):
            self.faulted = True
            raise found
        return found

    def close(self) -> None:
        self.closed = True


def faster_in_turn() -> Callable[[Problem, Config], Answer]:
    """Every trial is a bit faster than the one before it."""
    left = iter(range(1000, 0, -1))
    return lambda problem, tile: Trial(None, float(next(left)), 0.1, 1.0)


def work_of(problem: Problem, target: Target = INTERPRETER, uses: int = 1) -> Work:
    op = registry.get(problem.op)
    return Work(op, problem, target, key_of(problem, target), uses)


@pytest.fixture
def known(tmp_path: Path) -> choose.Records:
    return choose.Records(Store(tmp_path / "shipped"), Store(tmp_path / "own"))


def tune(
    known: choose.Records, device: Device, *works: Work, **options: Any
) -> tuple[list[Outcome], Tuner]:
    tuner = Tuner(known, Measured(lambda: device), Options(**options))
    return tuner.run(works), tuner


def afresh(known: choose.Records) -> choose.Records:
    """The same folders, as another process sees them."""
    return choose.Records(Store(known.shipped.folder), Store(known.own.folder))


# The search.


def test_reasons_are_one_line_of_at_most_400_characters() -> None:
    assert shortened("too\n  long ") == "too long"
    assert shortened("x" * 400) == "x" * 400
    assert shortened("x" * 401) == "x" * 397 + "..."


def test_the_fastest_candidate_becomes_the_record(known: choose.Records) -> None:
    work = work_of(relu())
    device = Device(faster_in_turn())
    (outcome,), tuner = tune(known, device, work, candidates=5)
    default = work.op.default(work.problem, INTERPRETER)
    assert device.asked[0] == default and len(set(device.asked)) == 5 and device.closed
    assert outcome.status == "tuned" and outcome.default_us == 1000.0
    record = afresh(known).own.get(work.key)
    assert record is not None and record == outcome.record
    assert record.config == device.asked[-1] and record.time_us == 996.0 and record.complete
    assert (record.device, record.driver, record.status) == ("Made-up GPU", "1.0", "measured")
    assert {(each.stage, each.time_us) for each in record.rejected} == {
        ("slower", time_us) for time_us in (997.0, 998.0, 999.0, 1000.0)
    }
    choice = afresh(known).choose(work.op, work.problem, INTERPRETER)
    assert choice == choose.Choice(record.config, "record: measured 996.0 us on Made-up GPU")
    assert tuner.unsaved is None and not tuner.out_of_time


FAULTS: dict[str, tuple[Answer, str, str]] = {
    "wrong": (Trial("output 0: NaN pattern differs"), "wrong", "NaN pattern"),
    "error": (WorkerError("error", "out of GPU memory"), "fault", "out of GPU memory"),
    "fault": (WorkerError("died", "illegal memory access"), "fault", "illegal memory access"),
    "hang": (WorkerError("timeout", "no answer after 180 s"), "fault", "no answer"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_bad_candidate_is_recorded_and_ends_nothing(kind: str, known: choose.Records) -> None:
    answer, stage, reason = FAULTS[kind]
    fine = faster_in_turn()
    work = work_of(relu())
    bad = rank.space(work.op, work.problem, INTERPRETER)[0]
    device = Device(lambda problem, tile: answer if tile == bad else fine(problem, tile))
    (outcome,), _ = tune(known, device, work, candidates=4)
    assert outcome.status == "tuned" and outcome.default_us is None
    assert outcome.record is not None and outcome.record.config != bad
    (rejected,) = (each for each in outcome.record.rejected if each.config == bad)
    assert rejected.stage == stage and reason in rejected.reason and rejected.time_us is None
    assert len(device.asked) == 4


def test_a_lost_device_is_no_fault_of_the_candidates(known: choose.Records) -> None:
    works = work_of(relu()), work_of(relu(8, 64))
    fine = faster_in_turn()
    bad = rank.space(works[0].op, works[0].problem, INTERPRETER)[0]

    def answer(problem: Problem, tile: Config) -> Answer:
        if problem == works[1].problem and tile == bad:
            return WorkerError("died", "fell off the bus")
        return fine(problem, tile)

    with pytest.raises(KernelError, match=r"cannot be used any more: no such device .*off the bus"):
        tune(known, Device(answer, dead=True), *works)
    first, second = (afresh(known).own.get(work.key) for work in works)
    assert first is not None and not first.complete and second is None


def test_nothing_right_leaves_no_record(
    known: choose.Records, caplog: pytest.LogCaptureFixture
) -> None:
    device = Device(lambda problem, tile: Trial("element (0, 1): got 3, expected 4"))
    with caplog.at_level(logging.WARNING, "convloom"):
        (outcome,), _ = tune(known, device, work_of(relu()), candidates=3)
    assert outcome.status == "failed" and outcome.record is None and known.own.all() == []
    assert "no configuration of relu" in caplog.text and "got 3, expected 4" in caplog.text


def test_no_device(known: choose.Records) -> None:
    device = Device(faster_in_turn(), dead=True)
    device.faulted = True
    with pytest.raises(TargetUnavailableError, match="cannot measure here: no such device"):
        tune(known, device, work_of(relu()))


def test_every_problem_gets_a_quick_look_before_one_gets_all(known: choose.Records) -> None:
    seen: list[Problem] = []

    def answer(problem: Problem, tile: Config) -> Answer:
        seen.append(problem)
        return Trial(None, 5.0, 0.0)

    works = work_of(relu()), work_of(relu(8, 64))
    tune(known, Device(answer), *works, candidates=search.FIRST_LOOK + 1)
    order = [works.index(next(w for w in works if w.problem == problem)) for problem in seen]
    assert order == [0] * search.FIRST_LOOK + [1] * search.FIRST_LOOK + [0, 1]


def interrupted_after(count: int) -> Device:
    fine = faster_in_turn()
    turns = iter(range(count))

    def answer(problem: Problem, tile: Config) -> Answer:
        return KeyboardInterrupt() if next(turns, None) is None else fine(problem, tile)

    return Device(answer)


def test_an_interrupt_keeps_the_best_and_the_next_run_goes_on(known: choose.Records) -> None:
    work = work_of(relu())
    first = interrupted_after(4)
    tuner = Tuner(known, Measured(lambda: first), Options(candidates=6))
    with pytest.raises(KeyboardInterrupt):
        tuner.run([work])
    assert first.closed and [each.status for each in tuner.outcomes] == ["started"]
    record = afresh(known).own.get(work.key)
    assert record is not None and not record.complete and record.config == first.asked[3]
    second = Device(faster_in_turn())
    (outcome,), _ = tune(afresh(known), second, work, candidates=6)
    assert outcome.status == "tuned" and len(second.asked) == 2
    assert not set(second.asked) & set(first.asked[:4])
    third = Device(faster_in_turn())
    (outcome,), _ = tune(afresh(known), third, work, candidates=6)
    assert outcome.status == "kept" and third.asked == []
    fourth = Device(faster_in_turn())
    (outcome,), _ = tune(afresh(known), fourth, work, candidates=6, retune=True)
    assert outcome.status == "tuned" and len(fourth.asked) == 6


def test_retuning_that_is_interrupted_does_not_lose_what_was_finished(
    known: choose.Records,
) -> None:
    work = work_of(relu())
    tune(known, Device(faster_in_turn()), work, candidates=4)
    finished = afresh(known).own.get(work.key)
    with pytest.raises(KeyboardInterrupt):
        tune(afresh(known), interrupted_after(2), work, candidates=4, retune=True)
    assert finished is not None and afresh(known).own.get(work.key) == finished


def test_the_budget_ends_the_run_with_the_best_so_far(known: choose.Records) -> None:
    fine = faster_in_turn()

    def slow(problem: Problem, tile: Config) -> Answer:
        time.sleep(0.2)
        return fine(problem, tile)

    works = work_of(relu()), work_of(relu(8, 64)), work_of(relu(16, 64))
    outcomes, tuner = tune(known, Device(slow), *works, budget_s=0.9)
    assert tuner.out_of_time
    assert [each.status for each in outcomes] == ["started", "started", "waiting"]
    assert outcomes[0].record is not None and outcomes[2].record is None


def test_a_trial_cut_short_by_the_budget_is_no_fault(known: choose.Records) -> None:
    device = Device(lambda problem, tile: WorkerError("timeout", "no answer"))
    (outcome,), tuner = tune(known, device, work_of(relu()), budget_s=5.0)
    assert tuner.out_of_time and outcome.status == "started" and outcome.record is None
    assert len(device.asked) == 1


def test_records_that_cannot_be_written_still_count_in_this_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    known = choose.Records(Store(tmp_path / "shipped"), Store(tmp_path / "file" / "own"))
    work = work_of(relu())
    with caplog.at_level(logging.WARNING, "convloom"):
        (outcome,), tuner = tune(known, Device(faster_in_turn()), work, candidates=3)
    assert outcome.status == "tuned" and tuner.unsaved is not None
    assert len(caplog.messages) == 1 and "cannot write tuning record" in caplog.text
    assert known.choose(work.op, work.problem, INTERPRETER).source.startswith("record: measured")


def test_a_model_never_replaces_a_measurement(known: choose.Records) -> None:
    work = work_of(relu(), SM_90)
    known.own.put(record_of(relu(), time_us=50.0))
    for retune in (False, True):
        tuner = Tuner(known, Model(SM_90), Options(retune=retune))
        assert [each.status for each in tuner.run([work])] == ["kept"]


def test_a_measurement_replaces_a_model(known: choose.Records) -> None:
    work = work_of(relu())
    modelled = record_of(relu(), status="modelled", key=work.key)
    known.own.put(replace(modelled, config=work.op.default(work.problem, INTERPRETER)))
    (outcome,), _ = tune(known, Device(faster_in_turn()), work, candidates=2)
    assert outcome.status == "tuned" and outcome.record is not None
    assert outcome.record.is_measured


def test_stale_records_name_candidates(known: choose.Records) -> None:
    """What was fast with other kernels is tried, wherever the model puts it."""
    work = work_of(relu())
    last = rank.rank(work.op, work.problem, INTERPRETER, rank.space(*_problem(work)))[-1].config
    known.own.put(stale(record_of(relu(), last, key=work.key)))
    device = Device(faster_in_turn())
    tune(known, device, work, candidates=3)
    assert device.asked[1] == last


def _problem(work: Work) -> tuple[Any, Problem, Target]:
    return work.op, work.problem, work.target


def test_works_are_distinct_and_the_heaviest_come_first() -> None:
    layers = {name: nn.Conv2d(3, 3, 3, padding=1) for name in ("one", "two", "three")}
    module, inputs = make(
        lambda m, x: m.last(torch.tanh(m.three(torch.tanh(m.two(torch.tanh(m.one(x))))))), X,
        last=nn.Conv2d(3, 40, 3), **layers,
    )  # fmt: skip
    plan = convloom.compile(module, inputs, target="interpreter", tuning="heuristic").plan
    works = search.works_for(2 * search.problems_of(plan))
    steps = [step for step in plan.steps if isinstance(step, KernelStep)]
    assert sum(work.uses for work in works) == 2 * len(steps) > 2 * len(works)
    assert [w.weight for w in works] == sorted((w.weight for w in works), reverse=True)


# The model.


def test_every_configuration_of_every_op_has_a_modelled_time() -> None:
    for op in registry.OPS:
        case = next(
            found
            for draw in _draws(op)
            if (found := harness.case_of(op, draw, torch.float16)) is not None
        )
        problem = harness.problem_for(op, case.attributes, case.specs)
        for target in (GPU_TARGETS[0], SM_90):
            space = rank.space(op, problem, target)
            assert space[0] == op.default(problem, target) and len(set(space)) == len(space)
            ranked = rank.rank(op, problem, target, space)
            assert {each.config for each in ranked} == set(space)
            assert 0 < ranked[0].time_us <= ranked[-1].time_us < 1e6, op.name
            launches = op.launches(problem, space[0], target)
            assert len(rank.requests(op, problem, launches, target)) == len(launches)


def _draws(op: Any) -> Iterator[dict[str, Any]]:
    import random

    generator = random.Random(op.name)
    for _ in range(200):
        yield {name: generator.choice(list(v)) for name, v in domain_of(op).ranges.items()}


def test_the_model_prefers_what_the_guide_says() -> None:
    op, problem = registry.get("conv2d"), conv(n=32)

    def time_us(report: KernelReport | None = None, **tile: int) -> float:
        sizes = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "GROUP_M": 8, **tile}
        stages = sizes.pop("stages", 3)
        made = Config(tuple(sizes.items()), 4, stages)
        return rank.modelled_us(op, problem, SM_90, made, report and [report])

    assert time_us() < time_us(BLOCK_M=16), "small tiles read their operands more often"
    small = {"BLOCK_M": 32, "BLOCK_N": 32}
    assert time_us(**small) < time_us(BLOCK_K=16, **small), "short steps cost more of them"
    assert time_us() < time_us(BLOCK_N=256), "half the tile would be padding"
    small = KernelReport(128, 0, 70_000)
    large = KernelReport(128, 0, 140_000)
    assert time_us(small, stages=2) < time_us(large, stages=2), "one block at a time has no company"


def test_occupancy_is_the_least_of_all_limits() -> None:
    hopper = cost_model.MACHINES[90]
    (launch,) = registry.get("conv2d").launches(
        conv(), registry.get("conv2d").default(conv(), SM_90), SM_90
    )
    four_warps = replace(launch, num_warps=4)
    limits = {(32, 0): 16, (255, 0): 2, (168, 0): 3, (32, 100_000): 2, (32, 227_000): 1}
    for (registers, shared), blocks in limits.items():
        report = KernelReport(registers, 0, shared)
        held = cost_model.resident(hopper, four_warps, torch.float16, report)
        assert held == blocks, (registers, shared)
    ampere = cost_model.MACHINES[86]
    assert cost_model.resident(ampere, four_warps, torch.float16, KernelReport(32, 0, 0)) == 12


def test_padding_and_spills_are_refused() -> None:
    op, problem = registry.get("conv2d"), conv(n=1, k=16, size=7)
    space = rank.space(op, problem, SM_90)
    kept, rejected = rank.screened(op, problem, SM_90)
    wasteful = {config: why for config, (stage, why) in rejected.items() if stage == "waste"}
    assert wasteful and all("is possible" in reason for reason in wasteful.values())
    assert {*kept, *rejected} == set(space) and {stage for stage, _ in rejected.values()} <= {
        "illegal", "waste"
    }
    assert min(c["BLOCK_M"] * c["BLOCK_N"] for c in wasteful) > min(
        c["BLOCK_M"] * c["BLOCK_N"] for c in kept
    )
    launches = op.launches(problem, space[0], SM_90)
    assert rank.refused(SM_90, launches, [KernelReport(64, 0, 1024)]) is None
    for report, stage in (
        (KernelReport(64, 88, 1024), "spills"),
        (KernelReport(64, 0, 300_000), "resources"),
    ):
        assert (rank.refused(SM_90, launches, [report]) or ("",))[0] == stage


def test_sharing_a_sum_among_programs_is_no_padding() -> None:
    op = registry.get("linear")
    x, w = TensorSpec((16, 4096), torch.float16), TensorSpec((1024, 4096), torch.float16)
    problem = harness.problem_for(op, Linear(), (x, w))
    split = [c for c in rank.space(op, problem, SM_90) if dict(c.blocks).get("SPLIT", 1) > 1]
    assert split
    for tile in split:
        if tile["BLOCK_M"] == 16:
            (launch,) = op.launches(problem, tile, SM_90)
            assert cost_model.padding(launch, tile, problem) == 1.0


def test_candidates_have_tiles_of_several_sizes() -> None:
    op, problem = registry.get("conv2d"), conv()
    ranked = rank.rank(op, problem, SM_90, rank.space(op, problem, SM_90))
    sizes = {(c["BLOCK_M"], c["BLOCK_N"]) for c in rank.varied(op, problem, SM_90, ranked, 9)}
    assert len(sizes) >= 3
    assert rank.varied(op, problem, SM_90, ranked, 999)[0] == ranked[0].config


# Verification.


def fc(prologue: bool = False) -> Problem:
    """A linear layer with bias; with a prologue over its channels where asked for."""
    x, w = TensorSpec((5, 24), torch.float16), TensorSpec((16, 24), torch.float16)
    bias = TensorSpec((16,), torch.float32)
    made = harness.problem_for(
        registry.get("linear"), Linear(), (x, w), (Stage("add"),), (bias,), pad=3
    )
    if not prologue:
        return made
    vector = harness.place(TensorSpec((24,), torch.float16))
    return replace(made, prologue=(Stage("mul"), Stage("relu")), prologue_operands=(vector,))


@pytest.mark.interpreter
@pytest.mark.parametrize("prologue", [False, True])
def test_right_results_are_believed(prologue: bool) -> None:
    problem = fc(prologue)
    backend = InterpreterBackend()
    for tile in rank.space(registry.get("linear"), problem, SM_90)[:2]:
        trial = backend.trial(problem, tile)
        assert trial.wrong is None and trial.time_us > 0 and trial.warm_us is None


@pytest.mark.interpreter
@pytest.mark.parametrize("fault", ["one wrong pixel", "an output left out", "a write outside"])
def test_wrong_results_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = bench._interpreted_us

    def faulty(bound: Any, batch: int) -> float:
        (output,) = (tensor for ref, tensor in bound[0][1].items() if ref.kind == "output")
        spent = run(bound, batch)
        if fault == "one wrong pixel":
            output[problem.output.offset] += 1.0
        elif fault == "a write outside":
            output[0] = 0.0
        else:
            output.fill_(float("nan"))
        return spent

    problem = fc()
    monkeypatch.setattr(bench, "_interpreted_us", faulty)
    trial = InterpreterBackend().trial(problem, registry.get("linear").default(problem, SM_90))
    expected = {
        "one wrong pixel": "element (0, 0): got",
        "an output left out": "NaN pattern differs",
        "a write outside": "something outside of it was written",
    }
    assert trial.wrong is not None and expected[fault] in trial.wrong


def test_large_results_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CHUNK", 16)
    made = Bench(fc(), torch.device("cpu"))
    buffers = made.buffers()
    output = next(tensor for ref, tensor in buffers.items() if ref.kind == "output")
    logical = torch.as_strided(
        output, made.problem.output.shape, made.problem.output.strides, made.problem.output.offset
    )
    logical.copy_(made._exact[0])
    assert made.wrong(dict(buffers)) is None
    logical.copy_(made._exact[0])
    logical[3, 2] += 1.0
    assert "part 3 of 5: element (0, 2)" in str(made.wrong(buffers))


# Processes.


def test_a_child_survives_errors_and_is_replaced_after_a_crash() -> None:
    child = WorkerProcess(partial(eval, "lambda code: eval(code)"))
    assert child.ask("6 * 7", 60) == 42
    with pytest.raises(WorkerError, match="division by zero") as caught:
        child.ask("1 / 0", 60)
    assert caught.value.kind == "error"
    pid = child.ask("__import__('os').getpid()", 60)
    for crash, words in {
        "__import__('os')._exit(3)": "exit status 3",
        "print('last words', flush=True) or __import__('os').abort()": "SIGABRT: last words",
        "__import__('ctypes').string_at(0)": "signal SIGSEGV",
    }.items():
        with pytest.raises(WorkerError, match=words) as caught:
            child.ask(crash, 60)
        assert caught.value.kind == "died"
    assert child.ask("__import__('os').getpid()", 60) != pid
    child.close()
    child.close()


def test_a_child_that_hangs_or_is_poisoned_is_ended() -> None:
    child = WorkerProcess(partial(eval, "lambda code: eval(code)"))
    with pytest.raises(WorkerError, match="no answer after 0 s") as caught:
        child.ask("__import__('time').sleep(60)", 0.2)
    assert caught.value.kind == "timeout"
    poison = (
        "(_ for _ in ()).throw(__import__('convloom.compiler.run.workers', fromlist=['x'])"
        ".PoisonedError('illegal address'))"
    )
    with pytest.raises(WorkerError, match="illegal address") as caught:
        child.ask(poison, 60)
    assert caught.value.kind == "died" and child.ask("1 + 1", 60) == 2
    child.close()


def test_a_child_that_cannot_start_says_why() -> None:
    child = WorkerProcess(partial(operator.truediv, 1, 0))
    for _ in range(2):
        with pytest.raises(WorkerError, match="division by zero"):
            child.ask(None, 60)


def test_a_crew_shares_work_and_drops_it_when_closed() -> None:
    crew = Crew(partial(eval, "lambda code: eval(code)"), workers=2, timeout_s=60)
    futures = [crew.submit(f"{number} ** 2") for number in range(6)]
    assert [future.result() for future in futures] == [0, 1, 4, 9, 16, 25]
    endless = [crew.submit("__import__('time').sleep(60)") for _ in range(4)]
    started = time.monotonic()
    time.sleep(0.3)
    crew.close()
    assert time.monotonic() - started < 30
    assert all(future.cancelled() or future.exception() for future in endless)


# The model as judge: compiled for a GPU that is not here.


def test_offline_tuning_compiles_ranks_and_says_modelled(
    known: choose.Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One candidate does not compile: recorded, and no more."""
    work = work_of(relu(), SM_90)
    real, bad = rank.requests, rank.space(*_problem(work))[1]

    def requests(op: Any, problem: Problem, launches: Any, target: Target) -> Any:
        made = real(op, problem, launches, target)
        tile = launches[0].constexprs["TILE"]
        if bad["BLOCK_COLUMNS"] != tile.N:
            return made
        broken = {**dict(made[0].constexprs), "TILE": tile._replace(N=48)}
        return [replace(made[0], constexprs=tuple(sorted(broken.items(), key=lambda i: i[0])))]

    monkeypatch.setattr(rank, "requests", requests)
    tuner = Tuner(known, Model(SM_90), Options(candidates=4, workers=1))
    monkeypatch.setattr(rank, "varied", lambda *_: [bad, *rank.space(*_problem(work))[5:8]])
    (outcome,) = tuner.run([work])
    record = afresh(known).own.get(work.key)
    assert outcome.status == "tuned" and record is not None
    assert record.status == "modelled" and record.device == "model" and record.complete
    failed = {each.config: each.reason for each in record.rejected if each.stage == "compile"}
    assert bad in failed and "does not compile for sm_90" in failed[bad]
    choice = afresh(known).choose(work.op, work.problem, SM_90)
    assert choice.source == "record: modelled"


def test_the_model_needs_a_reason_to_leave_the_default(known: choose.Records) -> None:
    state = search._State(work_of(relu(), SM_90))
    state.selected = list(rank.space(*_problem(state.work))[:2])
    state.times = dict(zip(state.selected, (Trial(None, 10.0), Trial(None, 9.9)), strict=True))
    assert state.best(Model.margin) == state.default
    assert state.best(Measured.margin) == state.selected[1]
