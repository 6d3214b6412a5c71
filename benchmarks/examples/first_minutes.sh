#!/bin/sh
# A new user's first ten minutes, in an empty folder, once convloom is installed from a checkout
# (`make demo`, or `pip install .`). tests/test_first_minutes.py runs it.
set -e
DOCS="$(dirname "$0")/../../docs"

# What it is for: handwritten digits, read by a network that was compiled here.
convloom demo digits --output-dir demo

# A network of your own.
cat > mynet.py <<'END'
import torch
from torch import nn


def build() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 10),
    )


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = build()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.erfinv(torch.tanh(self.net(x)))
END

# What becomes of it on an H100, kernel by kernel, and why: a page, to be opened in a browser.
convloom explain mynet.py:build --input 1x3x32x32 --target cuda:sm_90 --html mynet.html

# Is it right? Its kernels in an interpreter on this CPU, layer by layer, against float64.
convloom verify mynet.py:build --input 1x3x32x32 --target interpreter

# A file that runs without being compiled again, and needs no mynet.py.
convloom compile mynet.py:build --input 1x3x32x32 --batch 1-8 --target interpreter -o mynet.loom
convloom run mynet.loom digit.png --target interpreter

# An op without a kernel: the message says where it stands and what to do, this page the rest.
convloom explain mynet.py:Odd --input 1x3x32x32 --target cuda:sm_90 || echo '(refused, as it should be)'
sed -n '/^## An op without a kernel/,/^## From a file/p' "$DOCS/tutorials/own_network.md"
