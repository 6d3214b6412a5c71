"""How long loading a saved executable takes, and how much memory: `python -m benchmarks.load`.

Everything that happens on the host is measured, in a process of its own, from the first import of
convloom to a callable: reading and hashing the file, checking its plan, reading every weight once
from memory, handing every kernel to the driver. The driver and the copy to a GPU's memory are none:
on a machine without a GPU they take no time and no memory, and a GPU's own part is not in these
figures. The file is in the page cache ("warm disk"), and torch is imported before the clock
starts. Results go to benchmarks/results/cpu/load.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import convloom
import torch
from convloom import zoo
from convloom.compiler.artifact.read import open_artifact

from .machine_info import describe

RESULTS = Path(__file__).resolve().parent / "results" / "cpu" / "load.json"
LIMIT_S, LIMIT_RATIO = 2.0, 1.3
REPEATS = 5
LOAD = """
import json, re, sys, time
from pathlib import Path
import torch

def memory(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

# The highest memory so far is forgotten: importing torch needs more than it keeps.
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
start = time.perf_counter()
import convloom
from convloom.compiler.artifact import device as gpu

class Driver:
    class CUresult:
        CUDA_SUCCESS = 0
    class Names:
        def __getattr__(self, name):
            return name
    CUdevice_attribute = CUfunction_attribute = CUfunc_cache = Names()
    loaded = 0
    def __getattr__(self, name):
        def function(*arguments):
            Driver.loaded += name == "cuModuleLoadData" and len(arguments[0])
            return 0, 1 << 30
        return function

def upload(program, tensors, device):
    for name in {name for _, name in program.constants}:
        tensors[name].view(torch.uint8).max()
    return {}

def runner(artifact, program, by_ptx):
    upload(program, artifact.tensors, None)
    return gpu.GraphRunner(program, {}, gpu.load_kernels(Driver(), program, artifact.code, by_ptx))

gpu.capability_here, gpu.runner = lambda artifact: int(sys.argv[2]), runner
executable = convloom.load(sys.argv[1], "cuda")
seconds = time.perf_counter() - start
assert "triton" not in sys.modules and len(executable.programs) == 1
print(json.dumps({"seconds": seconds, "bytes": memory("VmHWM") - before, "code": Driver.loaded}))
"""


def save(name: str, capability: int, path: Path) -> int:
    """Writes the seeded model in half precision, batches 1 to 32; the bytes of its weights."""
    torch.manual_seed(0)
    model = zoo.build(name).eval()
    x = torch.randn(2, *zoo.entry(name).input_shape)
    exe = convloom.compile(
        model,
        (x,),
        target=f"cuda:sm_{capability}",
        dtype=torch.float16,
        dynamic_batch=(1, 32),
        tuning="heuristic",
    )
    exe.save(path, model=name)
    return open_artifact(path).size_bytes("safetensors")


def measure(name: str, capability: int = 90) -> dict[str, Any]:
    """Median seconds and the highest memory of several loads of one model."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.loom"
        weights_bytes = save(name, capability, path)
        command = [sys.executable, "-c", LOAD, str(path), str(capability)]
        runs = []
        for _ in range(REPEATS):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr)
            runs.append(json.loads(done.stdout))
        file_bytes = path.stat().st_size
    seconds = statistics.median(run["seconds"] for run in runs)
    peak = max(run["bytes"] for run in runs)
    return {
        "seconds": round(seconds, 3),
        "limit_seconds": LIMIT_S,
        "file_bytes": file_bytes,
        "weights_bytes": weights_bytes,
        "machine_code_bytes": runs[0]["code"],
        "peak_host_bytes": peak,
        "peak_over_weights": round(peak / weights_bytes, 3),
        "limit_over_weights": LIMIT_RATIO,
    }


def main() -> None:
    """Measures, prints, and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("models", nargs="*", default=["resnet50"])
    options = parser.parse_args()
    rows = {name: measure(name) for name in options.models}
    for name, row in rows.items():
        print(
            f"{name:<16} {row['seconds']:6.2f} s (limit {LIMIT_S:g}), "
            f"{row['peak_over_weights']:.2f} of its weights (limit {LIMIT_RATIO:g})"
        )
    report = {
        "machine": describe(),
        "what": "the host's part of convloom.load, float16, sm_90, batch 1 to 32; no GPU",
        "models": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
