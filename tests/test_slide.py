"""Classifiers that slide over larger images: the dense map is the crop-by-crop result."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import convloom
import numpy as np
import pytest
import torch
from convloom import zoo
from convloom.cli.main import main
from convloom.errors import InvalidInputError, UnsupportedOpError
from PIL import Image
from torch import Tensor, nn

from . import nets


def crop_by_crop(
    module: nn.Module, x: Tensor, crop: tuple[int, int], step: int
) -> tuple[Tensor, Tensor]:
    """The module's results on every crop of an image, as a map; and the crops."""
    h, w = crop
    ps, qs = (x.shape[2] - h) // step + 1, (x.shape[3] - w) // step + 1
    starts = [(p * step, q * step) for p in range(ps) for q in range(qs)]
    crops = torch.stack([x[:, :, i : i + h, j : j + w] for i, j in starts])
    with torch.no_grad():
        results = torch.stack([module(each) for each in crops], -1)
    return results.unflatten(-1, (ps, qs)), crops


def slid(module: nn.Module, crop: tuple[int, ...], x: Tensor, **options: Any) -> Any:
    """The module compiled for crops of an image, sliding over the whole of it."""
    options = {"target": "interpreter", **options}
    example = (torch.zeros(x.shape[0], *crop),)
    return convloom.compile(module, example, slide=tuple(x.shape[2:]), **options)


@pytest.mark.interpreter
def test_lenet_reads_digits_wherever_they_stand() -> None:
    """LeNet-5 pads nothing: every position of the map is the result on one crop."""
    module = zoo.lenet5(weights="digits").eval()
    (x,) = nets.inputs_of((2, 1, 45, 52))
    exe = slid(module, (1, 32, 32), x)
    wanted, _ = crop_by_crop(module, x, (32, 32), step=4)
    assert wanted.shape == (2, 10, 4, 6)
    torch.testing.assert_close(exe(x), wanted, rtol=1e-4, atol=1e-4)
    assert not {"linear", "head"} & {step.op for step in exe.plan.steps}
    assert exe.summary["torch_fallbacks"] == 0


class Classifier(nn.Module):
    """An AlexNet in small: dropout between linear layers, an adaptive pooling that is none at the
    native size, a softmax."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=padding), nn.BatchNorm2d(8), nn.ReLU(),
            nn.LocalResponseNorm(3), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=padding, groups=2),
            nn.ReLU(), nn.AdaptiveAvgPool2d(3),
        )  # fmt: skip
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Dropout(), nn.Linear(8 * 3 * 3, 16), nn.BatchNorm1d(16), nn.ReLU(),
            nn.Dropout(), nn.Linear(16, 5), nn.Softmax(1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(self.features(x))
        return y


@pytest.mark.interpreter
@pytest.mark.parametrize("batch", [None, (1, 3)])
def test_dropout_normalisation_and_softmax_slide_along(batch: tuple[int, int] | None) -> None:
    module = nets.randomise(Classifier(padding=0))
    (x,) = nets.inputs_of((3, 3, 17, 14))
    exe = slid(module, (3, 12, 12), x, dynamic_batch=batch)
    wanted, _ = crop_by_crop(module, x, (12, 12), step=2)
    torch.testing.assert_close(exe(x), wanted, rtol=1e-4, atol=1e-5)
    if batch is not None:
        torch.testing.assert_close(exe(x[:1]), wanted[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.interpreter
def test_with_padding_the_head_slides_over_the_map_of_features() -> None:
    """Padded convolutions see beside the crop: the map is that of crops of the features."""
    module = nets.randomise(Classifier(padding=1))
    (x,) = nets.inputs_of((2, 3, 14, 10))
    exe = slid(module, (3, 6, 6), x)
    with torch.no_grad():
        features = module.features[:-1](x)  # type: ignore[index]
    wanted, _ = crop_by_crop(module.classifier, features, (3, 3), step=1)  # type: ignore[arg-type]
    torch.testing.assert_close(exe(x), wanted, rtol=1e-4, atol=1e-5)


class Averaged(nn.Module):
    """A residual network in small: shuffled channels and an average in front of one layer."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.pool = how, nn.AdaptiveAvgPool2d(1)
        self.enter, self.middle = nn.Conv2d(3, 8, 3, 2), nn.Conv2d(8, 8, 1, groups=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.enter(x))
        n, c, h, w = y.shape
        shuffled = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        y = y + self.middle(shuffled)
        vector = {
            "pool": lambda: self.pool(y).flatten(1),
            "mean": lambda: y.mean((2, 3)),
            "max": lambda: y.amax((2, 3), keepdim=True).reshape(n, c),
            "pool, then a layer": lambda: torch.relu(self.middle(self.pool(y))).flatten(1),
            "mean, then a layer": lambda: self.middle(y.mean((2, 3), keepdim=True)).flatten(1),
        }[self.how]()
        result: Tensor = self.head(vector) * 2.0
        return result


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "how", ["pool", "mean", "max", "pool, then a layer", "mean, then a layer"]
)
def test_global_averages_become_windows(how: str) -> None:
    module = nets.randomise(Averaged(how))
    (x,) = nets.inputs_of((2, 3, 13, 17))
    wanted, _ = crop_by_crop(module, x, (9, 9), step=2)
    torch.testing.assert_close(slid(module, (3, 9, 9), x)(x), wanted, rtol=1e-4, atol=1e-5)


