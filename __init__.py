"""convloom: convolutional networks from PyTorch to fused Triton executables.

    exe = convloom.compile(model, (torch.randn(1, 3, 224, 224),), target="interpreter")
    y = exe(x)

Everything is imported when first used, so that `import convloom` needs neither torch nor triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    ArtifactError,
    CaptureError,
    ConvloomError,
    ExtensionError,
    GraphError,
    InvalidInputError,
    KernelError,
    TargetUnavailableError,
    UnsupportedOpError,
)
from .settings import VERSION as __version__

if TYPE_CHECKING:
    from . import testing as testing
    from . import zoo
    from .compiler.api import Planned, ablate, compile, plan
    from .compiler.artifact.load import LoadedExecutable, load
    from .compiler.explain.ablation import Ablation
    from .compiler.run.executable import Executable
    from .compiler.torch_compile import executables
    from .extensions import Extension, register

_LAZY = {
    "compile": ("convloom.compiler.api", "compile"),
    "plan": ("convloom.compiler.api", "plan"),
    "ablate": ("convloom.compiler.api", "ablate"),
    "Planned": ("convloom.compiler.api", "Planned"),
    "Ablation": ("convloom.compiler.explain.ablation", "Ablation"),
    "load": ("convloom.compiler.artifact.load", "load"),
    "LoadedExecutable": ("convloom.compiler.artifact.load", "LoadedExecutable"),
    "Executable": ("convloom.compiler.run.executable", "Executable"),
    "executables": ("convloom.compiler.torch_compile", "executables"),
    "Extension": ("convloom.extensions", "Extension"),
    "register": ("convloom.extensions", "register"),
    "testing": ("convloom.testing", None),
    "zoo": ("convloom.zoo", None),
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'convloom' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    loaded = importlib.import_module(module)
    return loaded if attribute is None else getattr(loaded, attribute)


# Without `testing`, which needs pytest.
__all__ = [
    "Ablation",
    "ArtifactError",
    "CaptureError",
    "ConvloomError",
    "Executable",
    "Extension",
    "ExtensionError",
    "GraphError",
    "InvalidInputError",
    "KernelError",
    "LoadedExecutable",
    "Planned",
    "TargetUnavailableError",
    "UnsupportedOpError",
    "__version__",
    "ablate",
    "compile",
    "executables",
    "load",
    "plan",
    "register",
    "zoo",
]
