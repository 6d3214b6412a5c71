"""Whole networks as people write them, a few channels wide: what no layer alone shows.

`NETWORKS` names them; each is a function that makes the network, with seeded weights and in
evaluation mode, and its inputs.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao import quantization

from . import nets


class ModulatedConv(nn.Module):
    """StyleGAN2's: filters scaled by a style of each sample and normalised; by way of groups."""

    blur: Tensor

    def __init__(self, inputs: int, outputs: int, side: int, style: int, up: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, side, side))
        self.style, self.up = nn.Linear(style, inputs), up
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 4.0
        self.register_buffer("blur", taps[:, None] * taps, persistent=False)

    def forward(self, x: Tensor, w: Tensor, demodulate: bool = True) -> Tensor:
        n, c, height, width = x.shape
        k, _, side, _ = self.weight.shape
        filters = self.weight.unsqueeze(0) * self.style(w).add(1.0).view(n, 1, c, 1, 1)
        if demodulate:
            filters = filters * filters.square().sum((2, 3, 4), keepdim=True).add(1e-8).rsqrt()
        x = x.reshape(1, n * c, height, width)
        if self.up:
            filters = filters.transpose(1, 2).reshape(n * c, k, side, side)
            y = F.conv_transpose2d(x, filters, stride=2, groups=n)
            y = y.view(n, k, *y.shape[2:])
            taps = self.blur[None, None].repeat(k, 1, 1, 1)
            return F.conv2d(F.pad(y, [1, 1, 1, 1]), taps, groups=k)
        y = F.conv2d(x, filters.view(n * k, c, side, side), padding=side // 2, groups=n)
        return y.view(n, k, height, width)


class Generator(nn.Module):
    """Like StyleGAN2's: a mapping, a learned constant, modulated convolutions with noise, and
    images of all resolutions summed."""

    def __init__(self, latent: int = 8, widths: Sequence[int] = (8, 6, 4)) -> None:
        super().__init__()
        self.mapping = nn.ModuleList(nn.Linear(latent, latent) for _ in range(3))
        self.constant = nn.Parameter(torch.randn(1, widths[0], 4, 4))
        self.first = ModulatedConv(widths[0], widths[0], 3, latent)
        pairs = list(itertools.pairwise(widths))
        self.ups = nn.ModuleList(ModulatedConv(a, b, 3, latent, up=True) for a, b in pairs)
        self.convs = nn.ModuleList(ModulatedConv(b, b, 3, latent) for _, b in pairs)
        self.images = nn.ModuleList(ModulatedConv(w, 3, 1, latent) for w in widths)
        sides = [4] + [4 * 2**n for n in range(1, len(widths)) for _ in range(2)]
        self.strengths = nn.Parameter(torch.zeros(len(sides)))
        for index, side in enumerate(sides):
            self.register_buffer(f"noise{index}", torch.randn(1, 1, side, side))

    def _styled(self, index: int, conv: nn.Module, x: Tensor, w: Tensor) -> Tensor:
        noise = self.get_buffer(f"noise{index}") * self.strengths[index]
        return F.leaky_relu(conv(x, w) + noise, 0.2) * math.sqrt(2.0)

    def forward(self, z: Tensor) -> Tensor:
        w = z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8)
        for layer in self.mapping:
            w = F.leaky_relu(layer(w), 0.2)
        x = self._styled(0, self.first, self.constant.repeat(w.shape[0], 1, 1, 1), w)
        image = self.images[0](x, w, demodulate=False)
        for n, (up, conv) in enumerate(zip(self.ups, self.convs, strict=True)):
            x = self._styled(2 * n + 1, up, x, w)
            x = self._styled(2 * n + 2, conv, x, w)
            image = F.interpolate(image, scale_factor=2, mode="bilinear", align_corners=False)
            image = image + self.images[n + 1](x, w, demodulate=False)
        return image


