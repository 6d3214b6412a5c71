"""The model of time beside what others measured: `python -m benchmarks.public_figures`.

Half-precision products on H100 and H200 whose tiles, programs and rates are public. The model
(`kernels/contract/cost_model.py`) is given the same tiles; part of its constants was fitted to
these figures, so that agreement shows that it can be right about all of them at once, not that it
predicts others. Writes results/public_figures.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from convloom.kernels.contract import cost_model, targets
from convloom.kernels.contract.op import Launch

from . import report
from .machine_info import git_hash

RESULTS = Path(__file__).resolve().parent / "results"
MOST_OFF = 0.10
"""The error that a figure may have."""


@dataclass(frozen=True)
class Figure:
    """A product of m x k by k x n in tiles of `tile`, published at `tflops`.

    shared_columns: the tile of w is fetched once for two multiprocessors (multicast);
    stays: programs take tile after tile; multiprocessors: as many as had programs.
    """

    source: str
    m: int
    n: int
    k: int
    tflops: float
    tile: tuple[int, int] = (128, 256)
    stays: bool = True
    shared_columns: bool = False
    multiprocessors: int = 132


TRITONBENCH = "tritonbench issue 894: Triton, TMA, persistent"
TUTORIAL = "Triton tutorial 09 on H100"
FIGURES = (
    Figure("fast.cu, kernel 6 (192x192)", 8192, 8192, 8192, 777, (192, 192), multiprocessors=128),
    Figure("fast.cu, kernel 7 (multicast)", 8192, 8192, 8192, 799, shared_columns=True),
    Figure("fast.cu, kernel 11 (and TMA store)", 8192, 8192, 8192, 808, shared_columns=True),
    Figure(TRITONBENCH, 8192, 8192, 16384, 689),
    Figure(TRITONBENCH, 8192, 8192, 8192, 674),
    Figure(TRITONBENCH, 8192, 8192, 4096, 666),
    Figure(f"{TUTORIAL}: TMA, persistent", 8192, 8192, 512, 527),
    Figure(f"{TUTORIAL}: one tile a program", 8192, 8192, 512, 450, stays=False),
    Figure(f"{TUTORIAL}: vendor's (multicast)", 8192, 8192, 512, 553, shared_columns=True),
    Figure("Triton pull request TLX 1038: warp-specialised", 65536, 1024, 1024, 564),
)
STEP = 64
"""Terms of a step."""
WARPS = 8


def modelled_tflops(figure: Figure) -> float:
    """TFLOP/s of the figure's kernel by the model."""
    gpu = replace(
        cost_model.machine_for(targets.parse("cuda:sm_90")),
        multiprocessors=figure.multiprocessors,
        # What fewer multiprocessors reach of each rate is their share.
        tensor_tflops=cost_model.DEFAULT.tensor_tflops * figure.multiprocessors / 132,
        cache_gbps=cost_model.DEFAULT.cache_gbps * figure.multiprocessors / 132,
    )
    m, n = figure.tile
    fetched = m + (n // 2 if figure.shared_columns else n)
    launch = Launch(
        kernel=None,
        pointers={},
        rows=figure.m,
        block_rows=m,
        columns=-(-figure.n // n),
        constexprs={"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": STEP},
        num_warps=WARPS,
        num_stages=4,
        l2_bytes=2 * fetched * figure.k,
        steps=figure.k // STEP,
        most_programs=figure.multiprocessors if figure.stays else None,
    )
    flops, results = 2 * figure.m * figure.n * figure.k, 2 * figure.m * figure.n
    return flops / cost_model.launch_us(gpu, launch, flops, torch.float16, results) / 1e6


def markdown() -> str:
    """The table."""
    lines = [
        "# The model of time beside public figures",
        "",
        f"Made by `python -m benchmarks.public_figures` at {git_hash()}. H100 and H200, half "
        "precision, tiles of 128x256 but where told. Nothing here was measured by this project, "
        "and some of the model's constants are fitted to these figures.",
        "",
        "| figure | m x n x k | published TFLOP/s | modelled | error |",
        "|---|---|--:|--:|--:|",
    ]
    for figure in FIGURES:
        modelled = modelled_tflops(figure)
        shape = f"{figure.m} x {figure.n} x {figure.k}"
        error = f"{modelled / figure.tflops - 1:+.1%}"
        cells = (figure.source, shape, f"{figure.tflops:g}", f"{modelled:.0f}", error)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes the table."""
    text = markdown()
    report.write_text(RESULTS / "public_figures.md", text)
    print(text)


if __name__ == "__main__":
    main()
