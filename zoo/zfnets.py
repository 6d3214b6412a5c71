"""ZFNet: AlexNet with a finer first layer and wider later ones.

Source: Zeiler, Fergus 2014, "Visualizing and Understanding Convolutional Networks", figure 3 and
table 2. Of the widths tried there for conv3, conv4 and conv5, these are the wide ones (512, 1024,
512) of the submission that won ILSVRC 2013. LRN stands for the paper's contrast normalisation.

| layer                  | output     | parameters |          MACs |
|------------------------|------------|------------|---------------|
| conv1 7x7/2, 96        | 96x110x110 |     14,208 |   170,755,200 |
| max-pool 3x3/2, LRN    | 96x55x55   |            |               |
| conv2 5x5/2, 256       | 256x26x26  |    614,656 |   415,334,400 |
| max-pool 3x3/2, LRN    | 256x13x13  |            |               |
| conv3 3x3, 512         | 512x13x13  |  1,180,160 |   199,360,512 |
| conv4 3x3, 1024        | 1024x13x13 |  4,719,616 |   797,442,048 |
| conv5 3x3, 512         | 512x13x13  |  4,719,104 |   797,442,048 |
| max-pool 3x3/2         | 512x6x6    |            |               |
| fc6 18432 -> 4096      | 4096       | 75,501,568 |    75,497,472 |
| fc7 4096 -> 4096       | 4096       | 16,781,312 |    16,777,216 |
| fc8 4096 -> 1000       | 1000       |  4,097,000 |     4,096,000 |
| all                    |            |107,627,624 | 2,476,704,896 |
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from .blocks import initialise, local_response_norm
from .checkpoint import Weights, load_weights


def zfnet(num_classes: int = 1000, weights: Weights = None) -> nn.Sequential:
    """ZFNet with 512, 1024, 512 filters in conv3 to conv5: (N, 3, 224, 224) -> (N, num_classes).

    107,627,624 parameters, computed from the paper's layers; the paper gives no total.
    """
    model = nn.Sequential(
        OrderedDict[str, nn.Module](
            conv1=nn.Conv2d(3, 96, 7, stride=2, padding=1),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(3, stride=2, ceil_mode=True),
            norm1=local_response_norm(),
            conv2=nn.Conv2d(96, 256, 5, stride=2),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(3, stride=2, ceil_mode=True),
            norm2=local_response_norm(),
            conv3=nn.Conv2d(256, 512, 3, padding=1),
            relu3=nn.ReLU(),
            conv4=nn.Conv2d(512, 1024, 3, padding=1),
            relu4=nn.ReLU(),
            conv5=nn.Conv2d(1024, 512, 3, padding=1),
            relu5=nn.ReLU(),
            pool5=nn.MaxPool2d(3, stride=2),
            flatten=nn.Flatten(),
            fc6=nn.Linear(512 * 6 * 6, 4096),
            relu6=nn.ReLU(),
            drop6=nn.Dropout(),
            fc7=nn.Linear(4096, 4096),
            relu7=nn.ReLU(),
            drop7=nn.Dropout(),
            fc8=nn.Linear(4096, num_classes),
        )
    )
    initialise(model)
    return load_weights(model, weights)
