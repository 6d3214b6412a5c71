"""Ways to compute products that no GPU has timed yet; whoever reads the kernels may skip them.

None of them is a default: the cost model does not tell them from the plain tiles of `tile/gemm.py`
and `tile/engine.py`, and they are candidates for the tuner alone (`products/product.py`,
`convolution/implicit.py`). So is the residual that is read before the loop (`tile/residual.py`),
which is a line of those kernels. The core whose warps do different things has a folder of its own
(`hopper/`).
"""
