"""VGG: nothing but 3x3 convolutions and 2x2 pooling, to 19 weight layers.

Source: Simonyan, Zisserman 2015, "Very Deep Convolutional Networks for Large-Scale Image
Recognition", table 1 (configurations A, A-LRN, B, C, D, E) and table 2 (parameters).

Five stages of 64, 128, 256, 512 and 512 filters, each closed by a 2x2 max-pool, on 224x224 images
end at 512x7x7; then 4096, 4096 and 1000 fully connected units (123,642,856 parameters).

| configuration | filters per stage           |  parameters |           MACs |
|---------------|-----------------------------|-------------|----------------|
| A, A-LRN      | 3 / 3 / 33 / 33 / 33        | 132,863,336 |  7,609,090,048 |
| B             | 33 / 33 / 33 / 33 / 33      | 133,047,848 | 11,308,466,176 |
| C             | 33 / 33 / 331 / 331 / 331   | 133,638,952 | 11,770,888,192 |
| D             | 33 / 33 / 333 / 333 / 333   | 138,357,544 | 15,470,264,320 |
| E             | 33 / 33 / 3333 / 3333 / 3333| 143,667,240 | 19,632,062,464 |

A, B, D and E have the parameter names of torchvision's vgg11, vgg13, vgg16 and vgg19.
"""

from __future__ import annotations

from torch import Tensor, nn

from .blocks import initialise, local_response_norm
from .checkpoint import Weights, load_weights

STAGE_WIDTHS = (64, 128, 256, 512, 512)
Stages = tuple[tuple[int, ...], ...]  # the filter sizes of each stage


class VGG(nn.Module):
    """A VGG net from the filter sizes of its five stages: x: (N, 3, 224, 224) -> (N, num_classes).

    Adaptive pooling to 7x7, which at 224x224 does nothing, admits other image sizes.
    """

    def __init__(
        self, stages: Stages, num_classes: int = 1000, local_response: bool = False
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(*_features(stages, local_response))
        self.avgpool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(4096, num_classes),
        )
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        y: Tensor = self.classifier(x.flatten(1))
        return y


def _features(stages: Stages, local_response: bool) -> list[nn.Module]:
    layers: list[nn.Module] = []
    channels = 3
    for width, kernel_sizes in zip(STAGE_WIDTHS, stages, strict=True):
        for kernel_size in kernel_sizes:
            layers += [nn.Conv2d(channels, width, kernel_size, padding=kernel_size // 2), nn.ReLU()]
            channels = width
            if local_response and len(layers) == 2:
                layers.append(local_response_norm())
        layers.append(nn.MaxPool2d(2))
    return layers


def vgg_a(num_classes: int = 1000, weights: Weights = None) -> VGG:
    """VGG-A, 11 weight layers: (N, 3, 224, 224) -> (N, num_classes), 132,863,336 parameters."""
    return load_weights(VGG(((3,), (3,), (3, 3), (3, 3), (3, 3)), num_classes), weights)


def vgg_a_lrn(num_classes: int = 1000, weights: Weights = None) -> VGG:
    """VGG-A with local response normalisation after the first layer, which the paper drops."""
    stages = ((3,), (3,), (3, 3), (3, 3), (3, 3))
    return load_weights(VGG(stages, num_classes, local_response=True), weights)


def vgg_b(num_classes: int = 1000, weights: Weights = None) -> VGG:
    """VGG-B, 13 weight layers: (N, 3, 224, 224) -> (N, num_classes), 133,047,848 parameters."""
    return load_weights(VGG(((3, 3),) * 5, num_classes), weights)


def vgg_c(num_classes: int = 1000, weights: Weights = None) -> VGG:
    """VGG-C, 16 weight layers, three of them 1x1: 133,638,952 parameters."""
    return load_weights(VGG(((3, 3),) * 2 + ((3, 3, 1),) * 3, num_classes), weights)


def vgg_d(num_classes: int = 1000, weights: Weights = None) -> VGG:
    """VGG-D, known as VGG-16: (N, 3, 224, 224) -> (N, num_classes), 138,357,544 parameters."""
    return load_weights(VGG(((3, 3),) * 2 + ((3, 3, 3),) * 3, num_classes), weights)


def vgg_e(num_classes: int = 1000, weights: Weights = None) -> VGG:
    """VGG-E, known as VGG-19: (N, 3, 224, 224) -> (N, num_classes), 143,667,240 parameters."""
    return load_weights(VGG(((3, 3),) * 2 + ((3, 3, 3, 3),) * 3, num_classes), weights)
