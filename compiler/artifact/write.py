"""Executable(s) -> file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ...errors import ArtifactError
from ...kernels import registry
from ...kernels.contract.op import Attributes, Config, Launch, Problem, Ref, TmaDescriptor
from ...kernels.contract.targets import Target
from ...kernels.devices import execute, offline
from ...kernels.devices.kernel_hash import TRITON_VERSION
from ...kernels.hopper import core
from ...settings import VERSION
from ..graph.ir import Graph
from ..graph.memory import on_cpu
from ..graph.typed import dump, plain
from ..plan.plan import KernelStep, Plan
from ..records import rank as rank_configs
from ..run.runtime import compile_requests, dtype_of
from . import archive, graphs, program, tensors
from .archive import Content
from .check import POINTERS, check_document
from .maps import KIND, Map
from .program import Argument, Call, Document, Grid, Image, Program, ProgramStep, Tile

if TYPE_CHECKING:
    from ..run.executable import Executable

_PORTABLE = re.compile(r"^\.target sm_[0-9]+\s*$", re.MULTILINE)


@dataclass
class Writing:
    """What one file accumulates. kernels: members by name; distinct ones once."""

    pool: tensors.Pool = field(default_factory=tensors.Pool)
    kernels: dict[str, Content] = field(default_factory=dict)
    graphs: list[Any] = field(default_factory=list)
    accounts: list[Any] = field(default_factory=list)
    programs: list[Program] = field(default_factory=list)

    def add(self, graph: Graph, plan: Plan, account: Any, with_ptx: bool) -> Program:
        """Adds a program. Packed constants go first: a graph's own tensors are then found there."""
        added = program_of(plan, self.pool, self.kernels, with_ptx)
        record = plain(graphs.record_of(graph, plan, self.pool), (Attributes,))
        positions = _index(self.graphs, record), _index(self.accounts, account)
        self.programs.append(replace(added, graph=positions[0], account=positions[1]))
        return self.programs[-1]

    def file(
        self, model: str, versions: tuple[tuple[str, str], ...]
    ) -> tuple[Document, dict[str, Content]]:
        """All of plan.json, and every member but the manifest."""
        document = Document(
            format=program.FORMAT,
            version=program.VERSION,
            model=model,
            versions=versions,
            graphs=tuple(archive.digest([dump(graph)]) for graph in self.graphs),
            programs=tuple(self.programs),
        )
        return document, {
            **self.kernels,
            "plan.json": [dump(plain(document))],
            "graph.json": [dump({"graphs": self.graphs})],
            "ledger.json": [dump({"ledgers": self.accounts})],
            tensors.MEMBER: self.pool.content(),
        }


@on_cpu
def save(path: str | Path, executables: Sequence[Executable], model: str = "") -> None:
    """Writes executables of one module, for different targets or ranges of batches, as one file.

    model: what it is of, in words for people; by default the class of the module.

    Raises: ArtifactError where something cannot be in a file, or the executables do not belong
    together; nothing is left behind then.
    """
    path = Path(path)
    writing = Writing()
    ordered = sorted(executables, key=lambda each: rank(each.target, each.plan.batch))
    oldest = oldest_of(executable.target for executable in ordered)
    for each in ordered:
        ledger = plain(replace(each.ledger, measured={}, measured_on="").to_json())
        writing.add(each.graph, each.plan, ledger, with_ptx=each.target == oldest)
    own = ("convloom", VERSION), ("torch", torch.__version__), ("triton", TRITON_VERSION)
    used = {version for each in ordered for version in graphs.extensions_of(each.graph)}
    versions = *own, *sorted(used)
    document, members = writing.file(model or executables[0].graph.name, versions)
    # By the checks of the reader: what would be refused there is not written.
    counts = len(writing.graphs), len(writing.accounts)
    source = f"cannot write '{path}': plan.json"
    check_document(document, set(members), writing.pool.tensors, counts, source)
    for each, added in zip(ordered, writing.programs, strict=True):
        data = writing.graphs[added.graph]
        graphs.read_graph(data, added, writing.pool.tensors, each.target, path)
    members["manifest.json"] = [dump({"members": archive.manifest_of(members)})]
    archive.write(path, members)


def rank(target: Target, batch: tuple[int, int] | None) -> tuple[int, str, tuple[int, int]]:
    """Where a program stands among those of a file."""
    return target.capability, target.name, batch or (0, 0)


