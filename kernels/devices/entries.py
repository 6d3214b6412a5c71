"""What was found out about kernels, in the cache folder: plain data beside its own hash. Needs no
Triton."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...atomic import PRIVATE, private_folder, refuse_others, replacing

LOG = logging.getLogger("convloom")


def content_hash(content: bytes) -> str:
    """The sha256 of what a file holds."""
    return hashlib.sha256(content).hexdigest()


def read_entry(path: Path) -> Any:
    """What `write_entry` wrote into a file; None where there is none, or another than was written.
    """
    try:
        text = path.read_text()
        refuse_others(path)
        entry = json.loads(text)
        if "sha256" not in entry:  # An earlier convloom's.
            return None
        if content_hash(json.dumps(entry["data"], sort_keys=True).encode()) == entry["sha256"]:
            return entry["data"]
        reason: object = "its sha256 is another"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = error
    LOG.warning("statistics of a kernel, %s, are ignored: %s", path, reason)
    return None


def write_entry(path: Path, data: Mapping[str, Any]) -> None:
    """Keeps plain data in a file; where that fails nothing is lost but time, and a warning says so.
    """
    total = content_hash(json.dumps(data, sort_keys=True).encode())
    try:
        private_folder(path.parent.parent, path.parent.name)
        with replacing(path, PRIVATE) as file:
            file.write(json.dumps({"data": data, "sha256": total}, sort_keys=True).encode())
    except OSError as error:
        LOG.warning("statistics of a kernel cannot be kept: %s", error)
