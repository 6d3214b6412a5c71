"""Networks of torchvision and timm as the sweep compiles them (`sweep.py`)."""

from __future__ import annotations

import copy
import importlib
import itertools
import math
import random
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from convloom.compiler.artifact.load import load_bytes
from convloom.compiler.artifact.write import save
from convloom.compiler.capture.capture import capture
from convloom.compiler.explain.report import Report
from convloom.compiler.graph.ir import CompileTarget, Graph
from convloom.compiler.graph.torch_call import TorchCall
from convloom.compiler.passes import run_passes
from convloom.compiler.plan.lower import Options, lower
from convloom.compiler.plan.plan import Plan
from convloom.compiler.run.executable import Executable
from convloom.compiler.run.runtime import InterpreterRunner, ReferenceRunner
from convloom.errors import InvalidInputError, near_names
from convloom.kernels.contract import targets, tolerance
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Families of architectures; the kernels are interpreted for the first member of each.
TORCHVISION = {
    "alexnet": ("alexnet",), "vgg": ("vgg11", "vgg16_bn"), "googlenet": ("googlenet",),
    "inception": ("inception_v3",),
    "resnet": ("resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"),
    "mobilenet_v2": ("mobilenet_v2",), "mobilenet_v3": ("mobilenet_v3_small", "mobilenet_v3_large"),
    "densenet": ("densenet121",), "squeezenet": ("squeezenet1_1", "squeezenet1_0"),
    "shufflenet": ("shufflenet_v2_x1_0",), "mnasnet": ("mnasnet1_0",),
    "efficientnet": ("efficientnet_b0", "efficientnet_v2_s"),
    "regnet": ("regnet_y_400mf", "regnet_x_400mf"), "convnext": ("convnext_tiny",),
}  # fmt: skip
TIMM = {
    "resnet": ("resnet18", "resnet50", "resnet50d", "resnext50_32x4d"),
    "resnetv2": ("resnetv2_50",), "resnets with attention": ("seresnet50", "ecaresnet50d"),
    "sknet": ("skresnet50",), "resnest": ("resnest50d",), "res2net": ("res2net50_26w_4s",),
    "densenet": ("densenet121",), "dpn": ("dpn68",), "inception": ("inception_v3",),
    "inception_v4": ("inception_v4", "inception_resnet_v2"), "xception": ("xception", "xception41"),
    "vgg": ("vgg16",),
    "efficientnet": ("efficientnet_b0", "tf_efficientnet_b0", "efficientnetv2_rw_s"),
    "mobilenet": ("mobilenetv2_100", "mobilenetv3_large_100"),
    "mobilenetv4": ("mobilenetv4_conv_small",),
    "mobilenetv4_hybrid": ("mobilenetv4_hybrid_medium",), "mixnet": ("mixnet_s",),
    "ghostnet": ("ghostnet_100",), "repvgg": ("repvgg_a2",), "mobileone": ("mobileone_s1",),
    "regnet": ("regnety_008",), "convnext": ("convnext_tiny", "convnextv2_tiny"),
    "nfnet": ("nfnet_f0",), "dla": ("dla34",), "hrnet": ("hrnet_w18_small",),
    "searched": ("lcnet_050", "hardcorenas_a", "tinynet_a", "semnasnet_100", "fbnetc_100"),
    "csp": ("cspdarknet53", "darknet53"), "vovnet": ("vovnet39a",), "rexnet": ("rexnet_100",),
    "selecsls": ("selecsls42b",), "hgnet": ("hgnetv2_b0",),
    "inception_next": ("inception_next_tiny",), "edgenext": ("edgenext_small",),
    "fastvit": ("fastvit_t8",), "efficientvit": ("efficientvit_b0",), "starnet": ("starnet_s1",),
    "poolformer": ("poolformer_s12",), "convmixer": ("convmixer_768_32",), "gernet": ("gernet_s",),
    "visformer": ("visformer_tiny",), "tresnet": ("tresnet_m",),
    "bat_resnext": ("bat_resnext26ts",),
}  # fmt: skip
LIBRARIES = {"torchvision": TORCHVISION, "timm": TIMM}
FAMILIES = {
    f"{library}/{member}": f"{library}/{family}"
    for library, families in LIBRARIES.items()
    for family, members in families.items()
    for member in members
}
"""The family of each model."""
FIRST = frozenset(
    f"{library}/{members[0]}"
    for library, families in LIBRARIES.items()
    for members in families.values()
)
SEED, DRAWN, LARGEST = 17, 100, 30_000_000
"""The draw of further networks: its seed, how many, and of how many parameters at most."""
SIDES = (64, 96, 128, 160, 224, 256, 384, 448, 518)
"""Some networks need a larger image, or one of the size they were made for."""
BATCH, FRAMES = 2, 16
FORMS: tuple[Callable[[int], tuple[tuple[int, ...], ...]], ...] = (
    lambda side: ((BATCH, 3, side, side),),
    lambda side: ((BATCH, 3, side, side),) * 2,
    lambda side: ((1, 3, FRAMES, side, side),),
)
"""What networks take: images, two images of each scene, videos."""

