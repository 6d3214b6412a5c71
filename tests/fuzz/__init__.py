"""Random networks as text, what every compiled network promises, and the smallest that breaks it.

program: networks whose layers and statements are lines of Python; builder, layers, motifs and
grammar: how a seed becomes one; contract: what is checked; shrink: what is printed of a failure;
`python -m tests.fuzz --seeds 0:10000` runs many.
"""
