"""The zoo holds what the papers and the published implementations say: counts, shapes, names."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest
import torch
from convloom import zoo
from convloom.cli.zoo import FIGURES as RECORDED
from convloom.errors import InvalidInputError
from torch import nn

ROWS = json.loads(RECORDED.read_text())
FIGURES = {row["name"]: (row["parameters"], row["macs"]) for row in ROWS}
"""Parameters, and multiply-accumulates of the convolutions and linear layers for one image, as
`convloom zoo` prints them. Here they are counted in another way: by hooks on the layers."""

# Models that answer with one vector per pixel: the size of their answer.
MAPS = {"unet": (388, 388), "fcn_resnet50": (224, 224)}

WITH_AUXILIARY_HEADS = {
    "googlenet": 13_004_888,
    "googlenet_paper": 13_378_280,
    "inception_v3": 27_161_264,
    "fcn_resnet50": 35_322_218,
}

ALEXNET_LAYERS = {
    "conv1": 34_944,
    "conv2": 614_656,
    "conv3": 885_120,
    "conv4": 1_327_488,
    "conv5": 884_992,
    "fc6": 37_752_832,
    "fc7": 16_781_312,
    "fc8": 4_097_000,
}

# Entries of the published state dictionaries: how many there are, and some of them.
STATE_NAMES: dict[str, tuple[int, dict[str, tuple[int, ...]]]] = {
    "alexnet_torchvision": (
        16,
        {
            "features.0.weight": (64, 3, 11, 11),
            "features.10.bias": (256,),
            "classifier.1.weight": (4096, 9216),
            "classifier.6.bias": (1000,),
        },
    ),
    "vgg_a": (22, {"features.18.weight": (512, 512, 3, 3), "classifier.0.weight": (4096, 25088)}),
    "vgg_b": (26, {"features.22.bias": (512,), "classifier.3.weight": (4096, 4096)}),
    "vgg_d": (32, {"features.28.weight": (512, 512, 3, 3), "classifier.6.weight": (1000, 4096)}),
    "vgg_e": (38, {"features.34.weight": (512, 512, 3, 3), "classifier.6.bias": (1000,)}),
    "googlenet": (
        344,
        {
            "conv1.conv.weight": (64, 3, 7, 7),
            "conv1.bn.running_mean": (64,),
            "inception3a.branch1.conv.weight": (64, 192, 1, 1),
            "inception4c.branch3.1.conv.weight": (64, 24, 3, 3),
            "inception5b.branch4.1.bn.weight": (128,),
            "fc.weight": (1000, 1024),
        },
    ),
    "resnet18": (
        122,
        {
            "layer1.0.conv1.weight": (64, 64, 3, 3),
            "layer2.0.downsample.0.weight": (128, 64, 1, 1),
            "layer4.1.bn2.running_var": (512,),
            "fc.bias": (1000,),
        },
    ),
    "resnet152": (
        932,
        {
            "layer1.0.downsample.1.weight": (256,),
            "layer3.35.conv3.weight": (1024, 256, 1, 1),
            "layer4.2.bn3.num_batches_tracked": (),
        },
    ),
    "resnext50_32x4d": (320, {"layer1.0.conv2.weight": (128, 4, 3, 3)}),
    "wide_resnet50_2": (320, {"layer4.2.conv2.weight": (1024, 1024, 3, 3)}),
    "inception_v3": (
        566,
        {
            "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
            "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
            "Mixed_6a.branch3x3dbl_3.bn.running_var": (96,),
            "Mixed_6c.branch7x7dbl_5.conv.weight": (192, 160, 1, 7),
            "Mixed_7a.branch7x7x3_3.conv.weight": (192, 192, 7, 1),
            "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        },
    ),
    "inception_v4": (
        896,
        {
            "features.3.conv.conv.weight": (96, 64, 3, 3),
            "features.4.branch1.2.conv.weight": (64, 64, 7, 1),
            "features.11.branch2.4.conv.weight": (256, 224, 1, 7),
            "features.21.branch2_3b.conv.weight": (256, 512, 3, 1),
            "last_linear.weight": (1000, 1536),
        },
    ),
    "inception_resnet_v2": (
        1306,
        {
            "mixed_5b.branch3.1.conv.weight": (64, 192, 1, 1),
            "repeat.9.conv2d.bias": (320,),
            "repeat_1.19.branch1.2.conv.weight": (192, 160, 7, 1),
            "block8.branch1.1.bn.weight": (224,),
            "classif.weight": (1000, 1536),
        },
    ),
    "preact_resnet50": (
        300,
        {
            "stem.conv.weight": (64, 3, 7, 7),
            "stages.1.blocks.0.downsample.conv.weight": (512, 256, 1, 1),
            "stages.3.blocks.2.norm3.weight": (512,),
            "head.fc.weight": (1000, 2048, 1, 1),
        },
    ),
    "preact_resnet18": (107, {"stages.3.blocks.1.conv2.weight": (512, 512, 3, 3)}),
    "mobilenet_v1": (
        164,
        {
            "conv_stem.weight": (32, 3, 3, 3),
            "blocks.3.5.conv_dw.weight": (512, 1, 3, 3),
            "blocks.4.1.bn2.bias": (1024,),
            "classifier.weight": (1000, 1024),
        },
    ),
    "mobilenet_v2": (
        314,
        {
            "features.0.0.weight": (32, 3, 3, 3),
            "features.1.conv.1.weight": (16, 32, 1, 1),
            "features.17.conv.3.weight": (320,),
            "classifier.1.weight": (1000, 1280),
        },
    ),
    "mobilenet_v3_large": (
        312,
        {
            "features.4.block.2.fc1.weight": (24, 72, 1, 1),
            "features.15.block.3.1.running_mean": (160,),
            "classifier.0.weight": (1280, 960),
        },
    ),
    "squeezenet1_1": (
        52,
        {
            "features.3.squeeze.weight": (16, 64, 1, 1),
            "features.12.expand3x3.bias": (256,),
            "classifier.1.weight": (1000, 512, 1, 1),
        },
    ),
    "densenet121": (
        727,
        {
            "features.denseblock3.denselayer24.conv2.weight": (32, 128, 3, 3),
            "features.transition2.norm.running_mean": (512,),
            "features.norm5.bias": (1024,),
            "classifier.weight": (1000, 1024),
        },
    ),
    "shufflenet_v2_x1_0": (
        338,
        {
            "conv1.0.weight": (24, 3, 3, 3),
            "stage2.0.branch1.2.weight": (58, 24, 1, 1),
            "stage4.3.branch2.6.weight": (232,),
            "conv5.0.weight": (1024, 464, 1, 1),
        },
    ),
    "efficientnet_b0": (
        360,
        {
            "features.1.0.block.1.fc1.weight": (8, 32, 1, 1),
            "features.7.0.block.3.1.bias": (320,),
            "classifier.1.weight": (1000, 1280),
        },
    ),
    "repvgg_a0": (
        351,
        {
            "stage0.rbr_dense.conv.weight": (48, 3, 3, 3),
            "stage3.13.rbr_identity.running_var": (192,),
            "stage4.0.rbr_1x1.bn.bias": (1280,),
            "linear.weight": (1000, 1280),
        },
    ),
    "repvgg_a0_deploy": (46, {"stage4.0.rbr_reparam.bias": (1280,), "linear.bias": (1000,)}),
    "fcn_resnet50": (
        326,
        {"backbone.layer4.2.conv2.weight": (512, 512, 3, 3), "classifier.4.bias": (21,)},
    ),
}

AUXILIARY_NAMES = {
    "googlenet": (
        364,
        {"aux1.conv.conv.weight": (128, 512, 1, 1), "aux2.fc1.weight": (1024, 2048)},
    ),
    "inception_v3": (
        580,
        {"AuxLogits.conv1.conv.weight": (768, 128, 5, 5), "AuxLogits.fc.weight": (1000, 768)},
    ),
    "fcn_resnet50": (334, {"aux_classifier.4.weight": (21, 256, 1, 1)}),
}


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(name: str, **options: object) -> nn.Module:
    """The model without storage: shapes and counts cost nothing."""
    with torch.device("meta"):
        return zoo.build(name, **options).eval()


def example(name: str, batch: int = 1) -> torch.Tensor:
    return torch.empty(batch, *zoo.entry(name).input_shape, device="meta")


def multiply_accumulates(model: nn.Module, x: torch.Tensor) -> int:
    total = 0

    def count(layer: nn.Module, inputs: tuple[torch.Tensor], y: torch.Tensor) -> None:
        nonlocal total
        # In a transposed convolution it is the input that meets every weight of its channel.
        meets = inputs[0] if isinstance(layer, nn.ConvTranspose2d) else y
        total += meets.numel() * layer.weight.shape[1:].numel()

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            layer.register_forward_hook(count)
    model(x)
    return total


def assert_holds(
    state: dict[str, torch.Tensor], size: int, some: dict[str, tuple[int, ...]]
) -> None:
    assert len(state) == size
    assert {name: tuple(state[name].shape) for name in some if name in state} == some


def test_figures_are_those_of_models():
    """A model without figures is captured when they are asked for."""
    command = "run: convloom zoo --measure --json > cli/zoo_figures.json"
    assert set(FIGURES) <= set(zoo.names()), command


@pytest.mark.parametrize("name", FIGURES)
def test_parameters(name):
    published = zoo.entry(name).published_parameters
    assert parameter_count(on_meta(name)) == FIGURES[name][0] == (published or FIGURES[name][0])


@pytest.mark.parametrize("name", FIGURES)
def test_output_shape_and_multiply_accumulates(name):
    model = on_meta(name)
    expected = (2, zoo.entry(name).num_classes, *MAPS.get(name, ()))
    assert model(example(name, batch=2)).shape == expected
    assert multiply_accumulates(model, example(name)) == FIGURES[name][1]


@pytest.mark.parametrize("name", zoo.names())
def test_builders_take_num_classes_and_weights(name):
    options = inspect.signature(zoo.builder(name)).parameters
    assert options["num_classes"].default == zoo.entry(name).num_classes
    assert options["weights"].default is None
    assert on_meta(name, num_classes=7)(example(name)).shape[1] == 7


@pytest.mark.parametrize("name", FIGURES)
def test_builders_tell_their_parameters(name):
    """A number of parameters in a builder's docstring, where there is one, is its count."""
    text = inspect.getdoc(zoo.builder(name))
    assert text
    if "parameters" in text:
        assert f"{FIGURES[name][0]:,}" in text