_KEPT: list[torch.library.Library] = []


def import_libraries() -> tuple[ModuleType, ModuleType]:
    """torchvision and timm. Raises: ImportError where one is not installed."""
    return import_library("torchvision"), import_library("timm")


def import_library(name: str) -> ModuleType:
    """torchvision or timm.

    torchvision's wheels are built for CUDA: beside a torch for the CPU their first import fails,
    because the operators of its own are not there. They are then declared, which is enough for
    networks that do not call them.

    Raises: ImportError where it is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torchvision = importlib.import_module("torchvision")
        except RuntimeError:
            for each in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
                del sys.modules[each]
            operators = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                operators.define(operator + signature)
            _KEPT.append(operators)
            torchvision = importlib.import_module("torchvision")
        return torchvision if name == "torchvision" else importlib.import_module(name)


def build(name: str) -> nn.Module:
    """The network "torchvision/NAME" or "timm/NAME" with random weights, ready for inference."""
    return named(name)[0]


def draw() -> list[str]:
    """DRAWN names beside FAMILIES, the smallest network first: of all names of both libraries in
    an order shuffled by SEED, the first that have at most LARGEST parameters. Left out are
    detectors (how many boxes there are depends on the image) and networks of int8 operators.

    Raises: ImportError where a library is not installed.
    """
    torchvision, timm = import_libraries()
    detectors = torchvision.models.list_models(module=torchvision.models.detection)
    quantised = torchvision.models.list_models(module=torchvision.models.quantization)
    others = set(torchvision.models.list_models()) - set(detectors) - set(quantised)
    names = {*(f"torchvision/{n}" for n in others), *(f"timm/{n}" for n in timm.list_models())}
    order = sorted(names - set(FAMILIES))
    random.Random(SEED).shuffle(order)
    sizes: dict[str, int] = {}
    for name in order:
        size = sum(parameter.numel() for parameter in _created(name, "meta").parameters())
        if size <= LARGEST:
            sizes[name] = size
        if len(sizes) == DRAWN:
            break
    return sorted(sizes, key=lambda name: (sizes[name], name))


def _created(name: str, device: str) -> nn.Module:
    """The network as its library makes it; on the CPU where it cannot be made on "meta"."""
    library, _, member = name.partition("/")
    package = import_library(library)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            with torch.device(device):
                if library == "timm":
                    return package.create_model(member)
                try:  # Networks with a backbone would download its weights.
                    return package.models.get_model(member, weights=None, weights_backbone=None)
                except TypeError:
                    return package.models.get_model(member, weights=None)
        except (NotImplementedError, RuntimeError):
            if device == "cpu":
                raise
        return _created(name, "cpu")


def named(name: str) -> tuple[nn.Module, tuple[int, ...] | None]:
    """The network, and the image that its published weights take, (C, H, W), where that is said.

    Raises: ImportError where the library is not installed, InvalidInputError with the nearest names
    for one that it does not have.
    """
    library, _, member = name.partition("/")
    package = import_library(library)
    known = package.models.list_models() if library == "torchvision" else package.list_models()
    if member not in known:
        raise InvalidInputError(f"{library} has no model {member!r}; {near_names(member, known)}")
    model = randomised(_created(name, "cpu")).eval()
    if library == "timm":
        return model, tuple(model.pretrained_cfg["input_size"])
    weights = next(iter(package.models.get_model_weights(member)), None)
    side = getattr(getattr(weights, "transforms", None), "keywords", {}).get("crop_size")
    # Of videos it is a pair, and how many frames they have nothing says.
    return model, (3, side, side) if isinstance(side, int) else None


def randomised(model: nn.Module) -> nn.Module:
    """The model with weights that keep the scale of activations, and nothing left at 0 or 1:
    libraries start the last scale of a residual branch at 0, which would hide the branch."""
    generator = torch.Generator().manual_seed(0)
    statistics = {n: b for n, b in model.named_buffers() if n.endswith(("_mean", "_var"))}
    for name, tensor in (*model.named_parameters(), *statistics.items()):
        values = tensor.detach()
        if values.dim() > 1:
            values.normal_(generator=generator).mul_(math.sqrt(2.0 / values[0].numel()))
        elif values.dim() == 0 or name.endswith(("weight", "running_var")):
            values.uniform_(0.5, 1.0, generator=generator)
        else:
            values.normal_(std=0.3, generator=generator)
    return model


def fitting_inputs(model: nn.Module) -> tuple[torch.Tensor, ...]:
    """The smallest batch of random square images, pairs of images or videos that the model takes.

    Raises: ValueError with the model's own complaint when it takes none.
    """
    complaint: Exception | None = None
    for form, side in itertools.product(FORMS, SIDES):
        generator = torch.Generator().manual_seed(side)
        inputs = tuple(torch.randn(shape, generator=generator) for shape in form(side))
        try:
            with torch.no_grad():
                model(*inputs)
        except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
            complaint = complaint or error
            continue
        return inputs
    raise ValueError(f"takes no image of side {SIDES}: {complaint!r}") from complaint


@dataclass(frozen=True)
class Foreign:
    """A captured network, its inputs and the tensors it should return."""

    captured: Graph
    inputs: tuple[torch.Tensor, ...]
    exact: Sequence[torch.Tensor]
    eager: Sequence[torch.Tensor]
    depth: int

    def executable(self, target: str, passes: str = "default") -> Executable:
        """Compiled for "reference" or "interpreter"; calls without a kernel run as torch ops."""
        graph, plan, ledger = self.planned(target, passes)
        reference = plan.target is targets.REFERENCE
        runner = ReferenceRunner(graph) if reference else InterpreterRunner(plan)
        return Executable(graph, plan, ledger, runner, (save, load_bytes))

    def planned(self, target: str, passes: str = "default") -> tuple[Graph, Plan, Report]:
        """What comes before code, for any target."""
        ledger, chosen = Report(), targets.parse(target)
        self.captured.goal = CompileTarget(chosen)
        graph = run_passes(self.captured, ledger, passes, fallback="torch")
        return graph, lower(graph, self.captured, Options(chosen), ledger), ledger

    def check(self, executable: Executable) -> str | None:
        """What is wrong with the executable's results, in words, or None."""
        if not all(exact.isfinite().all() for exact in self.exact):
            return "the module's own result is not finite, so nothing can be compared"
        results = tree_leaves(executable(*self.inputs))
        compared = zip(results, self.exact, self.eager, strict=True)
        texts = (tolerance.compare(*tensors, self.depth) for tensors in compared)
        return next((text for text in texts if text), None)


