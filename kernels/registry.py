"""Every op convloom knows, by name: one line per file.

The table is complete when this module has been imported and never changes afterwards.
"""

from __future__ import annotations

from ..errors import UnsupportedOpError, near_names
from .contract.op import Op
from .convolution import conv2d, conv_nd, conv_transpose, sample_conv
from .fused import (
    conv_mean,
    conv_pool,
    conv_rearrange,
    conv_sum,
    head,
    lrn_pool,
    pool_conv,
    small_net,
    squeeze_excite,
    stem,
    stem_input,
)
from .fused.chains import conv_chain, separable
from .movement import movement_ops, pad, pointwise_ops, rearrange, unfold
from .normalisation import batch_norm, lrn, normalize, reduce, scan, softmax, topk
from .pooling import (
    adaptive_pool,
    grid_sample,
    max_pool_indices,
    max_unpool,
    median_pool,
    mixed_pool,
    pool,
    resample,
    upsample,
)
from .products import bmm, linear

OPS: tuple[Op, ...] = (
    conv2d.OP,
    conv_chain.OP,
    *conv_nd.OPS,
    *conv_transpose.OPS,
    sample_conv.OP,
    conv_mean.OP,
    conv_pool.OP,
    conv_rearrange.OP,
    conv_sum.OP,
    separable.OP,
    stem.OP,
    stem_input.OP,
    linear.OP,
    head.OP,
    small_net.OP,
    bmm.OP,
    *pointwise_ops.OPS,
    *movement_ops.OPS,
    *rearrange.OPS,
    *unfold.OPS,
    *softmax.OPS,
    *reduce.OPS,
    *scan.OPS,
    topk.OP,
    batch_norm.OP,
    normalize.OP,
    *pool.OPS,
    max_pool_indices.OP,
    max_unpool.OP,
    median_pool.OP,
    mixed_pool.OP,
    pool_conv.OP,
    squeeze_excite.OP,
    *adaptive_pool.OPS,
    lrn.OP,
    lrn_pool.OP,
    pad.OP,
    *upsample.OPS,
    resample.OP,
    grid_sample.OP,
)
BY_NAME: dict[str, Op] = {op.name: op for op in OPS}
CAPTURES: dict[str, Op] = {target: op for op in OPS for target in op.aten}

assert len(BY_NAME) == len(OPS), "two ops share a name"
assert len(CAPTURES) == sum(len(op.aten) for op in OPS), "two ops capture the same aten overload"


def get(name: str) -> Op:
    """The op of that name.

    Raises: UnsupportedOpError with the near names.
    """
    if name not in BY_NAME:
        raise UnsupportedOpError(f"unknown op {name!r}; {near_names(name, BY_NAME)}")
    return BY_NAME[name]