class SiamFC(nn.Module):
    """A tracker: features of an exemplar are the filter of the features of a search image."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 5, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(8, 12, 3, groups=2), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3),
        )  # fmt: skip
        self.gain, self.bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, exemplar: Tensor, search: Tensor) -> Tensor:
        z, x = self.features(exemplar), self.features(search)
        n, c, height, width = x.shape
        scores = F.conv2d(x.reshape(1, n * c, height, width), z, groups=n)
        return scores.reshape(n, 1, *scores.shape[2:]) * self.gain + self.bias


class SpatialTransformer(nn.Module):
    """The network of PyTorch's tutorial: the digit is straightened, then classified."""

    def __init__(self) -> None:
        super().__init__()
        self.localization = nn.Sequential(
            nn.Conv2d(1, 4, 7), nn.MaxPool2d(2, stride=2), nn.ReLU(True),
            nn.Conv2d(4, 6, 5), nn.MaxPool2d(2, stride=2), nn.ReLU(True),
        )  # fmt: skip
        self.fc_loc = nn.Sequential(nn.Linear(6 * 3 * 3, 8), nn.ReLU(True), nn.Linear(8, 6))
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 5), nn.Conv2d(4, 6, 5)
        self.drop = nn.Dropout2d()
        self.fc1, self.fc2 = nn.Linear(6 * 4 * 4, 12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        xs = self.localization(x)
        theta = self.fc_loc(xs.view(-1, 6 * 3 * 3)).view(-1, 2, 3)
        x = F.grid_sample(x, F.affine_grid(theta, x.size(), False), align_corners=False)
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.drop(self.conv2(x)), 2)).view(-1, 6 * 4 * 4)
        x = F.dropout(F.relu(self.fc1(x)), training=self.training)
        return F.log_softmax(self.fc2(x), dim=1)


class CRNN(nn.Module):
    """Convolutions to a height of one, two bidirectional LSTMs, a label at every column."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(1, 4, 3, 1, 1), nn.ReLU(True), nn.MaxPool2d(2, 2),
            nn.Conv2d(4, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(True),
            nn.MaxPool2d((2, 2), (2, 1), (0, 1)), nn.Conv2d(8, 8, 2), nn.ReLU(True),
        )  # fmt: skip
        self.rnns = nn.ModuleList(nn.LSTM(8, 6, bidirectional=True) for _ in range(2))
        self.embeddings = nn.ModuleList((nn.Linear(12, 8), nn.Linear(12, 5)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.cnn(x)
        assert x.shape[2] == 1, "the height after the convolutions must be 1"
        x = x.squeeze(2).permute(2, 0, 1)
        for rnn, embedding in zip(self.rnns, self.embeddings, strict=True):
            sequence, _ = rnn(x)
            steps, n, c = sequence.shape
            x = embedding(sequence.view(steps * n, c)).view(steps, n, -1)
        return F.log_softmax(x, dim=2)


def twice(inputs: int, outputs: int) -> nn.Sequential:
    """Two convolutions with their normalisations."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )  # fmt: skip


class UNetBySlices(nn.Module):
    """A U-Net that writes both parts of a skip connection into slices of zeros, odd sizes too."""

    def __init__(self, widths: Sequence[int] = (4, 6, 8)) -> None:
        super().__init__()
        a, b, c = widths
        self.down = nn.ModuleList((twice(3, a), twice(a, b), twice(b, c)))
        self.up = nn.ModuleList((nn.ConvTranspose2d(c, b, 2, 2), nn.ConvTranspose2d(b, a, 2, 2)))
        self.after = nn.ModuleList((twice(2 * b, b), twice(2 * a, a)))
        self.head = nn.Conv2d(a, 2, 1)

    @staticmethod
    def joined(skip: Tensor, small: Tensor) -> Tensor:
        """Both, channel by channel; the smaller one in the middle."""
        n, c, height, width = skip.shape
        top, left = (height - small.shape[2]) // 2, (width - small.shape[3]) // 2
        y = skip.new_zeros(n, c + small.shape[1], height, width)
        y[:, :c] = skip
        y[:, c:, top : top + small.shape[2], left : left + small.shape[3]] = small
        return y

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down[:-1]:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.down[-1](x)
        for up, block, skip in zip(self.up, self.after, reversed(skips), strict=True):
            x = block(self.joined(skip, up(x)))
        return self.head(x)


class QuantisedBlock(nn.Module):
    """A residual block for quantisation: its sum has a fake quantisation of its own."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), _norm(outputs)
        self.relu = nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), _norm(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), _norm(outputs))
        self.add = nn.quantized.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.add.add_relu(self.bn2(self.conv2(y)), self.shortcut(x))


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)


class QuantisedResNet(nn.Module):
    """A small ResNet between the stubs of quantisation."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 3, 2, 1, bias=False), _norm(4), nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.layers = nn.Sequential(QuantisedBlock(4, 4, 1), QuantisedBlock(4, 8, 2))
        self.mean, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn(self.conv(self.quant(x)))))
        return self.dequant(self.fc(torch.flatten(self.mean(self.layers(x)), 1)))


