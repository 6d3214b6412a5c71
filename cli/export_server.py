"""`convloom export-server FILE DIR`: a model repository for the Triton Inference Server."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ..errors import InvalidInputError
from . import options as shared
from . import output

if TYPE_CHECKING:
    from ..compiler.artifact.program import Program
    from ..compiler.artifact.read import Artifact
    from ..compiler.graph.interface import Port

TEMPLATE = Path(__file__).with_name("server_model.py.in")
TYPES = {
    "float32": "FP32", "float16": "FP16", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32",
    "bool": "BOOL",
}  # fmt: skip
"""The server's names."""
VERSION = "1"


def configure(commands: shared.SubParsers) -> None:
    parser = shared.command(
        commands, run, "export-server", help="write a model repository for an inference server",
        description="Writes a folder that the Triton Inference Server serves with its Python "
        f"backend: DIR/NAME/config.pbtxt, and model.py and model.loom in DIR/NAME/{VERSION}.",
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="a saved executable (*.loom)")
    parser.add_argument("folder", metavar="DIR", type=Path, help="the model repository")
    parser.add_argument("--name", help="the model's name there (default: FILE's)")


def run(options: argparse.Namespace) -> int:
    from ..compiler.artifact.read import open_artifact

    artifact = open_artifact(options.file)
    name = options.file.stem if options.name is None else options.name
    if name in ("", ".", "..") or "/" in name or not name.isprintable():
        raise InvalidInputError(f"--name: expected the name of a folder, got {name!r}")
    folder = options.folder / name
    config = config_of(artifact, name)
    output.write_file(folder / VERSION / "model.loom", lambda file: _copy(options.file, file))
    output.write_file(folder / VERSION / "model.py", TEMPLATE.read_text(encoding="utf-8"))
    output.write_file(folder / "config.pbtxt", config)
    files = [str(path) for path in sorted(folder.rglob("*")) if path.is_file()]
    told = f"wrote {folder}: tritonserver --model-repository {options.folder}"
    output.answer(options, {"model": name, "folder": str(folder), "files": files}, told)
    return 0


def _copy(source: Path, file: IO[bytes]) -> None:
    with source.open("rb") as opened:
        shutil.copyfileobj(opened, file)


def config_of(artifact: Artifact, name: str) -> str:
    """config.pbtxt: inputs, outputs, the largest batch and what to run on.

    Raises: InvalidInputError for a tensor of a type that the server does not have.
    """
    programs = artifact.programs
    on_gpu = any(program.architecture for program in programs)
    first = next((p for p in programs if p.architecture or not on_gpu), programs[0])
    most = largest_batch([p for p in programs if p.target == first.target])
    ports = [_port("input", port, most) for port in first.inputs]
    ports += [_port("output", port, most) for port in first.outputs]
    # Requests wait for each other only where several of them are one call.
    batching = "dynamic_batching { }\n" if most > 1 else ""
    return (
        f"# Written by `convloom export-server` for model.loom, sha256 {artifact.sha256}.\n"
        f"name: {json.dumps(name)}\n"
        'backend: "python"\n'
        f"max_batch_size: {most}\n"
        f"{''.join(ports)}"
        f"instance_group [ {{ count: 1 kind: KIND_{'GPU' if on_gpu else 'CPU'} }} ]\n"
        f"{batching}"
        'parameters { key: "FORCE_CPU_ONLY_INPUT_TENSORS" value { string_value: "no" } }\n'
    )


def largest_batch(programs: list[Program]) -> int:
    """The largest N such that the programs take every batch from 1 to N, and all their tensors have
    it as their first size; 0, the server's word for no batches, where there is none."""
    ports = [port for program in programs for port in (*program.inputs, *program.outputs)]
    if not all(program.batch for program in programs):
        return 0
    if not all(port.spec.batch and port.spec.shape[0] == port.spec.batch for port in ports):
        return 0
    most = 0
    for low, high in sorted(program.batches for program in programs):
        if low <= most + 1:
            most = max(most, high)
    return most


def _port(kind: str, port: Port, batched: int) -> str:
    dtype = str(port.spec.dtype).removeprefix("torch.")
    if dtype not in TYPES:
        raise InvalidInputError(
            f"{kind} {port.name}: the server has no {dtype}; expected one of {', '.join(TYPES)}"
        )
    sizes = list(port.spec.shape[1:] if batched else port.spec.shape)
    if port.spec.batch and not batched:
        sizes[0] = -1
    shape = f"dims: {json.dumps(sizes or [1])}"
    if not sizes:
        shape += " reshape { shape: [ ] }"
    name = json.dumps(port.name)
    return f"{kind} [ {{ name: {name} data_type: TYPE_{TYPES[dtype]} {shape} }} ]\n"
