"""The table of models, and how to build one by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from ..errors import InvalidInputError, near_names

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ZooModel:
    """One line of the zoo.

    `module` is the file that holds the builder, `input_shape` the native (C, H, W).
    `published_parameters` is a count that others publish for this model, None where none is.
    """

    name: str
    module: str
    input_shape: tuple[int, int, int]
    num_classes: int
    summary: str
    published_parameters: int | None = None


def _imagenet(
    name: str, module: str, summary: str, parameters: int | None, size: int = 224
) -> ZooModel:
    return ZooModel(name, module, (3, size, size), 1000, summary, parameters)


def _cifar(name: str, module: str, summary: str) -> ZooModel:
    return ZooModel(name, module, (3, 32, 32), 10, summary)


_ALEXNET = "Krizhevsky, Sutskever, Hinton 2012"
_VGG = "Simonyan, Zisserman 2015, configuration"
_GOOGLENET = "Szegedy et al. 2015"
_PREACT = "He, Zhang, Ren, Sun 2016, pre-activation"
_INCEPTION_V4 = "Szegedy, Ioffe, Vanhoucke, Alemi 2017"
_REPVGG = "Ding et al. 2021"
_RESNET = "He, Zhang, Ren, Sun 2016"

MODELS: tuple[ZooModel, ...] = (
    ZooModel("lenet5", "lenets", (1, 32, 32), 10, "LeCun, Bottou, Bengio, Haffner 1998", 61_706),
    _cifar("cifar_convnet", "baselines", "CS231n: CONV-RELU-POOL-FC"),
    _cifar("mlp", "baselines", "three fully connected layers"),
    _imagenet("alexnet", "alexnets", f"{_ALEXNET}, as one tower", 62_378_344, 227),
    _imagenet("alexnet_grouped", "alexnets", f"{_ALEXNET}, two towers", 60_965_224, 227),
    _imagenet("alexnet_torchvision", "alexnets", "Krizhevsky 2014, torchvision's", 61_100_840),
    _imagenet("zfnet", "zfnets", "Zeiler, Fergus 2014, with 512, 1024, 512 filters", None),
    _imagenet("vgg_a", "vggs", f"{_VGG} A (VGG-11)", 132_863_336),
    _imagenet("vgg_a_lrn", "vggs", f"{_VGG} A-LRN", 132_863_336),
    _imagenet("vgg_b", "vggs", f"{_VGG} B (VGG-13)", 133_047_848),
    _imagenet("vgg_c", "vggs", f"{_VGG} C", 133_638_952),
    _imagenet("vgg_d", "vggs", f"{_VGG} D (VGG-16)", 138_357_544),
    _imagenet("vgg_e", "vggs", f"{_VGG} E (VGG-19)", 143_667_240),
    _imagenet("googlenet", "googlenets", f"{_GOOGLENET}, torchvision's", 6_624_904),
    _imagenet("googlenet_paper", "googlenets", f"{_GOOGLENET}, the paper's", 6_998_552),
    _imagenet("resnet18", "resnets", _RESNET, 11_689_512),
    _imagenet("resnet34", "resnets", _RESNET, 21_797_672),
    _imagenet("resnet50", "resnets", _RESNET, 25_557_032),
    _imagenet("resnet101", "resnets", _RESNET, 44_549_160),
    _imagenet("resnet152", "resnets", _RESNET, 60_192_808),
    _imagenet("inception_v2", "bn_inceptions", "Ioffe, Szegedy 2015 (BN-Inception)", None),
    _imagenet("inception_v3", "inceptions", "Szegedy et al. 2016", 23_834_568, 299),
    _imagenet("inception_v4", "inceptions_v4", _INCEPTION_V4, 42_679_816, 299),
    _imagenet("inception_resnet_v2", "inceptions_v4", _INCEPTION_V4, 55_843_464, 299),
    _imagenet("preact_resnet18", "preact_resnets", _PREACT, 11_687_720),
    _imagenet("preact_resnet50", "preact_resnets", _PREACT, 25_549_352),
    _cifar("plain20", "cifar_resnets", f"{_RESNET}, without shortcuts"),
    _cifar("plain56", "cifar_resnets", f"{_RESNET}, without shortcuts"),
    _cifar("cifar_resnet20", "cifar_resnets", f"{_RESNET}, for CIFAR-10"),
    _cifar("cifar_resnet56", "cifar_resnets", f"{_RESNET}, for CIFAR-10"),
    _cifar("cifar_resnet110", "cifar_resnets", f"{_RESNET}, for CIFAR-10"),
    _imagenet("resnext50_32x4d", "resnets", "Xie et al. 2017", 25_028_904),
    _imagenet("wide_resnet50_2", "resnets", "Zagoruyko, Komodakis 2016", 68_883_240),
    _cifar("all_cnn_c", "all_cnns", "Springenberg, Dosovitskiy, Brox, Riedmiller 2015"),
    _imagenet("mobilenet_v1", "mobilenets", "Howard et al. 2017", 4_231_976),
    _imagenet("mobilenet_v2", "mobilenets", "Sandler et al. 2018", 3_504_872),
    _imagenet("mobilenet_v3_large", "mobilenets", "Howard et al. 2019", 5_483_032),
    _imagenet("squeezenet1_1", "squeezenets", "Iandola et al. 2016, version 1.1", 1_235_496),
    _imagenet("densenet121", "densenets", "Huang et al. 2017", 7_978_856),
    _imagenet("shufflenet_v2_x1_0", "shufflenets", "Ma, Zhang, Zheng, Sun 2018", 2_278_604),
    _imagenet("efficientnet_b0", "efficientnets", "Tan, Le 2019", 5_288_548),
    _imagenet("repvgg_a0", "repvggs", f"{_REPVGG}, as trained", 9_108_968),
    _imagenet("repvgg_a0_deploy", "repvggs", f"{_REPVGG}, branches added up", 8_309_384),
    ZooModel("unet", "unets", (1, 572, 572), 2, "Ronneberger, Fischer, Brox 2015"),
    ZooModel("fcn_resnet50", "fcns", (3, 224, 224), 21, "Long et al. 2015; any size", 32_957_013),
)

_BY_NAME = {model.name: model for model in MODELS}


def names() -> tuple[str, ...]:
    """The names of all models, in the order of their families."""
    return tuple(_BY_NAME)


def entry(name: str) -> ZooModel:
    """The description of the model `name`.

    Raises: InvalidInputError, with the nearest names, when there is no such model.
    """
    if name not in _BY_NAME:
        near = near_names(name, _BY_NAME, "`convloom zoo`")
        raise InvalidInputError(f"unknown zoo model {name!r}: {near}")
    return _BY_NAME[name]


def builder(name: str) -> Callable[..., nn.Module]:
    """The function that makes the model `name`; imports torch and the model's family.

    Raises: InvalidInputError, with the nearest names, when there is no such model.
    """
    family = importlib.import_module(f".{entry(name).module}", __package__)
    return cast("Callable[..., nn.Module]", getattr(family, name))


def build(name: str, **options: Any) -> nn.Module:
    """A new model, in training mode; `options` are its builder's, such as `num_classes`.

    Raises: InvalidInputError, with the nearest names, when there is no such model; ArtifactError
    when its `weights` file is missing, damaged or does not fit.
    """
    return builder(name)(**options)
