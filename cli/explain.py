"""`convloom explain NAME`: why every op ended in the kernel it did, as text, JSON or a picture;
what differs between two compilations; and the kernels themselves."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ArtifactError, InvalidInputError
from . import files, networks, output
from . import options as shared

if TYPE_CHECKING:
    from ..compiler.explain.account import Account
    from ..compiler.explain.picture import KernelCode
    from ..compiler.explain.report import Report
    from ..compiler.graph.ir import Graph
    from ..compiler.plan.plan import Plan
    from ..compiler.run.executable import Executable, Kernel

CODE = ("source", "ptx", "sass")
EXCLUDED = {
    "dot": ("kernel", "json"), "html": ("dot", "kernel", "diff"), "svg": ("dot", "kernel", "diff"),
    "diff": ("dot", "kernel", "measure"),
}  # fmt: skip
"""What each option cannot stand beside."""


def configure(commands: shared.SubParsers) -> None:
    parser = shared.command(
        commands, run, "explain", shared.compile_options(slide=True, elsewhere=shared.PLANNED),
        help="tell which kernel computes each op and why, as text, page or picture",
        description="Prints, for every captured op of a model, the kernel that computes it, "
        "the rules that put it there, the rules that declined and why, and what that saves; or "
        "draws it; or compares two compilations; or prints the code of one kernel.",
    )
    add = parser.add_argument
    add("name", metavar="NAME", nargs="?", help=shared.MODEL_OR_FILE)
    add("--html", metavar="FILE", type=Path, help="write a page to look around in")
    add("--svg", metavar="FILE", type=Path, help="write the same as a drawing")
    add("--diff", metavar=("A", "B"), nargs="+", help="compare two compilations: JSON files that "
        '--json wrote, or --passes of NAME, such as "none default"')
    add("--measure", action="store_true",
        help="run it once, kernel by kernel, and show the times")
    add("--labels", action="store_true", help="list the fusions that --force, --forbid and ablate "
        "may name, and what each rule of them does")
    add("--dot", action="store_true", help="print the fused graph, for Graphviz")
    add("--kernel", metavar="K", help="print the code of one kernel, by name")
    code = parser.add_mutually_exclusive_group()
    for kind, shown in zip(CODE, ("Triton source (default)", "PTX", "machine code"), strict=True):
        code.add_argument(f"--{kind}", dest="code", action="store_const", const=kind,
                          help=f"with --kernel: its {shown}")


def run(options: argparse.Namespace) -> int:
    _check(options)
    options = _with_model(options)
    if options.labels:
        _list_labels(options)
    elif options.diff:
        _compare(options)
    elif shared.is_file(options.name):
        _explain_file(options)
    elif options.kernel:
        kernel = _compiled(options).kernel(options.kernel)
        _show_code(options, kernel, kernel.code(options.code or "source"))
    elif options.dot:
        from ..compiler.graph import text

        output.show(text.to_dot(_planned(options)[0]))
    else:
        _explain(options)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Refuses options that exclude each other.

    Raises: InvalidInputError.
    """
    if options.code and not options.kernel:
        raise InvalidInputError(
            f"--{options.code}: expected --kernel K too, to say which kernel's code to print"
        )
    for name, others in EXCLUDED.items():
        for other in others:
            if getattr(options, name) and getattr(options, other):
                raise InvalidInputError(f"--{name} and --{other} exclude each other; pass only one")
    if options.labels and options.name is not None:
        raise InvalidInputError(
            f"--labels: leave out {options.name}: the labels are the same for all models"
        )
    if options.name is None and not options.diff and not options.labels:
        raise InvalidInputError("expected NAME, a model or a file, got none (--diff takes files)")


def _with_model(options: argparse.Namespace) -> argparse.Namespace:
    """The options and the model that they name; where they name no target, with this machine's
    GPU, or one that is not here: the interpreter has kernels and tiles that no GPU would have.
    """
    if options.name is None or shared.is_file(options.name):
        return options
    options = shared.changed(options, network=networks.find(options.name, options))
    if options.target:
        return options
    here = shared.default_target()
    if options.measure or here != shared.INTERPRETER:
        return shared.changed(options, target=here)
    output.say(f"no GPU here: planned for {shared.PLANNED}; --target names another", stderr=True)
    return shared.changed(options, target=shared.PLANNED)


def _list_labels(options: argparse.Namespace) -> None:
    from ..compiler.passes import LABELS

    by_label: dict[str, list[str]] = {}
    for rule, label in LABELS.all.items():
        by_label.setdefault(label, []).append(rule)
    plain = [{"label": label, "rules": rules} for label, rules in by_label.items()]
    rows = [(label, "\n".join(rules)) for label, rules in by_label.items()]
    output.answer(options, plain, output.table(("label", "rules"), rows))


def _compiled(options: argparse.Namespace) -> Executable:
    with output.working(f"compiling {options.name}"):
        return networks.compile_model(options.network, options, options.batch)


