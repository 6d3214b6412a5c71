"""Small nets for CIFAR-10: the convolutional one of the course notes, and one without convolutions.

Source: Stanford CS231n, "Convolutional Neural Networks", layer pattern INPUT-CONV-RELU-POOL-FC.

| cifar_convnet     | output   | parameters |    MACs |
|-------------------|----------|------------|---------|
| conv 3x3, 12      | 12x32x32 |        336 | 331,776 |
| max-pool 2x2      | 12x16x16 |            |         |
| fc 3072 -> 10     | 10       |     30,730 |  30,720 |
| all               |          |     31,066 | 362,496 |

| mlp               | output   | parameters |      MACs |
|-------------------|----------|------------|-----------|
| fc 3072 -> 512    | 512      |  1,573,376 | 1,572,864 |
| fc 512 -> 512     | 512      |    262,656 |   262,144 |
| fc 512 -> 10      | 10       |      5,130 |     5,120 |
| all               |          |  1,841,162 | 1,840,128 |
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from .blocks import initialise
from .checkpoint import Weights, load_weights


def cifar_convnet(num_classes: int = 10, weights: Weights = None) -> nn.Sequential:
    """INPUT-CONV(12)-RELU-POOL-FC: (N, 3, 32, 32) -> (N, num_classes), 31,066 parameters."""
    model = nn.Sequential(
        OrderedDict[str, nn.Module](
            conv=nn.Conv2d(3, 12, 3, padding=1),
            relu=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc=nn.Linear(12 * 16 * 16, num_classes),
        )
    )
    initialise(model)
    return load_weights(model, weights)


def mlp(num_classes: int = 10, weights: Weights = None) -> nn.Sequential:
    """A fully connected baseline: (N, 3, 32, 32) -> (N, num_classes), 1,841,162 parameters."""
    model = nn.Sequential(
        OrderedDict[str, nn.Module](
            flatten=nn.Flatten(),
            fc1=nn.Linear(3 * 32 * 32, 512),
            relu1=nn.ReLU(),
            fc2=nn.Linear(512, 512),
            relu2=nn.ReLU(),
            fc3=nn.Linear(512, num_classes),
        )
    )
    initialise(model)
    return load_weights(model, weights)