def oldest_of(ordered: Iterable[Target]) -> Target | None:
    """The GPU generation whose PTX newer ones may compile; None where there is none."""
    return next((target for target in ordered if target.is_gpu), None)


def program_of(
    plan: Plan, pool: tensors.Pool, kernels: dict[str, Content], with_ptx: bool
) -> Program:
    """The plan as data, of graph 0 and account 0; constants go to the pool, code to `kernels`."""
    constants = tuple(
        (name, pool.add(plan.constants[name]))
        for name, buffer in plan.buffers.items()
        if buffer.kind == "constant"
    )
    images, calls, twins = _compiled(kernels, plan, with_ptx)
    return Program(
        target=plan.target.compiled_as,
        **graphs.outside_of(plan),
        graph=0,
        account=0,
        inputs=plan.inputs,
        outputs=plan.outputs,
        buffer_list=tuple(plan.buffers.values()),
        constants=constants,
        steps=_steps(plan),
        images=images,
        calls=calls,
        twins=twins,
        streams=plan.streams,
        summary=tuple(sorted(plan.summary().items())),
    )


def _index(known: list[Any], data: Any) -> int:
    """The position of equal data, or of the data added."""
    if data not in known:
        known.append(data)
    return known.index(data)


def _steps(plan: Plan) -> tuple[ProgramStep, ...]:
    lines = plan.to_text().splitlines()
    return tuple(
        ProgramStep(
            name=step.name,
            op=step.op,
            module_path=step.module_path,
            origins=step.origins,
            tile=Tile(step.config.blocks, step.config.num_warps, step.config.num_stages),
            chosen_by=step.chosen_by,
            line=line,
        )
        for step, line in zip(plan.steps, lines, strict=True)
        if isinstance(step, KernelStep)
    )


# Kernels.


def _compiled(
    kernels: dict[str, Content], plan: Plan, with_ptx: bool
) -> tuple[tuple[Image, ...], tuple[Call, ...], tuple[Call, ...]]:
    """The machine code of a plan's launches and of their twins, distinct ones once, and both."""
    if not plan.target.is_gpu:
        return (), (), ()
    twins = list(_twins(plan))
    requests = compile_requests(plan, plan.target)
    for step, launch in twins:
        requests.append(offline.request(launch, dtype_of(plan, step), plan.target))
    offline.compile_all(requests)
    compiled = {each: offline.compile_request(each) for each in dict.fromkeys(requests)}
    codes = [str(code.asm["ptx"]) for code in compiled.values()]
    # Code for one generation's own instructions (sm_90a) runs on no other.
    with_ptx = with_ptx and all(map(_PORTABLE.search, codes))
    images: list[Image] = []
    calls: list[Call] = []
    for request, (step, launch) in zip(requests, [*plan.kernels, *twins], strict=True):
        signature = _signature(plan, step, launch)
        image = _image(kernels, request, signature, compiled[request], with_ptx)
        described = iter(compiled[request].metadata.tensordesc_meta or ())
        calls.append(_call(plan, step, launch, _index(images, image), described))
    count = len(plan.kernels)
    return tuple(images), tuple(calls[:count]), tuple(calls[count:])


def _twins(plan: Plan) -> Iterator[tuple[KernelStep, Launch]]:
    """Of each step that needs what no GPU has run (`core.is_untried`) the plain launch that takes
    least by the model, of those that write nothing but results."""

    def alone(config: Config) -> tuple[Launch, ...]:
        launches = op.launches(problem, config, target)
        return launches if len(launches) == 1 and not launches[0].scratch else ()

    found: dict[Problem, tuple[Launch, ...]] = {}
    for step in plan.steps:
        if not isinstance(step, KernelStep) or not core.is_untried(step.config):
            continue
        op, problem, target = registry.get(step.op), step.problem, plan.target
        if problem not in found:
            plain = (
                config for config in op.configs(problem, target)
                if not core.is_untried(config) and not op.legal(problem, config, target)
            )  # fmt: skip
            # Differences of a rounding between equal times must not decide: a file is made again.
            best = min(filter(alone, plain), key=lambda each: (
                op.crowded(problem, each, target) is not None,
                round(rank_configs.modelled_us(op, problem, target, each), 6),
            ))  # fmt: skip
            found[problem] = alone(best)
        yield from ((step, launch) for launch in found[problem])