def _planned(options: argparse.Namespace) -> tuple[Graph, Plan, Report]:
    """What there is to explain of a model; no code has been generated for it."""
    with output.working(f"planning {options.name}"):
        graph, plan, ledger = networks.lower_for(options.network, options.batch, options)
    ledger.plan = plan
    return graph, plan, ledger


def _measured(options: argparse.Namespace, executable: Any, x: Any, keywords: Any) -> Report:
    """The ledger of what has been run once, kernel by kernel."""
    with output.working(f"running {options.name} kernel by kernel"):
        executable.profile(*x, **keywords)
    ledger: Report = executable.ledger
    return ledger


def _explain(options: argparse.Namespace) -> None:
    from ..compiler.explain.account_text import refusals_by_reason

    if options.measure:
        executable = _compiled(options)
        plan, ledger = executable.plan, _measured(options, executable, *networks.placed(executable))
    else:
        _, plan, ledger = _planned(options)
    account = replace(ledger.account(), model=options.name)
    _draw(options, account, lambda: plan)
    if options.json:
        # The account, which `--diff` reads back, and beside it what can be looked up in it.
        refusals = [
            {"count": count, "rule": rule, "reason": reason}
            for count, rule, reason in refusals_by_reason(account)
        ]
        output.print_json({**account.to_json(), "refusals": refusals, "summary": plan.summary(),
                           "plan": plan.to_json()})
    elif not (options.html or options.svg):
        output.show(ledger.explain(options.name, plan.summary()))


def _explain_file(options: argparse.Namespace) -> None:
    """The ledger that a saved executable carries; of `--target` where it has several."""
    from ..compiler.artifact.load import explain, ledger_of
    from ..compiler.artifact.read import open_artifact

    shared.refuse_choices(options)
    artifact = open_artifact(options.name)
    program = files.pick(artifact, options)
    if options.kernel:
        kind = options.code or "source"
        _show_code(options, *files.code_of(artifact, program, options.kernel, kind))
        return
    if options.dot:
        from ..compiler.graph import text

        output.show(text.to_dot(files.replanned(artifact, program).graph))
        return
    measured = _measured(options, *files.loaded(options)) if options.measure else None
    ledger = measured or ledger_of(artifact, program)
    account = replace(ledger.account(), model=artifact.document.model)
    _draw(options, account, lambda: files.replanned(artifact, program).plan)
    if options.json:
        output.print_json({**account.to_json(), "artifact": files.facts(artifact)})
    elif not (options.html or options.svg):
        output.show(f"{options.name} holds {artifact.holds()}; sha256 {artifact.sha256}\n\n")
        output.show(ledger.to_text() if measured else explain(artifact, program))


def _draw(options: argparse.Namespace, account: Account, plan: Callable[[], Plan]) -> None:
    """Writes the pictures that were asked for. plan: whose kernels' code the page shows."""
    from ..compiler.explain import picture

    if options.html is not None:
        output.write_text(options.html, picture.to_html(account, _code(plan())))
    if options.svg is not None:
        output.write_text(options.svg, picture.to_svg(account))


def _code(plan: Plan) -> list[KernelCode]:
    """The code of every kernel of a plan, and what is known of it without compiling."""
    from ..compiler.explain.picture import KernelCode
    from ..compiler.run.executable import kernels_of

    return [
        KernelCode(kernel.step.name, kernel.name, *kernel.source_parts(), kernel.known_resources())
        for kernel in kernels_of(plan)
    ]


# Comparing.


def _compare(options: argparse.Namespace) -> None:
    if len(options.diff) != 2:
        raise InvalidInputError(
            f"--diff: expected two compilations, A and B, got {len(options.diff)}: "
            f"{' '.join(options.diff)}"
        )
    from ..compiler.explain import diff

    before, after = (_side(word, options) for word in options.diff)
    difference = diff.compare(before, after, tuple(options.diff))
    output.answer(options, difference.to_json(), text=diff.to_text(difference))


def _side(word: str, options: argparse.Namespace) -> Account:
    """The account in a file, or of the model compiled with the passes that `word` names."""
    path = Path(word)
    is_choice = options.name is not None and word in ("default", "none")
    if not is_choice and (path.suffix or path.exists() or len(path.parts) > 1):
        return read_account(path)
    if options.name is None:
        raise InvalidInputError(
            f"--diff {' '.join(options.diff)}: there is no file '{word}'; to compare passes, say "
            "of which model: convloom explain NAME --diff A B"
        )
    _, _, ledger = _planned(shared.changed(options, passes=word))
    return replace(ledger.account(), model=options.name)


def read_account(path: Path) -> Account:
    """The account that `convloom explain NAME --json` wrote into a file.

    Raises: ArtifactError where there is no file, or it is no such JSON.
    """
    from ..compiler.explain.account import from_json

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"cannot read '{path}': {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"'{path}': expected JSON as `convloom explain NAME --json` writes it: {error}"
        ) from error
    return from_json(data, str(path))


def _show_code(options: argparse.Namespace, kernel: Kernel, text: str) -> None:
    found = {"kernel": kernel.name, "ops": list(kernel.ops), options.code or "source": text}
    output.answer(options, found, text=text)