@pytest.mark.parametrize(
    ("name", "gigamacs"),
    [("resnet18", 1.8), ("resnet34", 3.6), ("resnet152", 11.3), ("vgg_d", 15.3), ("vgg_e", 19.6)],
)
def test_papers_give_the_same_cost(name, gigamacs):
    """The ResNet paper's "FLOPs", which are multiply-adds, within 2%."""
    assert FIGURES[name][1] == pytest.approx(gigamacs * 1e9, rel=0.02)


def test_the_vgg_paper_gives_the_same_parameters():
    """Table 2: configurations A to E, in millions."""
    millions = {name: round(FIGURES[f"vgg_{name}"][0] / 1e6) for name in "abcde"}
    assert millions == {"a": 133, "b": 133, "c": 134, "d": 138, "e": 144}


def test_alexnets_parameters_are_in_its_classifier():
    """62.4 million, about 95% of them in the fully connected layers."""
    assert FIGURES["alexnet"][0] == pytest.approx(62.4e6, rel=1e-3)
    connected = sum(count for name, count in ALEXNET_LAYERS.items() if name.startswith("fc"))
    assert connected / FIGURES["alexnet"][0] == pytest.approx(0.95, abs=0.015)


def test_alexnet_layer_by_layer():
    model = on_meta("alexnet")
    layers = {n: parameter_count(m) for n, m in model.named_children() if parameter_count(m)}
    assert layers == ALEXNET_LAYERS


