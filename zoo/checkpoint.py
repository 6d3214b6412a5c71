"""Parameters from files: `load_weights(model, "resnet50.pth")`."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from ..errors import ArtifactError

Weights: TypeAlias = str | os.PathLike[str] | None
Model = TypeVar("Model", bound=nn.Module)

NOTES_KEY = "notes"

_CHECK_FILE = "Check the path, or obtain the file again."
_LISTED_NAMES = 8


def load_weights(
    model: Model,
    weights: Weights,
    *,
    rename: Callable[[str], str] = str,
    hint: str = _CHECK_FILE,
) -> Model:
    """Returns `model`, its parameters and buffers replaced by those in the file `weights`.

    `None` leaves the model as it is. Values are cast to the model's dtypes. `rename` maps a name
    in the file to the model's name; `hint` is what an error about the file tells the user to do.

    Raises: ArtifactError when the file is missing, is no .safetensors or .pth file or cannot be
    read, and when its names or shapes are not the model's: then all differences are listed, and
    the model is unchanged.
    """
    if weights is None:
        return model
    path = Path(weights)
    found = {rename(name): value for name, value in _read(path, hint).items()}
    state = model.state_dict()
    # Files written before torch 0.4.1 lack the batch counters, which only training reads.
    missing = {name for name in state if not name.endswith("num_batches_tracked")} - found.keys()
    unexpected = found.keys() - state.keys()
    misshaped = [
        f"{name} (expected {tuple(value.shape)}, got {tuple(found[name].shape)})"
        for name, value in state.items()
        if name in found and found[name].shape != value.shape
    ]
    misshaped += [
        f"{name} (expected {_kind(value)}, got {_kind(found[name])})"
        for name, value in state.items()
        if name in found and _kind(found[name]) != _kind(value)
    ]
    if missing or unexpected or misshaped:
        raise ArtifactError(
            f"cannot load weights from '{path}': it does not fit this {type(model).__name__}; "
            f"missing: {_listed(missing)}; unexpected: {_listed(unexpected)}; "
            f"mis-shaped: {_listed(misshaped)}. Use the file of this very model, or build the "
            "model with the num_classes (and auxiliary heads) that the file was trained with."
        )
    model.load_state_dict(state | found)
    return model


def read_notes(path: str | os.PathLike[str]) -> dict[str, str]:
    """How the weights in a .safetensors file were made: data, split, seed, accuracy.

    Raises: ArtifactError when the file is missing, is damaged or carries no such notes.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            notes = json.loads((file.metadata() or {})[NOTES_KEY])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(
            f"cannot read the notes of '{path}': expected a .safetensors file with a metadata "
            f"entry {NOTES_KEY!r}, got {_one_line(error)}. {_CHECK_FILE}"
        ) from error
    return dict(notes)


def _read(path: Path, hint: str) -> dict[str, Tensor]:
    """The named tensors of a .safetensors or .pth file."""
    try:
        return _parse(path)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"cannot load weights from '{path}': expected a .safetensors or .pth file of named "
            f"tensors, got {_one_line(error)}. {hint}"
        ) from error


def _parse(path: Path) -> dict[str, Tensor]:
    """As `_read`; raises a ValueError that says what the file is instead."""
    if not path.is_file():
        raise ValueError("a folder" if path.is_dir() else "no such file")
    state: object
    if path.suffix == ".safetensors":
        state = _parse_safetensors(path)
    elif path.suffix in (".pth", ".pt"):
        state = _parse_pickle(path)
    else:
        raise ValueError(f"a file with the suffix {path.suffix!r}")
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"a {type(state).__name__} that holds other things")
    return dict(state)


def _parse_safetensors(path: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, KeyError, MemoryError, TypeError) as error:
        raise ValueError(f"a damaged one ({_one_line(error)})") from error


def _parse_pickle(path: Path) -> object:
    try:
        # weights_only: a .pth file is a pickle, and must not run code of its author's choosing.
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError("a pickle that is damaged or holds more than tensors") from error
    except Exception as error:  # A pickle may fail in anything that it can name.
        raise ValueError(f"a damaged one ({_one_line(error)})") from error


def _kind(tensor: Tensor) -> str:
    """What values can be copied from: a cast from whole numbers or truth values would be silent."""
    if tensor.is_quantized or tensor.is_meta or tensor.layout is not torch.strided:
        return f"{tensor.dtype} {tensor.layout} on {tensor.device}".replace("torch.", "")
    return "floats" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")


def _listed(names: Iterable[str]) -> str:
    """Names for a message, the first few of them when there are many."""
    ordered = sorted(names)
    more = len(ordered) - _LISTED_NAMES
    shown = ", ".join(ordered[:_LISTED_NAMES]) or "none"
    return f"{shown} and {more} more" if more > 0 else shown


def _one_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
