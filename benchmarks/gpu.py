"""Everything a machine with a GPU is needed for: `make gpu`, or `python -m benchmarks.gpu`.

Runs the tests that need a GPU, measures the cost model's constants and how well it ranks, loads
files that were built without a GPU, profiles three networks, tunes the zoo and runs the benchmark.
Each stage is a process of its own: one that fails, faults or hangs is recorded with the end of its
output, and the next goes on (`--only NAME` runs some of them). A call ends within its
budget, and the next one goes on where it stopped (state.json in the output folder; `--restart`
after the sources changed). Needs no network and no installation, only torch, triton and what
convloom itself imports.

Reports go to benchmarks/results/GPU, records to kernels/records: commit both.
Exit status: 0 everything done, 1 some stage failed, 3 unfinished: call again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from .gpu_state import (
    DONE,
    FAILED,
    SKIPPED,
    UNFINISHED,
    Entry,
    Stage,
    is_open,
    read_state,
    write_state,
)

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "kernels" / "records"
INSTALLED = importlib.util.find_spec("convloom") is not None
"""Whether this process and those it starts find the package by its name."""
BUDGET_S = 540.0
LEAST_S = 20.0
"""A stage is not started with less time left than this."""
MARGIN_S = 15.0
"""Of a tuning stage, for what it does after its own budget is spent."""
TAIL_LINES = 40
EXIT_DONE, EXIT_FAILED, EXIT_UNFINISHED = 0, 1, 3
PROFILED = ("resnet50", "mobilenet_v2", "inception_v3")
SAVED = ("resnet50", "mobilenet_v2", "lenet5")
SAVED_BATCH = 32
NEEDED = ("torch", "triton", "numpy", "networkx", "safetensors", "rich")
FOR_TESTS = ("pytest", "hypothesis", "sklearn", "PIL")


def stages(options: argparse.Namespace, output: Path) -> Iterator[Stage]:
    """The stages, in order: a file, correctness, constants, profiles, then records and figures
    model by model, so that what was tuned has been measured when time runs out."""
    batches = [str(batch) for batch in options.batch]
    common = ["--dtype", options.dtype, "--target", options.target]
    missing = _missing(FOR_TESTS)
    skip = f"not installed: {', '.join(missing)}" if missing else ""
    own = ["-m", "convloom.benchmarks.gpu", "--output", str(output), *common]
    own += ["--models", *options.models, "--batch", *batches]
    own += ["--per-problem", str(options.per_problem), "--problems", str(options.problems)]
    own += ["--tests", str(options.tests), "--saved", *options.saved]
    # In a rehearsal too: no other stage of it shows what this Triton compiles.
    built = ["compile", "lenet5", "--target", "cuda:sm_90", "-o", str(output / "lenet5.loom")]
    yield _stage("compile", [*_program(), *built])
    yield _stage("tests", [*own, "--stage", "tests"], skip=skip)
    yield _stage("constants", [*own, "--stage", "constants"])
    yield _stage("saved", [*own, "--stage", "saved"])
    yield _stage("tests-networks", [*own, "--stage", "tests-networks"], skip=skip)
    for model, batch in _profiled(options.profiled, batches):
        name = f"profile-{model}-{batch}"
        command = ["profile", model, "--batch", batch, *common, "--json"]
        command += ["--trace", str(output / f"{name}.trace.json")]
        yield replace(_stage(name, [*_program(), *command]), answer=f"{name}.json")
    yield _stage("correlation", [*own, "--stage", "correlation"])
    for model in options.models:
        yield from _figures(options, output, model, options.dtype)
    for kind in options.precisions:
        yield from _figures(options, output, options.models[0], kind)


def _profiled(models: Sequence[str], batches: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The models at the smallest and the largest batch."""
    for model in models:
        for batch in dict.fromkeys((batches[0], batches[-1])):
            yield model, batch


