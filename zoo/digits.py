"""Real handwritten digits: scikit-learn's 1,797 scans, prepared for LeNet-5.

Source: Alpaydin, Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI repository; the
part that scikit-learn ships as `load_digits`: 8x8 pixels, values 0 to 16, 43 writers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConvloomError

IMAGE_SIZE = 32
HOLD_OUT_EVERY = 5


@dataclass(frozen=True)
class DigitsSplit:
    """Images (N, 1, 32, 32) float32 in [0, 1], labels (N,) int64 from 0 to 9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_digits_split() -> DigitsSplit:
    """The digits, bilinearly enlarged to 32x32: 1,442 to train on and 355 held out.

    Stratified: of each digit's scans, in the order of the data set, every fifth is held out. A
    rule, rather than a random generator, fixes the split: generators change between versions, and
    held-out images would then have been trained on.

    Raises: ConvloomError when scikit-learn, which brings the scans, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConvloomError(
            "the handwritten digits need scikit-learn, which is not installed: "
            "pip install scikit-learn"
        ) from error
    scans = load_digits()
    images = torch.from_numpy(scans.images).float().unsqueeze(1) / 16
    images = F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
    labels = torch.from_numpy(scans.target).long()
    held_out = _held_out(labels)
    return DigitsSplit(images[~held_out], labels[~held_out], images[held_out], labels[held_out])


def _held_out(labels: Tensor) -> Tensor:
    """True for every fifth scan of each digit: (N,) int64 -> (N,) bool."""
    same_digit = F.one_hot(labels)
    rank = (same_digit.cumsum(0) * same_digit).sum(1)  # 1 for a digit's first scan, 2, ...
    return rank % HOLD_OUT_EVERY == 0
