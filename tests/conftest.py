"""How tests run here: hypothesis profiles, and every pass checked before and after.

Few examples by default, many with `--hypothesis-profile=thorough`. Draws are random; a failure
prints the smallest failing draw and a `@reproduce_failure` line, and hypothesis replays it first on
the next run.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from convloom.compiler.records import choose, store
from hypothesis import HealthCheck, Phase, settings

from . import untraced

COMMON = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much],
}
settings.register_profile("quick", max_examples=5, **COMMON)
settings.register_profile("thorough", max_examples=200, **COMMON)
settings.register_profile(  # of `tests.mutate`: that it fails is enough
    "judge", max_examples=5, phases=(Phase.explicit, Phase.generate), database=None, **COMMON
)
settings.load_profile("quick")


@pytest.fixture(scope="session", autouse=True)
def checked_passes() -> Iterator[None]:
    """Graphs are verified around every pass, whoever compiles, and unwritten memory is NaN."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVLOOM_CHECK", "1")
        yield


@pytest.fixture(scope="session", autouse=True)
def traced_where_it_shows() -> Iterator[None]:
    """Under coverage.py."""
    with pytest.MonkeyPatch.context() as patch:
        if untraced.TRACER is not None:
            untraced.leave_out(patch)
        yield


def pytest_collection_finish() -> None:
    """What torch, triton and the list of tests hold is not looked through again and again, and the
    rest less often: that was a sixth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 20, 20)


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem() -> Iterator[object]:
    """Under coverage.py, pytest itself runs at full speed."""
    with untraced.paused():
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol() -> Iterator[object]:
    with untraced.paused():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup() -> Iterator[object]:
    with untraced.traced():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[object]:
    """So do whole networks: their lines are those of other tests."""
    if pyfuncitem.get_closest_marker("untraced") is not None:
        return (yield)
    with untraced.traced():
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def no_records_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What somebody has tuned on this machine changes no test; a test that names a cache folder
    gets the records in it."""
    empty = tmp_path_factory.mktemp("records")

    def folder() -> Path:
        return store.user_folder() if "CONVLOOM_CACHE_DIR" in os.environ else empty

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "user_folder", folder)
        yield


VALIDATED = (
    "test_capture", "test_fusions", "test_fuzz", "test_half", "test_models", "test_partition",
    "test_passes", "test_siblings", "test_spellings", "test_validate", "test_verify",
)  # fmt: skip
"""Files whose compilations also compare what every pass computes: rules, random networks and whole
models. Elsewhere networks may be too large to be evaluated, and are only planned."""


@pytest.fixture(autouse=True)
def validated_passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What graphs compute is compared around every pass."""
    if request.path.stem in VALIDATED:
        monkeypatch.setenv("CONVLOOM_CHECK", "2")