def _figures(
    options: argparse.Namespace, output: Path, model: str, kind: str
) -> Iterator[Stage]:
    """Tuning and the benchmark of a model; kind: a dtype, or "tf32". Another than the run's own has
    a table of its own."""
    dtype, precision = ("float32", "tf32") if kind == "tf32" else (kind, "ieee")
    suffix, folder = ("", output) if kind == options.dtype else (f"-{kind}", output / kind)
    common = ["--batch", *map(str, options.batch), "--dtype", dtype, "--precision", precision]
    common += ["--target", options.target, "--json"]
    records = str(output / "records" if options.dry_run else RECORDS)
    tune = ["tune", model, *common, "--to", records, "--candidates", str(options.candidates)]
    yield _stage(f"tune-{model}{suffix}", [*_program(), *tune], timed=True)
    bench = ["bench", model, *common, "--against", options.against]
    bench += ["--seconds", str(options.seconds), "--output", str(folder), "--resume"]
    yield _stage(f"bench-{model}{suffix}", [*_program(), *bench])


def _program() -> list[str]:
    return ["-m", "convloom.cli.main"]


def _stage(name: str, arguments: Sequence[str], timed: bool = False, skip: str = "") -> Stage:
    return Stage(name, tuple(arguments), " ".join(arguments), timed, skip)


def _missing(names: Sequence[str]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


# Running.


def run_stage(stage: Stage, left_s: float, output: Path, before: Entry | None) -> Entry:
    """Runs a stage for at most so long; its output goes to logs/NAME.txt."""
    if stage.skip:
        return Entry(SKIPPED, stage.key, reason=stage.skip)
    same = before is not None and before.key == stage.key
    attempts = before.attempts if before is not None and same else 0
    arguments = list(stage.arguments)
    if stage.timed:
        arguments += ["--budget", f"{max(1, int(left_s - MARGIN_S))}s"]
    log = output / "logs" / f"{stage.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("w") as errors, (log.with_suffix(".out")).open("w+") as answers:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment(),
            stdout=answers,
            stderr=errors,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=left_s)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as error:
            _end(process)
            if isinstance(error, KeyboardInterrupt):
                raise
            spent = time.monotonic() - started
            return Entry(UNFINISHED, stage.key, spent, attempts, "cut off by the budget")
        answers.seek(0)
        answer = answers.read()
    spent = round(time.monotonic() - started, 1)
    if status:
        reason = "\n".join([*_tail(log.read_text()), *_tail(answer)])
        return Entry(FAILED, stage.key, spent, attempts + 1, f"exit status {status}\n{reason}")
    if stage.timed and _out_of_time(answer):
        return Entry(UNFINISHED, stage.key, spent, attempts, "its budget is spent")
    if stage.answer:
        (output / stage.answer).write_text(answer)
    return Entry(DONE, stage.key, spent, attempts + 1)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a stage with everything it started."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _tail(text: str) -> list[str]:
    return text.strip().splitlines()[-TAIL_LINES:]


def _out_of_time(answer: str) -> bool:
    try:
        return bool(json.loads(answer)["out_of_time"])
    except (ValueError, KeyError, TypeError):
        return False


