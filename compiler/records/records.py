"""What tuning found out, as JSON that people can read: one record for one key.

Reading is strict: a record is what this page says or it is refused with the reason.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NoReturn

from ...errors import ArtifactError
from ...kernels.contract.op import Config
from ..graph.typed import Laws, Reader, one_of, plain
from .keys import ARCHITECTURES, Key, shape_of

FORMAT = 1
MEASURED, MODELLED = "measured", "modelled"
STAGES = (
    "illegal", "waste", "compile", "spills", "resources", "fault", "wrong", "slower",
)  # fmt: skip
"""Where a candidate fell out: legality, padding, the compiler, registers on the stack, what a
multiprocessor holds, a crash, a wrong result, the clock."""
LONGEST_US = 1e9
MOST_BLOCK = 1 << 24
MOST_STAGES = 16
TEXT_LIMIT = 400
"""Characters of a reason that are kept."""


class NewerRecordError(ArtifactError):
    """A record that a later version of convloom wrote: not readable here, and not to be lost."""


@dataclass(frozen=True)
class Rejected:
    """A candidate that did not win, and why; time_us where it was timed."""

    config: Config
    stage: str
    reason: str
    time_us: float | None = None


@dataclass(frozen=True)
class Record:
    """The best configuration known for a key.

    status: "measured" on `device`, or "modelled". time_us: median with nothing in the L2 cache;
    spread_us: from the 10th to the 90th percentile; warm_us: with the tensors in the L2 cache.
    date: UTC, ISO 8601. complete: False where tuning was interrupted; `rejected` then says what
    need not be tried again.
    """

    key: Key
    config: Config
    status: str
    time_us: float
    spread_us: float
    warm_us: float | None
    device: str
    driver: str
    date: str
    complete: bool
    rejected: tuple[Rejected, ...] = ()

    @property
    def is_measured(self) -> bool:
        return self.status == MEASURED

    def beats(self, other: Record) -> bool:
        """Whether this one should be kept of two records for one key: measured before modelled,
        complete before interrupted, then the faster one."""
        mine = (self.is_measured, self.complete)
        theirs = (other.is_measured, other.complete)
        return mine > theirs or (mine == theirs and self.time_us < other.time_us)

    def __str__(self) -> str:
        if not self.is_measured:
            return "modelled"
        return f"measured {self.time_us:.1f} us on {self.device}"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def rounded(time_us: float) -> float:
    """A time in whole nanoseconds, at least one."""
    return max(round(time_us, 3), 0.001)


def shortened(reason: str) -> str:
    """The reason in one line of bounded length."""
    line = " ".join(reason.split())
    return line if len(line) <= TEXT_LIMIT else line[: TEXT_LIMIT - 3] + "..."


# Writing.


def to_json(record: Record) -> dict[str, Any]:
    """The record as plain data; configurations as one table of all their sizes."""
    data: dict[str, Any] = plain(record)
    for holder in (data, *data["rejected"]):
        sizes = holder["config"]
        holder["config"] = {**dict(sizes.pop("blocks")), **sizes}
    return {"format": FORMAT, **data}


def to_text(record: Record) -> str:
    """The record as the text of its file."""
    text = json.dumps(to_json(record), indent=1, allow_nan=False)
    # Configurations read better in one line.
    sizes = r"\{\s+((?:\"\w+\": \d+,?\s*)+)\}"
    return re.sub(sizes, lambda found: "{" + " ".join(found[1].split()) + "}", text) + "\n"


# Reading.


def from_text(text: str) -> Record:
    """The record that a file holds.

    Raises: ArtifactError saying what is wrong with it.
    """
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ArtifactError(f"not a tuning record: no JSON ({error})") from error
    except RecursionError as error:
        raise ArtifactError("not a tuning record: nested too deeply") from error
    return from_json(data)


def from_json(data: Any) -> Record:
    """The record behind plain data.

    Raises: ArtifactError saying what is wrong with it, NewerRecordError for a later format.
    """
    if not isinstance(data, dict) or "format" not in data or "key" not in data:
        raise ArtifactError("not a tuning record: expected an object with a format and a key")
    fields = dict(data)
    version = fields.pop("format")
    if type(version) is int and version > FORMAT:
        raise NewerRecordError(
            f"a record from the future: format {version}; this version of convloom reads up to "
            f"format {FORMAT}. Update convloom to use it"
        )
    if type(version) is not int or version != FORMAT:
        raise ArtifactError(f"format: expected {FORMAT}, got {version!r:.60}")
    record: Record = _RecordReader("tuning record", laws=LAWS).read(Record, fields, "record")
    return record


def _is_date(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False


_TIME = (lambda us: us is None or 0 < us < LONGEST_US), f"microseconds below {LONGEST_US:g}"
_TENSORS = (lambda texts: None not in map(shape_of, texts)), "tensors such as 'float16 8x64 dense'"
LAWS: Laws = {
    Record: {
        "status": one_of(MEASURED, MODELLED),
        "time_us": _TIME,
        "spread_us": (lambda us: 0 <= us < LONGEST_US, _TIME[1]),
        "warm_us": _TIME,
        "date": (_is_date, "ISO 8601 with a time zone"),
    },
    Rejected: {"stage": one_of(*STAGES), "time_us": _TIME},
    Key: {
        # It becomes the name of a folder.
        "op": (lambda op: bool(re.fullmatch(r"[a-z0-9_]{1,60}", op)), "the name of an op"),
        "architecture": one_of(*ARCHITECTURES),
        "inputs": _TENSORS,
        "outputs": _TENSORS,
    },
    Config: {
        "num_warps": ((1, 2, 4, 8, 16, 32).__contains__, "a power of two up to 32"),
        "num_stages": (lambda stages: 1 <= stages <= MOST_STAGES, f"1 to {MOST_STAGES}"),
    },
}
"""What must hold of fields beside their types."""


class _RecordReader(Reader):
    """Reads configurations as records write them. That one fits its problem is checked where the
    problem is known."""

    def read_dataclass(self, kind: type, data: Any, where: str) -> Any:
        if kind is Config and isinstance(data, dict):
            blocks = {name: size for name, size in data.items() if not name.startswith("num_")}
            for name, size in blocks.items():
                if not re.fullmatch(r"[A-Z][A-Z0-9_]{0,40}", name) or type(size) is not int:
                    self.refuse(where, "sizes by name", f"{name}: {size!r}")
                if not 0 <= size <= MOST_BLOCK:
                    self.refuse(f"{where}.{name}", f"0 to {MOST_BLOCK}", size)
            others = {name: size for name, size in data.items() if name not in blocks}
            data = {**others, "blocks": list(blocks.items())}
        return super().read_dataclass(kind, data, where)

    def refuse(self, where: str, expected: str, got: Any) -> NoReturn:
        raise ArtifactError(f"{where}: expected {expected}, got {got!r:.60}")