def _image(
    kernels: dict[str, Content],
    request: offline.CompileRequest,
    signature: tuple[str, ...],
    compiled: Any,
    with_ptx: bool,
) -> Image:
    metadata = compiled.metadata
    described = len(getattr(metadata, "tensordesc_meta", None) or ())
    needed = {
        "descriptors of its own": described != sum(map(bool, map(KIND.match, signature))),
        "global scratch memory": getattr(metadata, "global_scratch_size", 0),
        "profiling memory": getattr(metadata, "profile_scratch_size", 0),
    }
    for what in filter(needed.get, needed):
        raise ArtifactError(
            f"cannot save kernel {request.name}: it needs {what}, which a file cannot make "
            "again; choose another configuration or forbid the fusion"
        )
    folder = f"kernels/sm_{request.capability}"
    cubin = _keep(kernels, folder, "cubin", bytes(compiled.asm["cubin"]))
    code = str(compiled.asm["ptx"]).encode()
    return Image(
        entry=metadata.name,
        cubin=cubin,
        ptx=_keep(kernels, folder, "ptx", code) if with_ptx else None,
        signature=signature,
        num_warps=metadata.num_warps,
        num_ctas=metadata.num_ctas,
        shared_bytes=metadata.shared,
        cooperative=bool(metadata.launch_cooperative_grid),
        programmatic=bool(metadata.launch_pdl),
    )


def _signature(plan: Plan, step: KernelStep, launch: Launch) -> tuple[str, ...]:
    """The types of a kernel's run-time arguments, in the order of `execute.parameters`."""
    dtypes = dtype_of(plan, step)

    def kind(parameter: Ref | TmaDescriptor | None) -> str:
        if parameter is None:
            return "i32"
        if isinstance(parameter, TmaDescriptor):
            return f"box{len(parameter.shape)}{POINTERS[dtypes(parameter.ref)]}"
        return POINTERS[dtypes(parameter)]

    return tuple(map(kind, execute.parameters(launch)))


def _keep(kernels: dict[str, Content], folder: str, kind: str, code: bytes) -> str:
    name = f"{folder}/{archive.digest([code])[: archive.NAME_DIGITS]}.{kind}"
    kernels[name] = [code]
    return name


def _call(
    plan: Plan, step: KernelStep, launch: Launch, image: int, described: Iterator[dict[str, Any]]
) -> Call:
    """A launch of kernel `image` as data; described: what the compiler says of its tensor maps.

    Raises: ArtifactError for a launch that is more than `Call` can say.
    """
    names = [each.name for each in plan.steps if isinstance(each, KernelStep)]
    columns = launch.columns // launch.cluster  # Of clusters, as the image says.
    grid = Grid(launch.rows, launch.block_rows, columns, launch.batch, launch.most_programs)
    for batch in {1, *(plan.batch or (1,))}:
        programs = (grid.programs_at(batch) * launch.cluster, 1, 1)
        if launch.grid_at(batch) != programs or launch.m_at(batch) != grid.rows_at(batch):
            raise ArtifactError(
                f"cannot save step {step.name}: its grid for a batch of {batch} is "
                f"{launch.grid_at(batch)}, and a file can only say {programs}"
            )
    arguments = (_argument(plan, step, each, described) for each in execute.parameters(launch))
    return Call(names.index(step.name), image, tuple(arguments), grid)


def _argument(
    plan: Plan,
    step: KernelStep,
    parameter: Ref | TmaDescriptor | None,
    described: Iterator[dict[str, Any]],
) -> Argument:
    if parameter is None:
        return Argument(program.ROWS)
    if isinstance(parameter, TmaDescriptor):
        made, box = next(described), parameter
        block, swizzle = tuple(made["block_size"]), int(made["swizzle"])
        known = Map(box.shape, box.strides, block, box.offset, box.batch, swizzle)
        return replace(_argument(plan, step, box.ref, described), map=known)
    name = step.buffers[parameter]
    if parameter.kind == "scratch":
        return Argument(program.SCRATCH, name)
    kind = program.WRITE if parameter.kind == "output" else program.READ
    # A packed constant has not the shape that its operand says: the kernel reads all of it.
    whole = plan.buffers[name].kind == "constant"
    operand = step.problem.groups[parameter.kind][parameter.index]
    return Argument(kind, name, None if whole else operand)