def test_alexnet_shapes_between_layers():
    shapes = {}
    x = example("alexnet")
    for name, layer in on_meta("alexnet").named_children():
        x = layer(x)
        shapes[name] = tuple(x.shape[1:])
    assert shapes["conv1"] == (96, 55, 55)
    assert shapes["pool1"] == (96, 27, 27)
    assert shapes["pool2"] == (256, 13, 13)
    assert shapes["pool5"] == (256, 6, 6)


def test_zfnet_shapes_between_layers():
    shapes = {}
    x = example("zfnet")
    for name, layer in on_meta("zfnet").named_children():
        x = layer(x)
        shapes[name] = tuple(x.shape[1:])
    assert shapes["conv1"] == (96, 110, 110)
    assert shapes["pool1"] == (96, 55, 55)
    assert shapes["conv2"] == (256, 26, 26)
    assert shapes["pool2"] == (256, 13, 13)
    assert shapes["pool5"] == (512, 6, 6)


def test_local_response_norm_is_the_papers():
    """x / (2 + 1e-4 * sum of squares of 5 neighbouring channels) ** 0.75, term by term."""
    from convloom.zoo.blocks import local_response_norm

    x = torch.randn(2, 9, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x *= 100
    expected = torch.stack(
        [
            x[:, i] / (2 + 1e-4 * x[:, max(0, i - 2) : i + 3].square().sum(1)) ** 0.75
            for i in range(9)
        ],
        dim=1,
    )
    torch.testing.assert_close(local_response_norm()(x), expected)


@pytest.mark.parametrize("name", STATE_NAMES)
def test_state_names(name):
    assert_holds(on_meta(name).state_dict(), *STATE_NAMES[name])


@pytest.mark.parametrize("name", AUXILIARY_NAMES)
def test_state_names_with_auxiliary_heads(name):
    assert_holds(on_meta(name, aux_logits=True).state_dict(), *AUXILIARY_NAMES[name])


@pytest.mark.parametrize("name", WITH_AUXILIARY_HEADS)
def test_auxiliary_heads_run_in_training_only(name):
    model = on_meta(name, aux_logits=True)
    assert parameter_count(model) == WITH_AUXILIARY_HEADS[name]
    assert isinstance(model(example(name)), torch.Tensor)
    model.train()
    outputs = model(example(name, batch=2))
    assert isinstance(outputs, tuple)
    expected = (2, zoo.entry(name).num_classes, *MAPS.get(name, ()))
    assert {tuple(y.shape) for y in outputs} == {expected}


@pytest.mark.parametrize(
    "name",
    [
        "googlenet_paper",
        "resnet152",
        "preact_resnet50",
        "mobilenet_v2",
        "mobilenet_v3_large",
        "efficientnet_b0",
        "shufflenet_v2_x1_0",
        "densenet121",
        "repvgg_a0",
        "repvgg_a0_deploy",
    ],
)
def test_activations_keep_their_size(name):
    """Random weights neither explode nor vanish in eval mode, so that fp16 can hold them."""
    torch.manual_seed(0)
    model = zoo.build(name).eval()
    sizes = []

    def record(layer: nn.Module, inputs: object, y: torch.Tensor) -> None:
        sizes.append(y.square().mean().sqrt().item())

    for layer in model.modules():
        layer.register_forward_hook(record)
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64))
    assert min(sizes) > 0.01
    assert max(sizes) < 100


def test_same_seed_same_weights():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(zoo.build("lenet5").state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_models_are_attributes_of_the_room():
    assert isinstance(zoo.cifar_convnet(num_classes=3), nn.Sequential)
    assert set(zoo.names()) <= set(dir(zoo))
    # An imported file becomes an attribute too, and must not take a model's place.
    assert not {model.module for model in zoo.MODELS} & set(zoo.names())


@pytest.mark.parametrize("ask", [zoo.build, zoo.entry, zoo.builder])
def test_unknown_name(ask):
    with pytest.raises(InvalidInputError, match=r"unknown zoo model 'resnet55'.*resnet50"):
        ask("resnet55")


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'resnet55'"):
        _ = zoo.resnet55


def test_listing_imports_no_torch():
    code = (
        "import sys; from convloom import zoo; zoo.names(); zoo.entry('resnet50'); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