class YoloV5(nn.Module):
    """Two levels of features, and the boxes that their numbers stand for, as YOLOv5 decodes them:
    the grid of cells is made from the image's size."""

    anchors: Tensor

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 6, 2, 2), nn.BatchNorm2d(4), nn.SiLU())
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, 2 * c, 3, 2, 1), nn.BatchNorm2d(2 * c), nn.SiLU())
            for c in (4, 8)
        )
        self.reduce, self.numbers = nn.Conv2d(16, 8, 1), 5 + classes
        heads = (nn.Conv2d(c, 2 * self.numbers, 1) for c in (16, 16))
        self.heads, self.strides = nn.ModuleList(heads), (4, 8)
        self.register_buffer("anchors", torch.tensor([[[2.0, 3], [4, 2]], [[5.0, 7], [9, 6]]]))

    def forward(self, x: Tensor) -> Tensor:
        small = self.stages[0](self.stem(x))
        large = self.stages[1](small)
        joined = torch.cat([F.interpolate(self.reduce(large), scale_factor=2.0), small], 1)
        return torch.cat([self.decoded(n, y) for n, y in enumerate((joined, large))], 1)

    def decoded(self, level: int, x: Tensor) -> Tensor:
        """The boxes of a level, (N, boxes, 4 + 1 + classes), in pixels."""
        y = self.heads[level](x)
        n, _, height, width = y.shape
        y = y.view(n, 2, self.numbers, height, width).permute(0, 1, 3, 4, 2).contiguous()
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        grid = torch.stack((columns, rows), 2).expand(1, 2, height, width, 2).to(y.dtype) - 0.5
        anchors = self.anchors[level].view(1, 2, 1, 1, 2).expand(1, 2, height, width, 2)
        centre, size, rest = y.sigmoid().split((2, 2, self.numbers - 4), 4)
        centre = (centre * 2 + grid) * self.strides[level]
        size = (size * 2) ** 2 * anchors
        return torch.cat((centre, size, rest), 4).view(n, 2 * height * width, self.numbers)


class YoloV3(YoloV5):
    """The older decoding: the numbers are overwritten in place."""

    def decoded(self, level: int, x: Tensor) -> Tensor:
        """As `YoloV5.decoded`."""
        y = self.heads[level](x)
        n, _, height, width = y.shape
        y = y.view(n, 2, self.numbers, height, width).permute(0, 1, 3, 4, 2).contiguous()
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        grid = torch.stack((columns, rows), 2).view(1, 1, height, width, 2).to(y.dtype)
        y[..., 0:2] = (y[..., 0:2].sigmoid() + grid) * self.strides[level]
        y[..., 2:4] = torch.exp(y[..., 2:4]) * self.anchors[level].view(1, 2, 1, 1, 2)
        y[..., 4:] = y[..., 4:].sigmoid()
        return y.view(n, -1, self.numbers)


