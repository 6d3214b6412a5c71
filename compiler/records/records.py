"""What tuning found out, as JSON that people can read: one record for one key.

Reading is strict: a record is what this page says or it is refused with the reason.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import Any

from ...errors import ArtifactError
from ...kernels.contract.op import Config
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
    """This moment as records write it."""
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
    """The record as plain data."""
    rejected = [
        {"stage": each.stage, "reason": each.reason, "time_us": each.time_us,
         "config": _config_json(each.config)}
        for each in record.rejected
    ]  # fmt: skip
    plain = {item.name: getattr(record, item.name) for item in fields(record)}
    return {
        "format": FORMAT,
        **plain,
        "key": asdict(record.key),
        "config": _config_json(record.config),
        "rejected": rejected,
    }


def _config_json(config: Config) -> dict[str, int]:
    return {
        **dict(config.blocks), "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip


def to_text(record: Record) -> str:
    """The record as the text of its file."""
    text = json.dumps(to_json(record), indent=1, allow_nan=False)
    # Lists of numbers and configurations read better in one line.
    return re.sub(r"\{\s+((?:\"\w+\": \d+,?\s*)+)\}", _in_one_line, text) + "\n"


def _in_one_line(found: re.Match[str]) -> str:
    return "{" + " ".join(found[1].split()) + "}"


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
    version = _taken(data, "format", int)
    if version > FORMAT:
        raise NewerRecordError(
            f"a record from the future: format {version}; this version of convloom reads up to "
            f"format {FORMAT}. Update convloom to use it"
        )
    if version != FORMAT:
        raise ArtifactError(f"format: expected {FORMAT}, got {version}")
    _check_names(data, {"format", *(item.name for item in fields(Record))}, "record")
    status = _taken(data, "status", str)
    if status not in (MEASURED, MODELLED):
        raise ArtifactError(f"status: expected {MEASURED} or {MODELLED}, got {status!r}")
    warm = data["warm_us"]
    rejected = _taken(data, "rejected", list)
    return Record(
        key=_key(_taken(data, "key", dict)),
        config=_config(_taken(data, "config", dict)),
        status=status,
        time_us=_time(data, "time_us", positive=True),
        spread_us=_time(data, "spread_us"),
        warm_us=None if warm is None else _time(data, "warm_us", positive=True),
        device=_taken(data, "device", str),
        driver=_taken(data, "driver", str),
        date=_date(data),
        complete=_taken(data, "complete", bool),
        rejected=tuple(_rejected(each) for each in rejected),
    )


def _taken(data: Mapping[str, Any], name: str, kind: type) -> Any:
    """data[name], which must be of that type exactly: true is no number."""
    value = data.get(name)
    if type(value) is not kind:
        got = "nothing" if name not in data else f"{type(value).__name__} {value!r:.60}"
        raise ArtifactError(f"{name}: expected {kind.__name__}, got {got}")
    return value


def _check_names(data: Mapping[str, Any], expected: set[str], what: str) -> None:
    missing = sorted(expected - set(data))
    unknown = sorted(set(data) - expected)
    if missing or unknown:
        raise ArtifactError(f"{what}: missing {missing}, unknown {unknown}")


def _time(data: Mapping[str, Any], name: str, positive: bool = False) -> float:
    value = data.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArtifactError(f"{name}: expected a number, got {value!r:.60}")
    found = float(value)
    if not (0 <= found < LONGEST_US and math.isfinite(found)) or (positive and not found):
        raise ArtifactError(f"{name}: expected microseconds below {LONGEST_US:g}, got {value}")
    return found


def _date(data: Mapping[str, Any]) -> str:
    text = _taken(data, "date", str)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ArtifactError(f"date: expected ISO 8601, got {text!r:.60}") from error
    if moment.tzinfo is None:
        raise ArtifactError(f"date: expected a time zone, got {text!r:.60}")
    return str(text)


def _key(data: Mapping[str, Any]) -> Key:
    names = {item.name: item.type for item in fields(Key)}
    _check_names(data, set(names), "key")
    values: dict[str, Any] = {}
    for name, kind in names.items():
        if kind == "str":
            values[name] = _taken(data, name, str)
        elif kind == "bool":
            values[name] = _taken(data, name, bool)
        else:
            values[name] = tuple(_taken(data, name, list))
            if not all(isinstance(each, str) for each in values[name]):
                raise ArtifactError(f"key.{name}: expected texts, got {values[name]!r:.80}")
    key = Key(**values)
    # It becomes the name of a folder.
    if not re.fullmatch(r"[a-z0-9_]{1,60}", key.op):
        raise ArtifactError(f"key.op: expected the name of an op, got {key.op!r:.60}")
    if key.architecture not in ARCHITECTURES:
        raise ArtifactError(
            f"key.architecture: expected one of {', '.join(ARCHITECTURES)}, got "
            f"{key.architecture!r:.60}"
        )
    for tensor in (*key.inputs, *key.outputs):
        if shape_of(tensor) is None:
            raise ArtifactError(
                f"key: expected tensors such as 'float16 8x64 dense', got {tensor!r:.60}"
            )
    return key


def _config(data: Mapping[str, Any]) -> Config:
    """A configuration; that it fits its problem is checked where the problem is known."""
    blocks = {name: size for name, size in data.items() if not name.startswith("num_")}
    _check_names(data, {*blocks, "num_warps", "num_stages"}, "config")
    for name, size in blocks.items():
        if not re.fullmatch(r"[A-Z][A-Z0-9_]{0,40}", name) or type(size) is not int:
            raise ArtifactError(f"config: expected sizes by name, got {name!r:.40}: {size!r:.40}")
        if not 0 <= size <= MOST_BLOCK:
            raise ArtifactError(f"config.{name}: expected 0 to {MOST_BLOCK}, got {size}")
    warps, stages = _taken(data, "num_warps", int), _taken(data, "num_stages", int)
    if warps not in (1, 2, 4, 8, 16, 32):
        raise ArtifactError(f"config.num_warps: expected a power of two up to 32, got {warps}")
    if not 1 <= stages <= MOST_STAGES:
        raise ArtifactError(f"config.num_stages: expected 1 to {MOST_STAGES}, got {stages}")
    return Config(tuple(blocks.items()), warps, stages)


def _rejected(data: Any) -> Rejected:
    if not isinstance(data, dict):
        raise ArtifactError(f"rejected: expected objects, got {data!r:.60}")
    _check_names(data, {item.name for item in fields(Rejected)}, "rejected")
    stage = _taken(data, "stage", str)
    if stage not in STAGES:
        raise ArtifactError(f"rejected.stage: expected one of {', '.join(STAGES)}, got {stage!r}")
    timed = data["time_us"]
    return Rejected(
        config=_config(_taken(data, "config", dict)),
        stage=stage,
        reason=_taken(data, "reason", str),
        time_us=None if timed is None else _time(data, "time_us", positive=True),
    )