class Doubles(TorchDispatchMode):
    """Inside, what a network makes of nothing or converts to fp32 is fp64 too."""

    def __enter__(self) -> Doubles:
        torch.set_default_dtype(torch.float64)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        torch.set_default_dtype(torch.float32)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return function(*args, **kwargs)


def prepared(name: str) -> Foreign:
    """Builds and captures a network.

    Raises: ImportError, ValueError from `fitting_inputs`, CaptureError.
    """
    # Not at the top: the command line imports this module.
    from convloom.tests.whole_nets import before_boxes, made

    if name.startswith("whole/"):
        model, inputs = made(name.partition("/")[2])
    else:
        model = before_boxes(build(name))
        inputs = fitting_inputs(model)
    with torch.no_grad():
        eager = tree_leaves(model(*inputs))
        with Doubles():
            exact = tree_leaves(copy.deepcopy(model).double()(*(x.double() for x in inputs)))
    weights = (p for p in model.parameters() if p.dim() > 1)
    return Foreign(capture(model, inputs), inputs, exact, eager, sum(w[0].numel() for w in weights))


def missing_ops(executable: Executable) -> Sequence[TorchCall]:
    """The calls of an executable that have no kernel."""
    calls = (node.attributes for node in executable.graph.nodes())
    return [call for call in calls if isinstance(call, TorchCall)]
