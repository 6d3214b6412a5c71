"""The exception family: one root, one class per kind of mistake.

Every message says what, where, what was expected, what was found and what to do.
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable

WIDTH = 96
"""Columns of a list of names in a message."""


class ConvloomError(Exception):
    """Root of every error that convloom raises on purpose."""


class UnsupportedOpError(ConvloomError):
    """Some node of the model has no kernel; lists every such node at once."""


class CaptureError(ConvloomError):
    """The module cannot be turned into a dataflow graph."""


class InvalidInputError(ConvloomError, ValueError):
    """An argument has the wrong rank, shape, dtype, device, count or value."""


class TargetUnavailableError(ConvloomError):
    """The requested target cannot run, or cannot be compiled for, on this machine."""


class ArtifactError(ConvloomError):
    """A file (weights, image, executable, ledger) is missing, damaged or not what it claims."""


class GraphError(ConvloomError):
    """A graph breaks one of its own laws: a defect of a pass, not of the user's model."""


class KernelError(ConvloomError):
    """A kernel cannot be built, compiled or launched for the problem it was asked to solve."""


class UnsafeKernelError(KernelError):
    """What the compiler made of a kernel in one configuration may be wrong; that of another need
    not be."""


class ExtensionError(ConvloomError):
    """An extension cannot be imported, clashes with another or with convloom, or is not what an
    extension has to be."""


def near_names(name: str, known: Iterable[str], listed_by: str = "") -> str:
    """A hint for an unknown name: the closest known ones, or where none is close all of them, over
    several lines where they are many; or instead the command that lists them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=5)
    if close:
        return "did you mean " + ", ".join(close) + "?"
    if listed_by:
        return f"{listed_by} lists the {len(known)} that there are"
    told = "known: " + ", ".join(known)
    return textwrap.fill(told, WIDTH, break_long_words=False, break_on_hyphens=False)


def visible(text: str) -> str:
    """The text with what a terminal would obey, or cannot encode, as escapes: controls, marks that
    turn the direction of writing, lone surrogates. Names come from files and modules of anybody."""
    if text.isprintable():
        return text
    return "".join(
        c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode() for c in text
    )
