"""Tensor maps: how a saved kernel's copy engine sees a tensor, in the file and for the driver."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import KernelError
from ...kernels.contract.spec import outermost
from ..graph.memory import Buffer

MAP_BYTES = 128
MOST_DIMENSIONS = 5
LARGEST_BOX = 256
LARGEST_EXTENT = 2**31
ALIGNMENT = 16
"""Bytes: of the first element and of every stride."""
SWIZZLES = ("NONE", "32B", "64B", "128B")
SWIZZLED_BYTES = (LARGEST_BOX * 8, 32, 64, 128)
"""Of a row of a box at most, by its swizzle."""
ELEMENTS = {torch.float32: "FLOAT32", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16"}
KIND = re.compile(r"box([1-5])(\*\w+)")
"""Of an argument in a signature: how many dimensions the map has, and what it points to."""
SMALL_BYTES = 128 * 1024
OLD_DRIVER = 13_010


@dataclass(frozen=True)
class Map:
    """A tensor inside its buffer, moved in boxes. All in elements, outermost dimension first.

    shape: at the largest batch, `batch`, with which the dimension of the largest stride scales
    where that is not None; the last stride is 1. box: what one instruction copies. swizzle: as the
    driver counts them, 3 for rows of 128 bytes.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    offset: int
    batch: int | None
    swizzle: int

    def shape_at(self, batch: int) -> tuple[int, ...]:
        if self.batch is None:
            return self.shape
        at = outermost(self.strides)
        return (*self.shape[:at], self.shape[at] // self.batch * batch, *self.shape[at + 1 :])

    def problem(self, buffer: Buffer, batches: tuple[int, int]) -> str | None:
        """Why no driver would make it, or it would reach outside of the buffer; None where it is
        sound. batches: the smallest and the largest."""
        ranks = {len(self.shape), len(self.strides), len(self.box)}
        fits = len(ranks) == 1 and 1 <= max(ranks) <= MOST_DIMENSIONS
        if not fits or buffer.dtype not in ELEMENTS:
            return f"has {sorted(ranks)} dimensions of {buffer.dtype}"
        itemsize = buffer.dtype.itemsize
        extents = all(0 < size < LARGEST_EXTENT for size in self.shape)
        copied = all(0 < size <= LARGEST_BOX for size in self.box)
        if not extents or not copied or not 0 <= self.swizzle < len(SWIZZLES):
            return f"has shape {self.shape}, box {self.box} and swizzle {self.swizzle}"
        row = self.box[-1] * itemsize
        if row % ALIGNMENT or row > SWIZZLED_BYTES[self.swizzle]:
            return f"has rows of {row} bytes, swizzle {self.swizzle}"
        places = (self.offset, *self.strides[:-1])
        if min(places) < 0 or any(place * itemsize % ALIGNMENT for place in places):
            return f"has offset {self.offset} and strides {self.strides}"
        if self.strides[-1] != 1:
            return f"has strides {self.strides}; the last one is 1"
        rows = self.shape[outermost(self.strides)]
        if self.batch is not None and (self.batch < 1 or rows % self.batch):
            return f"has {rows} rows for a batch of {self.batch}"
        for batch in (max(batches[0], 1), batches[1]):
            sizes = zip(self.shape_at(batch), self.strides, strict=True)
            end = self.offset + sum((size - 1) * stride for size, stride in sizes) + 1
            if end * itemsize > buffer.bytes_at(batch):
                return (
                    f"reaches byte {end * itemsize:,} of '{buffer.name}', which has "
                    f"{buffer.bytes_at(batch):,} for a batch of {batch}"
                )
        return None


def encoded(
    call: Callable[..., Any], driver: Any, map_: Map, tensor: torch.Tensor, batch: int
) -> list[Any]:
    """What a kernel takes in the place of a map: the driver's 128 bytes, then shape and strides.

    call(driver, name, *arguments): of a function of the driver, raising its errors. tensor: the
    whole buffer.
    """
    shape, itemsize = map_.shape_at(batch), tensor.itemsize
    address = tensor.data_ptr() + map_.offset * itemsize
    if address % ALIGNMENT:
        raise KernelError(f"a tensor map begins at {address:#x}, no multiple of {ALIGNMENT} bytes")
    made = call(
        driver,
        "cuTensorMapEncodeTiled",
        getattr(driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{ELEMENTS[tensor.dtype]}"),
        len(shape),
        address,
        [driver.cuuint64_t(size) for size in reversed(shape)],
        [driver.cuuint64_t(stride * itemsize) for stride in reversed(map_.strides[:-1])],
        [driver.cuuint32_t(size) for size in reversed(map_.box)],
        [driver.cuuint32_t(1) for _ in shape],
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{SWIZZLES[map_.swizzle]}"),
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    raw = (ctypes.c_uint8 * MAP_BYTES).from_buffer_copy(ctypes.string_at(made.getPtr(), MAP_BYTES))
    bytes_ = itemsize * sum((n - 1) * s for n, s in zip(shape, map_.strides, strict=True))
    if bytes_ + 1 < SMALL_BYTES and call(driver, "cuDriverGetVersion") <= OLD_DRIVER:
        # As Triton and CUTLASS do: these drivers set a bit that must not be set for small tensors.
        raw[10] &= ~(1 << 5)
    return [
        raw,
        *(ctypes.c_int32(size) for size in shape),
        *(ctypes.c_int64(stride) for stride in map_.strides),
    ]

