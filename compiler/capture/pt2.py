"""A file that torch.export.save wrote, read as the file of a stranger.

torch.export.load runs what a file says: pickles among the weights and the example, compiled
libraries, and text that is evaluated as Python (guards, sizes, names in generated code). Here the
members are listed, the JSON is read by rules that leave none of that in it, and what torch loads is
another zip, written of the members that were read.
"""

from __future__ import annotations

import io
import json
import math
import re
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import load_pt2  # `torch.export.load` hides what is wrong.

from ...errors import ArtifactError

MODEL, EXAMPLE = "models/model.json", "data/sample_inputs/model.pt"
PAYLOADS = {
    "data/weights/": "data/weights/model_weights_config.json",
    "data/constants/": "data/constants/model_constants_config.json",
}
"""Folders of tensors, and what lists them."""
NEEDED = (
    MODEL, EXAMPLE, *PAYLOADS.values(), "archive_format", "archive_version", "byteorder",
    ".data/version",
)  # fmt: skip
TENSOR = re.compile(r"data/(weights/weight|constants/tensor)_\d{1,9}")
LEFT_OUT = ("extra/", ".data/serialization_id")
"""Texts beside the program, and torch's own note: not read."""
LARGEST_JSON = 1 << 28
MOST_MEMBERS = 1 << 16
LONGEST_SIZE = 1000
"""Letters of an expression."""
SMALL = 1 << 20
"""Bytes that a tensor of repeated numbers may unfold to without being in the file."""

NAME = re.compile(r"[\w.]*")
"""Of tensors and modules: words that no Python is made of."""
TEXT = re.compile(r"[\w .,>+\-]*")
"""Of an argument: "reflect", "bij,bjk->bik"."""
SYMBOL = re.compile(r"Symbol\('[su]\d+'(?:, (?:positive|integer|nonnegative)=True)*\)")
SIZES = re.compile(r"[su]?\d+|Integer|Add|Mul|FloorDiv|CeilDiv|CleanDiv|Mod|PythonMod|Max|Min")
"""What sizes are computed of, as sympy's `srepr` writes them. A power could have any size."""
METADATA = ("nn_module_stack",)
"""What is kept of where a call comes from: the path in the module."""
CONTAINERS = ("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", None)
FUNCTIONS = re.compile(
    r"_operator\.(getitem|add|sub|mul|floordiv|truediv|mod|neg|eq|ne|lt|le|gt|ge|and_|or_)"
    r"|math\.(ceil|floor|trunc)|torch\.sym_(int|float|not|max|min)"
)
"""Calls that are no ops of torch."""


def load(path: Path) -> ExportedProgram:
    """The program in a .pt2 file; its weights are the file's.

    Raises: ArtifactError naming the file, for one that is none, is damaged, or holds what would be
    run while it is loaded.
    """
    try:
        with zipfile.ZipFile(path) as source, tempfile.NamedTemporaryFile(suffix=".pt2") as copy:
            _rewrite(source, copy)
            copy.flush()
            program: ExportedProgram = load_pt2(copy.name).exported_programs["model"]
            return program
    except _RefusedError as error:
        raise ArtifactError(f"'{path}' {error}") from error
    except zipfile.BadZipFile as error:
        raise ArtifactError(
            f"'{path}' is not an exported program (a zip by torch.export.save): {error}"
        ) from error
    except OSError as error:
        raise ArtifactError(f"cannot read '{path}': {error.strerror or error}") from error
    except Exception as error:  # torch has as many errors as files have ways to be wrong.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ArtifactError(
            f"'{path}' is damaged, or of another torch than {torch.__version__}: {lines[0][:200]}"
        ) from error


class _RefusedError(Exception):
    """What is wrong with the file, without its path."""


def _rewrite(source: zipfile.ZipFile, copy: IO[bytes]) -> None:
    """Writes what may be loaded of a file into another."""
    members = _members(source)
    texts = {name: _json(source, members, name) for name in (MODEL, *PAYLOADS.values())}
    texts[MODEL]["guards_code"] = []  # Python; the example's shapes are held to anyway.
    _check(texts[MODEL], "the program")
    for folder, name in PAYLOADS.items():
        _check_payloads(texts[name], folder, members)
    example = source.read(members[EXAMPLE])
    try:
        if example:
            torch.load(io.BytesIO(example), weights_only=True)
    except Exception as error:  # A pickle may fail in anything that it can name.
        raise _RefusedError(
            "holds an example of inputs that is more than tensors: loading it would run code. Save "
            "the program with plain tensors as its example"
        ) from error
    with zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as target:
        for name, entry in members.items():
            content = json.dumps(texts[name]) if name in texts else source.read(entry)
            target.writestr(f"model/{name}", content)