class Upsampled(nn.Module):
    """Layers that look at one pixel, or at its channels, after an enlargement."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.enter, self.norm = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8)
        self.up, self.middle = nn.Upsample(**how), nn.Conv2d(8, 8, 2, groups=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.normalize(torch.relu(self.norm(self.enter(x))), dim=1)
        y = self.up(y)
        centred = y - y.mean(1, keepdim=True)
        y = y + centred / (y.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        result: Tensor = self.head(torch.relu(self.middle(y)).mean((2, 3)))
        return result


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "how", [{"scale_factor": 2}, {"scale_factor": 1.5}, {"size": (6, 8)}], ids=str
)
def test_upsampling_goes_on_by_its_scale(how: dict[str, Any]) -> None:
    """A crop of 9x9 has 4x4 pixels after the first layer; two of them are whole ones again."""
    module = nets.randomise(Upsampled(**how))
    (x,) = nets.inputs_of((2, 3, 17, 13))
    wanted, _ = crop_by_crop(module, x, (9, 9), step=4)
    exe = slid(module, (3, 9, 9), x)
    rows, columns = ({"1.5": 3, "2": 4}.get(str(how.get("scale_factor")), at) for at in (3, 4))
    torch.testing.assert_close(exe(x)[:, :, ::rows, ::columns], wanted, rtol=1e-4, atol=1e-4)


COMMAND = ("--target", "reference", "--slide", "36x40")


def test_the_command_line_slides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """compile, explain and run; LeNet-5 steps by four pixels."""
    page = tmp_path / "page.png"
    Image.new("L", (40, 36), 255).save(page)
    written = tmp_path / "y.npy"
    assert main(["compile", "lenet5", *COMMAND, "--json"]) == 0
    assert main(["explain", "lenet5", *COMMAND]) == 0
    assert "conv2d" in capsys.readouterr().out
    assert main(["run", "lenet5", str(page), *COMMAND, "--output", str(written)]) == 0
    assert np.load(written).shape == (1, 10, 2, 3)
    small = ["compile", "lenet5", "--target", "reference", "--slide", "20x40"]
    assert main(small) == 2
    assert "expected a size of at least (32, 32)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*small[:-1], "20"])
    assert "expected HEIGHTxWIDTH" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["alexnet", "resnet18"])
def test_models_of_the_zoo_slide(name: str) -> None:
    """AlexNet's classifier needs one image of 227x227; 291x323 hold 3 x 4 of its positions."""
    module, crop = zoo.build(name).eval(), zoo.entry(name).input_shape
    shape = (1, 3, crop[1] + 64, crop[2] + 96)
    (x,) = nets.inputs_of(shape)
    exe = slid(module, crop, x, target="reference")
    assert exe(x).shape == (1, 1000, 3, 4)


def test_the_native_size_gives_a_map_of_one_position() -> None:
    module = nets.randomise(Classifier(padding=1))
    (x,) = nets.inputs_of((2, 3, 6, 6))
    exe = slid(module, (3, 6, 6), x, target="reference")
    torch.testing.assert_close(exe(x)[:, :, 0, 0], module(x), rtol=1e-4, atol=1e-5)


