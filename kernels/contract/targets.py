"""The machines convloom generates code for, and what each of them allows.

Limits are NVIDIA's published ones (CUDA C++ Programming Guide, table of technical specifications
per compute capability).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...errors import TargetUnavailableError, near_names

EMULATOR = "emulator:"
"""In front of a generation: the PTX that is compiled for it is emulated on the CPU."""


@dataclass(frozen=True)
class Target:
    """One thing a plan can be made for.

    capability: CUDA compute capability times ten; 0 where no GPU code is generated.
    shared_bytes: the most shared memory one block may use.
    """

    name: str
    capability: int = 0
    shared_bytes: int = 0
    registers_per_thread: int = 255

    @property
    def is_gpu(self) -> bool:
        """Whether its kernels are compiled for a GPU; an emulated one counts."""
        return self.capability > 0

    @property
    def is_emulated(self) -> bool:
        return self.name.startswith(EMULATOR)

    @property
    def has_times(self) -> bool:
        """Whether its kernels take the time of a GPU, which can be modelled."""
        return self.is_gpu and not self.is_emulated

    @property
    def compiled_as(self) -> str:
        """The target of the same code: "cuda:sm_90" of "emulator:sm_90", else its own name."""
        return self.name.replace(EMULATOR, "cuda:")

    def shared_shortage(self, needed: int) -> str | None:
        """Why a program cannot have so many bytes of shared memory, or None."""
        if needed <= self.shared_bytes:
            return None
        return f"needs {needed} bytes of shared memory; {self.name} has {self.shared_bytes}"


REFERENCE = Target("reference", shared_bytes=1 << 40)
INTERPRETER = Target("interpreter", shared_bytes=1 << 40)
GPU_TARGETS = (
    Target("cuda:sm_80", 80, 166_912),
    Target("cuda:sm_86", 86, 101_376),
    Target("cuda:sm_89", 89, 101_376),
    Target("cuda:sm_90", 90, 232_448),
    Target("cuda:sm_100", 100, 232_448),
)
EMULATED = tuple(
    replace(target, name=target.name.replace("cuda:", EMULATOR))
    for target in GPU_TARGETS
    if target.capability < 100
)
TARGETS = (REFERENCE, INTERPRETER, *GPU_TARGETS, *EMULATED)
NAMES = ("cuda", *(target.name for target in TARGETS))


def parse(name: str) -> Target:
    """The target of that name; "cuda" is the GPU of this machine.

    Raises: TargetUnavailableError for an unknown name, or for "cuda" where there is no GPU or one
    of an unsupported generation.
    """
    for target in TARGETS:
        if target.name == name:
            return target
    if name == "cpu":
        raise TargetUnavailableError(
            "target 'cpu': use 'interpreter', which runs the kernels on the CPU (slowly), or "
            "'reference', which runs the fused graph by torch ops"
        )
    if name != "cuda":
        raise TargetUnavailableError(f"unknown target {name!r}; {near_names(str(name), NAMES)}")
    capability = local_capability()
    if capability is None:
        raise TargetUnavailableError(
            "target 'cuda': this machine has no usable NVIDIA GPU. Use target='interpreter' to run "
            "the same kernels on the CPU, or target='cuda:sm_90' to compile without running"
        )
    return nearest(capability)


def nearest(capability: int) -> Target:
    """The supported generation whose code runs on a device of this capability.

    Raises: TargetUnavailableError when the device is older than every supported generation.
    """
    exact = [target for target in GPU_TARGETS if target.capability == capability]
    if exact:
        return exact[0]
    older = [target for target in GPU_TARGETS if target.capability < capability]
    same_major = [t for t in older if t.capability // 10 == capability // 10]
    if not same_major:
        supported = ", ".join(f"sm_{target.capability}" for target in GPU_TARGETS)
        raise TargetUnavailableError(
            f"target 'cuda': this GPU is sm_{capability}; supported are {supported}"
        )
    return same_major[-1]


def local_capability() -> int | None:
    """Compute capability times ten of the current CUDA device, or None where there is none."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return major * 10 + minor
