"""A folder of images through a saved executable, each process of `torchrun` its share:

    torchrun --nproc-per-node 2 benchmarks/examples/torchrun_folder.py \\
        lenet5.loom FOLDER classes.json --device cuda

Every rank loads the file by itself; nothing is compiled. Pixels are handed over in [0, 1]: put your
own model's normalisation into `pixels`.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import convloom
import numpy as np
import torch
import torch.distributed as dist
from PIL import Image


def pixels(path: Path, shape: tuple[int, ...]) -> torch.Tensor:
    """(C, H, W) in [0, 1]."""
    channels, height, width = shape
    image = Image.open(path).convert("L" if channels == 1 else "RGB").resize((width, height))
    values = np.asarray(image, np.float32).reshape(height, width, channels) / 255
    return torch.from_numpy(values.transpose(2, 0, 1).copy())


def main() -> None:
    """Writes {file name: class} of the whole folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("executable", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--device", default="cuda", choices=("cuda", "interpreter", "reference"))
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo")
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))

    exe = convloom.load(options.executable, options.device)
    port, (_, largest) = exe.plan.inputs[0], exe.plan.batches
    mine = sorted(options.folder.iterdir())[dist.get_rank() :: dist.get_world_size()]
    found: dict[str, int] = {}
    for start in range(0, len(mine), largest):
        paths = mine[start : start + largest]
        x = torch.stack([pixels(path, port.spec.shape[1:]) for path in paths])
        y = exe(x.cuda() if on_gpu else x)
        found |= {path.name: int(k) for path, k in zip(paths, y.argmax(1), strict=True)}

    parts: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, found)
    if dist.get_rank() == 0:
        everything = {name: k for part in parts for name, k in part.items()}
        options.output.write_text(json.dumps(everything, sort_keys=True))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