def environment() -> dict[str, str]:
    """The environment of stages: where convloom is not installed, this repository is made to be
    found under its name."""
    found = dict(os.environ)
    if not INSTALLED:
        paths = [_linked().name, found.get("PYTHONPATH", "")]
        found["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return found


@lru_cache(maxsize=1)
def _linked() -> tempfile.TemporaryDirectory[str]:
    """A folder with a link to the repository; deleted when this process ends."""
    folder = tempfile.TemporaryDirectory(prefix="convloom-")
    (Path(folder.name) / "convloom").symlink_to(ROOT, target_is_directory=True)
    return folder


def run_all(
    options: argparse.Namespace, output: Path, runner: Callable[..., Entry] = run_stage
) -> int:
    """Runs what is open within the budget, keeps the state, and says what is left."""
    path = output / "state.json"
    entries = {} if options.restart else read_state(path)
    deadline = time.monotonic() + options.budget
    left: list[str] = []
    restore_records(options, output)
    for stage in stages(options, output):
        if options.only and not stage.name.startswith(tuple(options.only)):
            continue
        if not is_open(stage, entries.get(stage.name)):
            continue
        remaining = deadline - time.monotonic()
        if remaining < LEAST_S:
            left.append(stage.name)
            continue
        print(f"{stage.name} ...", file=sys.stderr, flush=True)
        entry = runner(stage, remaining, output, entries.get(stage.name))
        entries[stage.name] = entry
        write_state(path, entries)
        keep_records(options, output)
        print(f"{stage.name}: {entry.status} ({entry.seconds:.0f} s)", file=sys.stderr, flush=True)
        if entry.status == UNFINISHED:
            left.append(stage.name)
    _write_findings(output)
    return _conclude(entries, left, output)


def _write_findings(output: Path) -> None:
    """What the stages found, as pages."""
    if not INSTALLED:
        sys.path.insert(0, _linked().name)
    from convloom.benchmarks import gpu_findings

    gpu_findings.write(output)


def keep_records(options: argparse.Namespace, output: Path) -> None:
    """The records are also with the reports where those are not part of the repository: a machine
    that is lent forgets the repository between calls."""
    if not options.dry_run and options.output is not None and RECORDS.exists():
        shutil.copytree(RECORDS, output / "records", dirs_exist_ok=True)


def restore_records(options: argparse.Namespace, output: Path) -> None:
    """Those of an earlier call are there again."""
    kept = output / "records"
    if not options.dry_run and options.output is not None and kept.exists():
        shutil.copytree(kept, RECORDS, dirs_exist_ok=True)


def _conclude(entries: dict[str, Entry], left: Sequence[str], output: Path) -> int:
    failed = [name for name, entry in entries.items() if entry.status == FAILED]
    for name in failed:
        last = entries[name].reason.strip().splitlines()[-1:]
        print(f"failed: {name}: {' '.join(last)}", file=sys.stderr)
    for name, entry in entries.items():
        if entry.status == SKIPPED:
            print(f"skipped: {name}: {entry.reason}", file=sys.stderr)
    print(f"results: {output}", file=sys.stderr)
    if left:
        print(f"unfinished, call again: {', '.join(left)}", file=sys.stderr)
        return EXIT_UNFINISHED
    return EXIT_FAILED if failed else EXIT_DONE


# The stages that are no commands.


def run_tests(options: argparse.Namespace, output: Path) -> None:
    """Writes tests.json, or tests-networks.json, and findings.json; exits with 1 where a test
    failed."""
    from . import gpu_tests

    long = options.stage == "tests-networks"
    names = [name for name in gpu_tests.collected() if gpu_tests.is_long(name) == long]
    names = names[: options.tests] if options.tests else names
    found = gpu_tests.run(output / f"{options.stage}.json", names, _tell)
    counts = Counter(outcome.partition(":")[0] for outcome in found.values())
    print(", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    if failed := [name for name in names if found[name].startswith(gpu_tests.FAILED)]:
        raise SystemExit("\n".join(f"{name}: {found[name]}" for name in failed))


def measure_constants(options: argparse.Namespace, output: Path) -> None:
    """Writes constants.json."""
    from . import constants, measure, report
    from .machine_info import describe

    device = measure.device_for(options.target)
    found, missing = constants.measure(device)
    if not found:
        raise SystemExit(f"nothing could be measured: {missing}")
    answer: dict[str, Any] = {"device": device.name, "machine": describe()}
    answer |= {"measured": found, "missing": missing}
    report.write_text(output / "constants.json", json.dumps(answer, indent=1) + "\n")
    print(json.dumps(answer, indent=1))


def measure_saved(options: argparse.Namespace, output: Path) -> None:
    """Writes saved.json; exits with 1 where a file gave other bits, or failed."""
    from . import measure, report, saved

    device = measure.device_for(options.target)
    batches = (1, SAVED_BATCH) if device.kind == "cuda" else (1, 2)
    calls = saved.CALLS if device.kind == "cuda" else 1
    rows = saved.measure_all(
        options.saved, options.target, options.dtype, batches, device, calls
    )
    text = json.dumps({"device": device.name, "models": rows}, indent=1)
    report.write_text(output / "saved.json", text + "\n")
    print(text)
    wrong = [row for row in rows if "failed" in row or not all(row["equal"].values())]
    if wrong:
        raise SystemExit(f"files that do not give the same bits, or fail: {wrong}")


def measure_correlation(options: argparse.Namespace, output: Path) -> None:
    """Writes correlation.json: every configuration, modelled and measured, and what to change."""
    import torch
    from convloom.compiler.records import rank
    from convloom.kernels.contract import targets

    from . import constants, report

    target = targets.parse(options.target)
    dtype = getattr(torch, options.dtype)
    batches = tuple(dict.fromkeys((options.batch[0], options.batch[-1])))
    works = constants.problems(options.models, batches, dtype, target.name)
    works = works[:: max(1, len(works) // options.problems)][: options.problems]
    trials = constants.Trials(output / "trials.json")
    timed = list(trials.of(works, options.per_problem, target, _tell))
    answer = constants.summary(timed, target, constants.read(output / "constants.json"))
    answer["trials"] = [
        {
            "problem": each.problem,
            "config": str(each.config),
            "measured_us": each.time_us,
            "modelled_us": rank.modelled_us(
                each.work.op, each.work.problem, target, each.config
            ),
        }
        for each in timed
    ]
    text = json.dumps(report.finite(answer), indent=1, allow_nan=False)
    report.write_text(output / "correlation.json", text + "\n")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


STAGES = {
    "tests": run_tests, "tests-networks": run_tests, "constants": measure_constants,
    "saved": measure_saved, "correlation": measure_correlation,
}  # fmt: skip


# The program.


def parser() -> argparse.ArgumentParser:
    """The options; `--dry-run` makes everything small and runs it in the interpreter."""
    from .options import AGAINST, BATCHES, DTYPES, MODELS

    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for this call")
    made.add_argument("--output", type=Path, help="folder (default: benchmarks/results/GPU)")
    # ResNet-50 first: what matters most is measured even if nothing else is.
    first = ("resnet50", *(name for name in MODELS if name != "resnet50"))
    made.add_argument("--models", nargs="+", default=list(first))
    made.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    made.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    made.add_argument("--target", default="cuda")
    made.add_argument("--against", default=",".join(AGAINST))
    made.add_argument("--seconds", type=float, default=5.0, help="timing per model and batch")
    made.add_argument("--candidates", type=int, default=12, help="per kernel when tuning")
    made.add_argument("--per-problem", type=int, default=4, help="configurations to rank")
    made.add_argument("--problems", type=int, default=40, help="to rank configurations of")
    made.add_argument("--profiled", nargs="+", default=list(PROFILED), help="models to profile")
    made.add_argument("--saved", nargs="+", default=list(SAVED), help="models to save and load")
    made.add_argument(
        "--precisions", nargs="*", choices=(*DTYPES, "tf32"), default=["float32", "tf32"],
        help="in which the first model is tuned and measured too",
    )  # fmt: skip
    made.add_argument(
        "--only", nargs="+", metavar="NAME", help="stages whose names begin like this"
    )
    made.add_argument("--tests", type=int, default=0, help="only the first so many (default: all)")
    made.add_argument("--restart", action="store_true", help="forget what earlier calls did")
    made.add_argument(
        "--dry-run", action="store_true", help="all stages, tiny, in the interpreter on the CPU"
    )
    made.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    return made


TINY: dict[str, Any] = {
    "models": ["lenet5"], "batch": [1], "dtype": "float32", "target": "interpreter",
    "against": "eager", "seconds": 0.1, "candidates": 2, "per_problem": 2, "problems": 2,
    "tests": 2, "profiled": ["lenet5"], "saved": ["lenet5"], "precisions": ["tf32"],
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """One call; the exit status."""
    options = parser().parse_args(arguments)
    if missing := _missing(NEEDED):
        print(f"not installed: {', '.join(missing)}; convloom needs them", file=sys.stderr)
        return EXIT_FAILED
    if options.dry_run:
        vars(options).update(TINY)
    if options.stage:
        STAGES[options.stage](options, options.output)
        return EXIT_DONE
    name = _device_name(options.target)
    if name is None:
        print(
            "this machine has no usable NVIDIA GPU. --dry-run tries every stage in the interpreter",
            file=sys.stderr,
        )
        return EXIT_FAILED
    output = (options.output or ROOT / "benchmarks" / "results" / name).resolve()
    return run_all(options, output)


def _device_name(target: str) -> str | None:
    """The folder of this machine's device; None where the target has none here."""
    import torch

    if target == "interpreter":
        return "dry-run"
    if not torch.cuda.is_available():
        return None
    name: str = torch.cuda.get_device_name()
    return "-".join(name.lower().split())


if __name__ == "__main__":
    sys.exit(main())