def _members(source: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The members that are loaded, by name without the folder that they are all in."""
    entries = source.infolist()
    if len(entries) > MOST_MEMBERS:
        raise _RefusedError(f"has {len(entries):,} members; expected at most {MOST_MEMBERS:,}")
    members: dict[str, zipfile.ZipInfo] = {}
    for entry in entries:
        _, slash, name = entry.filename.partition("/")
        if not slash or name.startswith(LEFT_OUT):
            continue
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise _RefusedError(f"is not a file of torch.export.save: '{name}' is compressed")
        if name in members:
            raise _RefusedError(f"holds '{name}' twice")
        if name not in NEEDED and not TENSOR.fullmatch(name):
            raise _RefusedError(
                f"holds '{name[:80]}', which is loaded by running code or is no part of a program; "
                "expected what torch.export.save writes of a module with plain tensors"
            )
        members[name] = entry
    for name in NEEDED:
        if name not in members:
            raise _RefusedError(
                f"is not an exported program: it has no '{name}'. Save it with torch.export.save "
                "of torch 2.9 or newer"
            )
    return members


def _json(source: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], name: str) -> Any:
    if members[name].file_size > LARGEST_JSON:
        raise _RefusedError(f"is damaged: '{name}' has {members[name].file_size:,} bytes")
    try:
        value = json.loads(source.read(members[name]))
        if isinstance(value, dict):
            return value
    except (ValueError, RecursionError) as error:
        raise _RefusedError(f"is damaged: '{name}' is not JSON: {error}") from error
    raise _RefusedError(f"is damaged: '{name}' is not a JSON object")


def _check_payloads(listed: Any, folder: str, members: Mapping[str, zipfile.ZipInfo]) -> None:
    """Raises: _RefusedError for tensors that are pickled, absent or larger than what is there."""
    for path, payload in listed.get("config", {}).items():
        if payload.get("use_pickle") or not payload.get("tensor_meta"):
            raise _RefusedError(
                f"holds '{path}' as a pickle, which runs code when it is loaded; expected plain "
                "dense tensors. Convert it before torch.export.export"
            )
        _check(payload, path)
        name = folder + str(payload.get("path_name"))
        if name not in members:
            raise _RefusedError(f"is damaged: '{path}' is in '{name}', which is not there")
        meta = payload["tensor_meta"]
        sizes = [size["as_int"] for size in meta["sizes"]]
        # No dtype has more bytes; what strides reach beyond the member, torch refuses.
        if math.prod(sizes) > max(members[name].file_size, SMALL):
            raise _RefusedError(
                f"is damaged: '{path}' has the shape {sizes} in {members[name].file_size:,} bytes"
            )
    _check(list(listed.get("config", {})), folder)


def _check(value: Any, where: str, key: str = "") -> None:
    """Looks through JSON as torch.export writes it. Raises: _RefusedError for any text that is not
    of the kind that stands in its place."""
    if isinstance(value, dict):
        if key == "metadata":
            for name in set(value) - set(METADATA):
                del value[name]
        for name, item in value.items():
            _check_text(name, where, "expr_str" if key == "range_constraints" else "")
            _check(item, value.get("name") or where, name)
    elif isinstance(value, list):
        for item in value:
            _check(item, where, key)
    elif isinstance(value, str):
        _check_text(value, where, key)


def _check_text(text: str, where: str, key: str) -> None:
    if key == "target":
        fits = _is_function(text)
    elif key == "expr_str":
        words = re.split(r"[ (),-]+", SYMBOL.sub("0", text))
        fits = len(text) < LONGEST_SIZE and all(SIZES.fullmatch(word) for word in words if word)
    elif key in ("in_spec", "out_spec"):
        fits = _is_plain_structure(text)
    elif key in ("as_string", "as_strings", "torch_version"):
        fits = TEXT.fullmatch(text) is not None
    elif key == "nn_module_stack":
        fits = re.fullmatch(r"[\w.,;()@\[\]']*", text) is not None
    else:
        fits = NAME.fullmatch(text) is not None and key not in ("as_operator", "class_fqn")
    if not fits:
        raise _RefusedError(
            f"is refused: {where} has {text[:80]!r} as {key or 'a name'}, which is not what "
            "torch.export writes of a network of torch's ops"
        )


def _is_function(text: str) -> bool:
    """Whether a call computes tensors of tensors, and nothing else: no files, no scripts."""
    if FUNCTIONS.fullmatch(text):
        return True
    match = re.fullmatch(r"torch\.ops\.aten\.(\w+)\.(\w+)", text)
    packet = getattr(torch.ops.aten, match[1], None) if match else None
    if match is None or packet is None or match[2] not in packet.overloads():
        return False
    schema = getattr(packet, match[2])._schema
    checks = match[1].startswith(("_assert", "sym_"))
    gives = any("Tensor" in str(result.type) for result in schema.returns)
    return (gives or checks) and not any("file" in argument.name for argument in schema.arguments)


def _is_plain_structure(text: str) -> bool:
    """Whether a tree of arguments consists of tuples, lists and dicts by name."""
    try:
        version, tree = json.loads(text)
        return version == 1 and _is_plain(tree)
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _is_plain(tree: Any) -> bool:
    context = tree["context"]
    names = json.loads(context) if isinstance(context, str) else context
    if not isinstance(names, list | None):
        return False
    known = all(isinstance(name, str) and TEXT.fullmatch(name) for name in names or ())
    return known and tree["type"] in CONTAINERS and all(map(_is_plain, tree["children_spec"]))