def test_a_layer_that_reads_features_of_two_shapes_has_two_filters() -> None:
    def run(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        shapes = ((3, 2), (2, 3))
        return tuple(m.head(nn.functional.avg_pool2d(x, shape).flatten(1)) for shape in shapes)

    module, (x,) = nets.make(run, (2, 3, 6, 6), head=nn.Linear(18, 4))
    exe = slid(module, (3, 6, 6), x, target="reference")
    for ours, theirs in zip(exe(x), module(x), strict=True):
        torch.testing.assert_close(ours[:, :, 0, 0], theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.interpreter
def test_vectors_may_be_looked_at_as_pixels() -> None:
    """(N, C) as (N, C, 1, 1) for a convolution, and as itself for a linear layer."""

    def run(m: Any, x: Tensor) -> Tensor:
        vector = m.first(x.flatten(1))
        n, c = vector.shape
        pixels = m.middle(vector.view(n, c, 1, 1) + 1.0)
        result: Tensor = m.last(torch.relu(vector).view(n, c)) + m.last(pixels.flatten(1))
        return result

    layers = {"first": nn.Linear(18, 4), "middle": nn.Conv2d(4, 4, 1), "last": nn.Linear(4, 3)}
    module, _ = nets.make(run, (2, 2, 3, 3), **layers)
    (x,) = nets.inputs_of((2, 2, 4, 5))
    wanted, _ = crop_by_crop(module, x, (3, 3), step=1)
    torch.testing.assert_close(slid(module, (2, 3, 3), x)(x), wanted, rtol=1e-4, atol=1e-5)


ROW = torch.arange(4.0).reshape(1, 4)


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        (lambda y: y + ROW, r"joins features with float32\[1, 4\], which is no vector"),
        (lambda y: y.view(-1, 2, 2), "takes a vector of 4 features apart"),
        (lambda y: y.amax(1), "cannot be done at every position of a map"),
    ],
)
def test_what_vectors_cannot_do_on_a_map_is_refused(after: Any, reason: str) -> None:
    module = nets.Net(lambda m, x: after(m.fc(x.flatten(1))), fc=nn.Linear(18, 4))
    assert re.search(reason, refused(UnsupportedOpError, module, (1, 2, 3, 3), (4, 5)))


def refused(error: type[Exception], module: nn.Module, shape: tuple[int, ...], size: Any) -> str:
    with pytest.raises(error) as raised:
        (x,) = nets.inputs_of(shape)
        convloom.compile(module.eval(), (x,), target="reference", slide=size)
    return str(raised.value)


def test_what_cannot_slide_is_refused() -> None:
    module = Classifier(padding=1)
    small = refused(InvalidInputError, module, (1, 3, 6, 6), (6, 5))
    assert small == "slide: expected a size of at least (6, 6), that of the example; got (6, 5)"
    assert "(height, width), got 9" in refused(InvalidInputError, module, (1, 3, 6, 6), 9)
    vector = refused(InvalidInputError, nn.Linear(3, 2), (1, 3), (9, 9))
    assert "one image (N,C,H,W), got float32[1, 3]" in vector
    pools = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 2))
    message = refused(UnsupportedOpError, pools, (1, 3, 6, 6), (9, 9))
    assert re.match(r"slide: '0': adaptive_avg_pool2d\(.*only an average or maximum", message)
    rows = nets.Net(lambda m, x: x.mean(3, keepdim=True))
    message = refused(UnsupportedOpError, rows, (1, 3, 6, 6), (9, 9))
    assert "only an average or maximum of the whole image slides" in message
    corners = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
    message = refused(UnsupportedOpError, nn.Sequential(corners), (1, 3, 6, 6), (9, 9))
    assert re.match(r"slide: '0': upsample_linear\(.*align_corners looks for", message)
    half = nn.Upsample(scale_factor=1.5)
    message = refused(UnsupportedOpError, nn.Sequential(half), (1, 3, 6, 6), (9, 9))
    assert message.endswith("9 pixels do not become a whole number as 6 become 9")
    cut = nn.Upsample(scale_factor=1.4)  # 8 of 8.4 rows: the crops beside it would begin elsewhere.
    message = refused(UnsupportedOpError, nn.Sequential(cut), (1, 3, 6, 6), (9, 9))
    assert message.endswith("9 pixels do not become a whole number as 6 become 8")
    for norm in (nn.GroupNorm(1, 3), nn.InstanceNorm2d(3), nn.LayerNorm((3, 6, 6))):
        message = refused(UnsupportedOpError, nn.Sequential(norm), (1, 3, 6, 6), (9, 9))
        assert re.match(r"slide: '0': normalize\(.*join pixels of the whole image", message)
    rows = nn.Sequential(nn.Flatten(2), nn.Linear(36, 2))
    message = refused(UnsupportedOpError, rows, (1, 3, 6, 6), (9, 9))
    assert re.match(r"slide: '0': reshape\(.*depends on the size of the image", message)
    turned = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (9, 12)))
    message = refused(UnsupportedOpError, turned, (1, 3, 6, 6), (9, 9))
    assert "that no linear layer has made a vector of" in message
