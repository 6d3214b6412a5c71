"""What the hardware allows: bounds per model, to set beside what the compiler plans.

A bound is the sum over kernels of max(FLOP / 790 TFLOP/s, bytes / 4.3 TB/s) on an H200 in fp16, for
the kernels that a level of fusion would leave, every tensor touched once:

    U   every op a kernel
    E   convolution + normalisation + activation + residual
    EP  E, and pooling, LRN and averages fused, concatenations in place, sibling 1x1 merged
    T   EP, and whole blocks where their weights are small, expand-reduce chains elsewhere

Computed by hand-made groupings of each network at batch 256; halo recomputation, re-read weights
and waves are ignored, so no kernel can be faster.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """Milliseconds at batch 256, gigabytes of DRAM traffic at batch 256, launches wanted."""

    u_ms: float
    e_ms: float
    ep_ms: float
    t_ms: float
    e_gb: float
    t_gb: float
    launches: int | None = None

    def at(self, batch: int) -> dict[str, float]:
        """Microseconds by level. Below 256 images in proportion: weights, which do not shrink,
        are left out, so that the bound is still one."""
        levels = {"U": self.u_ms, "E": self.e_ms, "EP": self.ep_ms, "T": self.t_ms}
        return {name: value * 1e3 * batch / 256 for name, value in levels.items()}


BOUNDS = {
    "lenet5": Bounds(0.00518, 0.00208, 0.000576, 0.000576, 0.00893, 0.00248, 5),
    "alexnet": Bounds(1.24, 0.926, 0.736, 0.736, 1.49, 0.471),
    "vgg_d": Bounds(17.7, 11.3, 10.4, 10.0, 15.8, 6.25, 16),
    "googlenet": Bounds(3.72, 2.19, 1.12, 1.12, 7.54, 2.33, 42),
    "inception_v3": Bounds(10.3, 5.99, 4.24, 4.24, 18.4, 9.1, 80),
    "resnet18": Bounds(2.76, 1.35, 1.19, 1.19, 3.19, 1.73, 21),
    "resnet50": Bounds(10.6, 4.25, 4.06, 3.02, 14.1, 8.61, 38),
    "resnext50_32x4d": Bounds(12.6, 4.65, 4.45, 3.31, 17.4, 10.9),
    "mobilenet_v1": Bounds(3.7, 1.3, 1.29, 0.825, 5.25, 3.22, 16),
    "mobilenet_v2": Bounds(4.74, 1.64, 1.63, 0.404, 7.04, 1.6, 30),
}
"""By zoo model; models without an entry have no bound computed."""