class YoloV8(YoloV5):
    """Boxes without anchors: distances to the four sides as means of distributions."""

    bins: int = 4

    def __init__(self, classes: int = 3) -> None:
        super().__init__(classes)
        outputs = 4 * self.bins + classes
        self.heads = nn.ModuleList(nn.Conv2d(16, outputs, 1) for _ in self.strides)
        self.dfl = nn.Conv2d(self.bins, 1, 1, bias=False).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        small = self.stages[0](self.stem(x))
        large = self.stages[1](small)
        joined = torch.cat([F.interpolate(self.reduce(large), scale_factor=2.0), small], 1)
        levels = [head(y) for head, y in zip(self.heads, (joined, large), strict=True)]
        places, strides = self.cells(levels)
        both = torch.cat([y.view(y.shape[0], y.shape[1], -1) for y in levels], 2)
        box, classes = both.split((4 * self.bins, both.shape[1] - 4 * self.bins), 1)
        n, _, cells = box.shape
        weights = box.view(n, 4, self.bins, cells).transpose(2, 1).softmax(1)
        distances = self.dfl(weights).view(n, 4, cells)
        left, right = distances.chunk(2, 1)
        first, last = places.unsqueeze(0) - left, places.unsqueeze(0) + right
        box = torch.cat(((first + last) / 2, last - first), 1) * strides
        return torch.cat((box, classes.sigmoid()), 1)

    def cells(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The centres of all cells, (2, cells), and how many pixels apart they are."""
        places, strides = [], []
        for y, stride in zip(levels, self.strides, strict=True):
            height, width = y.shape[2:]
            columns = torch.arange(end=width, dtype=y.dtype) + 0.5
            rows = torch.arange(end=height, dtype=y.dtype) + 0.5
            rows, columns = torch.meshgrid(rows, columns, indexing="ij")
            places.append(torch.stack((columns, rows), -1).view(-1, 2))
            strides.append(torch.full((height * width, 1), stride, dtype=y.dtype))
        return torch.cat(places).transpose(0, 1), torch.cat(strides).transpose(0, 1)


class Detection(nn.Module):
    """What a detector of torchvision computes before it decides about boxes."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.rpn.head if hasattr(detector, "rpn") else detector.head

    def forward(self, x: Tensor) -> Any:
        features = self.backbone(x)
        return self.head([features] if isinstance(features, Tensor) else [*features.values()])


def before_boxes(model: nn.Module) -> nn.Module:
    """The network, or of a detector of torchvision its `Detection`."""
    detects = type(model).__module__.startswith("torchvision.models.detection")
    return Detection(model) if detects else model


class FakeQuantize(quantization.FusedMovingAvgObsFakeQuantize):
    """torch's, whose op takes no float64: there it is the arithmetic that it stands for."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is not torch.float64:
            return super().forward(x)
        shape = [-1 if self.is_per_channel and n == self.ch_axis else 1 for n in range(x.dim())]
        scale, zero = self.scale.double().view(shape), self.zero_point.double().view(shape)
        steps = (x / scale).round() + zero
        return (steps.clamp(self.quant_min, self.quant_max) - zero) * scale


def quantised() -> nn.Module:
    """`QuantisedResNet` after two steps of quantisation-aware training, with observers off."""
    activations = FakeQuantize.with_args(
        observer=quantization.MovingAverageMinMaxObserver, quant_min=0, quant_max=255
    )
    weights = FakeQuantize.with_args(
        observer=quantization.MovingAveragePerChannelMinMaxObserver, quant_min=-128, quant_max=127,
        dtype=torch.qint8, qscheme=torch.per_channel_symmetric,
    )  # fmt: skip
    module = nets.randomise(QuantisedResNet()).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.qconfig = quantization.QConfig(activations, weights)
        fused = [["conv", "bn", "relu"]]
        fused += [[f"layers.{n}.{p}" for p in ("conv1", "bn1", "relu")] for n in range(2)]
        fused += [[f"layers.{n}.{p}" for p in ("conv2", "bn2")] for n in range(2)]
        fused += [["layers.1.shortcut.0", "layers.1.shortcut.1"]]
        quantization.fuse_modules_qat(module, fused, inplace=True)
        quantization.prepare_qat(module, inplace=True)
    for seed in range(2):
        module(*nets.inputs_of((2, 3, 16, 16), seed=seed))
    return module.eval().apply(quantization.disable_observer)


def _plain(
    make: Callable[..., nn.Module], *shapes: tuple[int, ...]
) -> Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]:
    return lambda: (nets.randomise(make()), nets.inputs_of(*shapes))


NETWORKS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    "stylegan2": _plain(Generator, (2, 8)),
    "siamfc": _plain(SiamFC, (2, 3, 27, 27), (2, 3, 43, 43)),
    "spatial_transformer": _plain(SpatialTransformer, (2, 1, 28, 28)),
    "crnn": _plain(CRNN, (2, 1, 8, 12)),
    "unet_by_slices": _plain(UNetBySlices, (2, 3, 18, 21)),
    "qat_resnet": lambda: (quantised(), nets.inputs_of((2, 3, 16, 16))),
    "yolov3": _plain(YoloV3, (2, 3, 32, 24)),
    "yolov5": _plain(YoloV5, (2, 3, 32, 24)),
    "yolov8": _plain(YoloV8, (2, 3, 32, 24)),
}

SWEPT = (
    *(f"torchvision/{name}" for name in (
        "raft_large", "retinanet_resnet50_fpn", "fcos_resnet50_fpn", "ssd300_vgg16",
        "ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn",
    )),
    *(f"timm/{name}" for name in (
        "eca_halonext26ts", "crossvit_tiny_240", "volo_d1_224", "coatnet_nano_rw_224",
        "tiny_vit_5m_224",
    )),
    *(f"whole/{name}" for name in NETWORKS),
)  # fmt: skip
"""What issues name beyond the families and the draw of `benchmarks/foreign.py`: of libraries, and
these."""


def made(name: str) -> Any:
    """The network of a name, and its inputs."""
    return NETWORKS[name]()
