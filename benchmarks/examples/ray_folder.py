"""A folder of images through a saved executable with Ray Data, a pool of actors sharing the work:

    pip install 'ray[data]>=2.40'
    python benchmarks/examples/ray_folder.py lenet5.loom FOLDER classes.json --actors 4

Each actor loads the file once; an executable that was loaded before may also be passed to one, as
it is pickled by its path. Pixels are handed over in [0, 1].
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import convloom
import ray
import torch


class Classifier:
    """What an actor runs."""

    def __init__(self, executable: str, device: str) -> None:
        self.exe = convloom.load(executable, device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Adds "class" to "image", (N, H, W) or (N, H, W, C) of bytes."""
        x = torch.from_numpy(batch["image"]).float() / 255
        x = x.unsqueeze(1) if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()
        y = self.exe(x.cuda() if self.exe.device == "cuda" else x)
        return {"path": batch["path"], "class": y.argmax(1).cpu().numpy()}


def main() -> None:
    """Writes {file name: class} of the whole folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("executable", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--device", default="cuda", choices=("cuda", "interpreter", "reference"))
    parser.add_argument("--actors", type=int, default=1)
    options = parser.parse_args()
    plan = convloom.load(options.executable, "reference").plan
    _, channels, height, width = plan.inputs[0].spec.shape
    images = ray.data.read_images(
        str(options.folder),
        size=(height, width),
        mode="L" if channels == 1 else "RGB",
        include_paths=True,
    )
    rows = images.map_batches(
        Classifier,
        fn_constructor_args=(str(options.executable.absolute()), options.device),
        batch_size=plan.batches[1],
        compute=ray.data.ActorPoolStrategy(size=options.actors),
        num_gpus=1 if options.device == "cuda" else 0,
        num_cpus=0.5,  # On a small machine actors must leave cores to whoever reads the images.
    ).take_all()
    found = {Path(row["path"]).name: int(row["class"]) for row in rows}
    options.output.write_text(json.dumps(found, sort_keys=True))


if __name__ == "__main__":
    main()
