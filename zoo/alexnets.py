"""AlexNet: as one tower, as the paper's two towers, and in torchvision's form.

Source: Krizhevsky, Sutskever, Hinton 2012, "ImageNet Classification with Deep Convolutional Neural
Networks", figure 2. The paper's 224 pixels cannot give its 55x55 first layer; 227 do.
`alexnet_torchvision` follows Krizhevsky 2014, "One weird trick for parallelizing convolutional
neural networks": narrower and without normalisation.

| alexnet                | output   | parameters |        MACs |
|------------------------|----------|------------|-------------|
| conv1 11x11/4, 96      | 96x55x55 |     34,944 | 105,415,200 |
| LRN, max-pool 3x3/2    | 96x27x27 |            |             |
| conv2 5x5, 256         | 256x27x27|    614,656 | 447,897,600 |
| LRN, max-pool 3x3/2    | 256x13x13|            |             |
| conv3 3x3, 384         | 384x13x13|    885,120 | 149,520,384 |
| conv4 3x3, 384         | 384x13x13|  1,327,488 | 224,280,576 |
| conv5 3x3, 256         | 256x13x13|    884,992 | 149,520,384 |
| max-pool 3x3/2         | 256x6x6  |            |             |
| fc6 9216 -> 4096       | 4096     | 37,752,832 |  37,748,736 |
| fc7 4096 -> 4096       | 4096     | 16,781,312 |  16,777,216 |
| fc8 4096 -> 1000       | 1000     |  4,097,000 |   4,096,000 |
| all                    |          | 62,378,344 |1,135,256,096|
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from .blocks import initialise, local_response_norm
from .checkpoint import Weights, load_weights


def alexnet(num_classes: int = 1000, weights: Weights = None) -> nn.Sequential:
    """AlexNet as one tower: (N, 3, 227, 227) -> (N, num_classes), 62,378,344 parameters.

    94% of the parameters are in the three fully connected layers, 95% of the 1.135 GMACs in the
    five convolutions.
    """
    return load_weights(_alexnet(1, num_classes), weights)


def alexnet_grouped(num_classes: int = 1000, weights: Weights = None) -> nn.Sequential:
    """AlexNet as the paper's two towers, which meet in conv3 and in the fully connected layers.

    (N, 3, 227, 227) -> (N, num_classes); conv2, conv4 and conv5 in two groups: 60,965,224
    parameters and 724,406,816 MACs.
    """
    return load_weights(_alexnet(2, num_classes), weights)


def _alexnet(groups: int, num_classes: int) -> nn.Sequential:
    model = nn.Sequential(
        OrderedDict[str, nn.Module](
            conv1=nn.Conv2d(3, 96, 11, stride=4),
            relu1=nn.ReLU(),
            norm1=local_response_norm(),
            pool1=nn.MaxPool2d(3, stride=2),
            conv2=nn.Conv2d(96, 256, 5, padding=2, groups=groups),
            relu2=nn.ReLU(),
            norm2=local_response_norm(),
            pool2=nn.MaxPool2d(3, stride=2),
            conv3=nn.Conv2d(256, 384, 3, padding=1),
            relu3=nn.ReLU(),
            conv4=nn.Conv2d(384, 384, 3, padding=1, groups=groups),
            relu4=nn.ReLU(),
            conv5=nn.Conv2d(384, 256, 3, padding=1, groups=groups),
            relu5=nn.ReLU(),
            pool5=nn.MaxPool2d(3, stride=2),
            flatten=nn.Flatten(),
            fc6=nn.Linear(256 * 6 * 6, 4096),
            relu6=nn.ReLU(),
            drop6=nn.Dropout(),
            fc7=nn.Linear(4096, 4096),
            relu7=nn.ReLU(),
            drop7=nn.Dropout(),
            fc8=nn.Linear(4096, num_classes),
        )
    )
    initialise(model)
    return model


class AlexNet(nn.Module):
    """torchvision's AlexNet: x: (N, 3, 224, 224) -> (N, num_classes)."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(6)
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Linear(4096, num_classes),
        )
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        y: Tensor = self.classifier(x.flatten(1))
        return y


def alexnet_torchvision(num_classes: int = 1000, weights: Weights = None) -> AlexNet:
    """AlexNet as torchvision has it: (N, 3, 224, 224) -> (N, num_classes).

    61,100,840 parameters, 714,188,480 MACs; torchvision's names.
    """
    return load_weights(AlexNet(num_classes), weights)
