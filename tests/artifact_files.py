"""A small saved executable, and how tests change what is in it."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convloom
import pytest
import torch
from convloom.compiler.artifact import archive
from convloom.compiler.artifact.read import open_artifact
from convloom.compiler.graph.typed import dump
from convloom.compiler.run.executable import Executable
from convloom.errors import ArtifactError
from convloom.kernels.contract.op import Config, Problem
from convloom.kernels.contract.targets import Target
from convloom.kernels.hopper import boxes, core
from torch import nn

from .nets import Made, make


def save_small(folder: Path) -> Path:
    """A small file: two convolutions and a layer on their pixels, for a GPU, any batch to 4."""
    module, inputs = make(
        lambda m, x: m.linear(torch.relu(m.two(torch.relu(m.one(x)))).flatten(1)),
        (2, 3, 4, 4),
        one=nn.Conv2d(3, 8, 1),
        two=nn.Conv2d(8, 8, 3, padding=1),
        linear=nn.Linear(128, 4),
    )
    exe = convloom.compile(
        module, inputs, target="cuda:sm_80", dynamic_batch=(1, 4), tuning="heuristic"
    )
    path = folder / "net.loom"
    exe.save(path)
    return path


def save_by_core(
    folder: Path, made: Made, choose: Callable[[list[Config], Config], Config], **options: Any
) -> tuple[Path, Executable]:
    """A network in halves for sm_90, any batch to 4, by the Hopper core whatever the model says of
    layers so small. choose: of a problem's tiles of that core and its plain default."""
    module, inputs = made

    def chosen(problem: Problem, target: Target, plain: Config, plain_launch: Any) -> Config:
        return choose(list(core.tiles(problem, target)), plain)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(core, "default", chosen)
        patch.setattr(boxes, "MOST_WASTE", 9.0)
        exe = convloom.compile(
            module, inputs, target="cuda:sm_90", dtype=torch.float16, dynamic_batch=(1, 4),
            tuning="heuristic", **options,
        )  # fmt: skip
    path = folder / "net.loom"
    exe.save(path)
    return path, exe


def members_of(path: Path) -> dict[str, bytes]:
    """What the file holds, by name."""
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


def write(path: Path, members: dict[str, bytes]) -> None:
    """The members as convloom would write them, with a manifest that is right."""
    held: dict[str, Any] = {name: [data] for name, data in members.items()}
    held.pop("manifest.json", None)
    held["manifest.json"] = [dump({"members": archive.manifest_of(held)})]
    archive.write(path, held)


def rewrite(path: Path, members: dict[str, bytes], name: str, data: Any) -> None:
    """A JSON member replaced; a graph's hash in the plan is made right too."""
    changed = {**members, name: dump(data)}
    if name == "graph.json" and isinstance(data, dict) and isinstance(data.get("graphs"), list):
        plan = json.loads(members["plan.json"])
        plan["graphs"] = [archive.digest([dump(graph)]) for graph in data["graphs"]]
        changed["plan.json"] = dump(plan)
    write(path, changed)


def refused(path: Path) -> str:
    """Why the file is not opened."""
    with pytest.raises(ArtifactError) as caught:
        open_artifact(path)
    return str(caught.value)
