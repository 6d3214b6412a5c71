"""LeNet-5, the network that read the digits on cheques.

Source: LeCun, Bottou, Bengio, Haffner 1998, "Gradient-Based Learning Applied to Document
Recognition", figure 2; here in the form taught today: max-pooling without coefficients, full
connections from S2 to C3, ReLU, and a linear output layer.

| layer           | output    | parameters |    MACs |
|-----------------|-----------|------------|---------|
| C1  5x5, 6      | 6x28x28   |        156 | 117,600 |
| S2  max 2x2     | 6x14x14   |            |         |
| C3  5x5, 16     | 16x10x10  |      2,416 | 240,000 |
| S4  max 2x2     | 16x5x5    |            |         |
| C5  400 -> 120  | 120       |     48,120 |  48,000 |
| F6  120 -> 84   | 84        |     10,164 |  10,080 |
| out 84 -> 10    | 10        |        850 |     840 |
| all             |           |     61,706 | 416,520 |
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from torch import nn

from .blocks import initialise
from .checkpoint import Weights, load_weights

DIGITS_WEIGHTS = Path(__file__).parent / "weights" / "lenet5_digits.safetensors"


def lenet5(num_classes: int = 10, weights: Weights = None) -> nn.Sequential:
    """LeNet-5 with ReLU and max-pooling: (N, 1, 32, 32) -> (N, num_classes), 61,706 parameters.

    `weights="digits"` loads the shipped parameters, trained on scikit-learn's handwritten digits
    (`train_lenet5`); their input is that of `digits.load_digits_split`: 32x32, values in [0, 1].

    Raises: ArtifactError when the weight file is missing, damaged or does not fit.
    """
    model = nn.Sequential(
        OrderedDict[str, nn.Module](
            conv1=nn.Conv2d(1, 6, 5),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(6, 16, 5),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(16 * 5 * 5, 120),
            relu3=nn.ReLU(),
            fc2=nn.Linear(120, 84),
            relu4=nn.ReLU(),
            fc3=nn.Linear(84, num_classes),
        )
    )
    initialise(model)
    if weights != "digits":
        return load_weights(model, weights)
    remake = "Make it again with `python -m convloom.zoo.train_lenet5`, or reinstall convloom."
    return load_weights(model, DIGITS_WEIGHTS, hint=remake)
