"""Trains LeNet-5 on real handwritten digits: `python -m convloom.zoo.train_lenet5`.

Writes the weights that `zoo.lenet5(weights="digits")` loads. The schedule is fixed and its last
epoch is kept: the held-out images only measure, they choose nothing. Takes about twenty seconds on
one core, and repeats exactly on the same processor and torch version.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoint import NOTES_KEY
from .digits import HOLD_OUT_EVERY, DigitsSplit, load_digits_split
from .lenets import DIGITS_WEIGHTS, lenet5

SEED = 1998
EPOCHS = 60
BATCH = 32
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 1e-2


def train(split: DigitsSplit, epochs: int = EPOCHS) -> nn.Sequential:
    """A LeNet-5 trained on the split's training images, in eval mode.

    AdamW, one cosine from the learning rate to zero, every image distorted anew each time.
    """
    torch.manual_seed(SEED)
    model = lenet5()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for epoch in range(epochs):
        loss = _train_epoch(model, optimizer, split)
        schedule.step()
        print(f"epoch {epoch + 1:3d} of {epochs}: training loss {loss:.4f}")
    return model.eval()


def _train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, split: DigitsSplit) -> float:
    losses = []
    for chosen in torch.split(torch.randperm(len(split.train_labels)), BATCH):
        logits = model(_distorted(split.train_images[chosen]))
        loss = F.cross_entropy(logits, split.train_labels[chosen])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def _distorted(images: Tensor) -> Tensor:
    """Each image turned by up to 12 degrees, scaled by up to 10% and shifted by up to 2 pixels."""
    n = len(images)
    angle = (2 * torch.rand(n) - 1) * math.radians(12)
    scale = 1 + (2 * torch.rand(n) - 1) * 0.1
    shift = (2 * torch.rand(n, 2) - 1) * (2 / (images.shape[-1] / 2))
    cos, sin = scale * angle.cos(), scale * angle.sin()
    affine = torch.stack(
        [torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1
    )
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The fraction of images (N, 1, 32, 32) whose largest logit is at their label (N,)."""
    right: Tensor = model(images).argmax(1) == labels
    return right.double().mean().item()


def save(model: nn.Module, split: DigitsSplit, path: Path) -> dict[str, str]:
    """Writes the weights with their provenance (`checkpoint.read_notes`), which it returns."""
    from safetensors.torch import save as serialise

    notes = {
        "model": "lenet5",
        "data": "scikit-learn load_digits, values / 16, bilinear to 32x32",
        "split": f"held out: every {HOLD_OUT_EVERY}th scan of each digit",
        "seed": str(SEED),
        "torch": torch.__version__,
        "train_images": str(len(split.train_labels)),
        "test_images": str(len(split.test_labels)),
        "train_accuracy": f"{accuracy(model, split.train_images, split.train_labels):.4f}",
        "test_accuracy": f"{accuracy(model, split.test_images, split.test_labels):.4f}",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    # One entry, because safetensors writes several in an order that changes from run to run.
    metadata = {NOTES_KEY: json.dumps(notes)}
    unfinished.write_bytes(serialise(model.state_dict(), metadata=metadata))
    unfinished.replace(path)  # in one step: an interrupted run leaves the old file whole
    return notes


def main() -> None:
    """Trains, saves and reports."""
    parser = argparse.ArgumentParser(description="Train LeNet-5 on scikit-learn's digits.")
    parser.add_argument("--output", type=Path, default=DIGITS_WEIGHTS, help="default: %(default)s")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # sums are then always added in the same order
    split = load_digits_split()
    notes = save(train(split), split, arguments.output)
    print(f"test accuracy {float(notes['test_accuracy']):.2%} -> {arguments.output}")


if __name__ == "__main__":
    main()
