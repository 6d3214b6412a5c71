"""How often a classifier errs: top-1 and top-5, on one crop or on the mean of several."""

from __future__ import annotations

import torch
from torch import Tensor

TOP = 5


class Errors:
    """Counts a classifier's mistakes, batch by batch."""

    def __init__(self) -> None:
        self.images, self._missed_first, self._missed_top = 0, 0, 0
        self._enough_classes = True

    def add(self, scores: Tensor, labels: Tensor) -> None:
        """Counts a batch. scores: (N, classes), the larger the likelier; labels: (N,) int64.

        Scores that are not numbers are mistakes, whatever the label.
        """
        self.images += len(labels)
        self._enough_classes &= scores.shape[1] > TOP
        best = scores.nan_to_num(-torch.inf).topk(min(TOP, scores.shape[1])).indices
        hits = (best == labels[:, None]) & ~scores.isnan().any(1, keepdim=True)
        self._missed_first += int((~hits[:, 0]).sum())
        self._missed_top += int((~hits.any(1)).sum())

    @property
    def top1(self) -> float:
        """The share of images whose likeliest class is wrong."""
        return self._missed_first / self.images

    @property
    def top5(self) -> float | None:
        """The share whose class is not among the five likeliest; None with five classes or less."""
        return self._missed_top / self.images if self._enough_classes else None


def mean_prediction(scores: Tensor, crops: int) -> Tensor:
    """The mean of the softmax over the crops of each image: (N * crops, classes) -> (N, classes).

    Source: Krizhevsky, Sutskever, Hinton 2012, section 4.1.
    """
    shares = scores.float().softmax(1)
    return shares.view(-1, crops, scores.shape[1]).mean(1)
