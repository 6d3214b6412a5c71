"""`convloom zoo NAME`: the layers of one model, held against published tables."""

from __future__ import annotations

import json

import pytest
import torch
from convloom.cli import zoo as zoo_command
from convloom.cli.main import main
from torch import nn

from . import nets

QUICK = ("lenet5", "cifar_resnet20", "mobilenet_v2", "googlenet_paper")


@pytest.mark.parametrize("name", QUICK)
def test_layers_sum_up_to_the_model(name: str) -> None:
    (row,) = zoo_command.figures([name], measured=False)
    layers = zoo_command.layers(name)
    assert sum(layer["parameters"] for layer in layers) == row["parameters"]
    assert sum(layer["macs"] for layer in layers) == row["macs"]
    assert all(layer["ops"] and layer["output_bytes"] > 0 for layer in layers)


def test_lenet5_is_the_documented_table() -> None:
    layers = {row["layer"]: row for row in zoo_command.layers("lenet5")}
    expected = {
        "conv1": ([6, 28, 28], 156, 117_600), "pool1": ([6, 14, 14], 0, 0),
        "conv2": ([16, 10, 10], 2_416, 240_000), "pool2": ([16, 5, 5], 0, 0),
        "fc1": ([120], 48_120, 48_000), "fc2": ([84], 10_164, 10_080), "fc3": ([10], 850, 840),
    }  # fmt: skip
    found = {name: (layers[name]["output"], layers[name]["parameters"], layers[name]["macs"])
             for name in expected}  # fmt: skip
    assert found == expected
    assert "flatten" not in layers
    assert layers["conv1"]["ops"] == ["conv2d"]
    assert layers["conv1"]["output_bytes"] == 6 * 28 * 28 * 4


def test_alexnets_neurons() -> None:
    """The paper's 253,440-186,624-64,896-64,896-43,264-4096-4096-1000, but for its first number,
    which is not that of 96 square maps; of 55x55 they have 290,400."""
    layers = {row["layer"]: row for row in zoo_command.layers("alexnet")}
    names = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
    neurons = [layers[name]["output_bytes"] // 4 for name in names]
    assert neurons == [290_400, 186_624, 64_896, 64_896, 43_264, 4096, 4096, 1000]
    assert layers["norm1"]["ops"] == ["local_response_norm"]


def test_vgg16s_activations() -> None:
    """The table of Stanford's CS231n, layer by layer: 3.2M 3.2M 800K 1.6M ..., values per image,
    without the ReLUs, which run in place. They sum up to 15.1M without the image."""
    layers = zoo_command.layers("vgg_d")
    kinds = ("conv2d", "max_pool2d", "linear")
    values = [row["output_bytes"] // 4 for row in layers if row["ops"][0] in kinds]
    thousands = [round(value / 1e3) for value in values]
    assert thousands == [
        3211, 3211, 803, 1606, 1606, 401, 803, 803, 803, 201, 401, 401, 401, 100, 100, 100, 100,
        25, 4, 4, 1,
    ]  # fmt: skip
    assert sum(values) == pytest.approx(15.1e6, rel=0.01)


def test_shared_and_unused_parameters_are_counted_once_or_not_at_all() -> None:
    shared = nn.Conv2d(6, 6, 1)
    module, inputs = nets.make(
        lambda m, x: m.again(m.conv(x).relu()),
        nets.IMAGE,
        conv=shared,
        again=shared,
        idle=nn.Linear(3, 3),
    )
    rows = zoo_command.layers_of(nets.captured(module, inputs), module)
    assert [row["parameters"] for row in rows] == [42, 0, 0]


def test_one_model_as_json_and_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "lenet5", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["layers"] == zoo_command.layers("lenet5")
    assert main(["zoo", "lenet5"]) == 0
    table = capsys.readouterr().out
    assert "48,120" in table and "16x10x10" in table and "11 layers" in table
    assert main(["zoo", "lenet5", "mlp", "--json"]) == 0
    assert not any("layers" in row for row in json.loads(capsys.readouterr().out))


def test_a_call_without_a_kernel_is_shown_by_its_name() -> None:
    module, inputs = nets.make(lambda m, x: torch.erfinv(m.conv(x)), nets.IMAGE,
                               conv=nn.Conv2d(6, 4, 1))  # fmt: skip
    rows = zoo_command.layers_of(nets.captured(module, inputs), module)
    assert [row["ops"] for row in rows] == [["conv2d"], ["aten.erfinv.default"]]

