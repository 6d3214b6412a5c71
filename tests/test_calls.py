"""How people call: keywords, constants, arrays, one tensor, autocast, copies in bytes."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import convloom
import numpy as np
import pytest
import torch
from convloom.errors import CaptureError, InvalidInputError
from torch import nn

from . import nets

X = nets.inputs_of((2, 3, 6, 6))[0]
MASK = nets.inputs_of((2, 4, 4, 4), seed=1)[0]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(
        self, x: torch.Tensor, scale: Any = 1, *, mask: Any = None, mode: str = "plain"
    ) -> torch.Tensor:
        y = self.conv(x) * scale
        if mask is not None:
            y = y * (mask["mask"] if isinstance(mask, dict) else mask)
        return y if mode == "plain" else y + 1


MODEL = nets.randomise(Net())


def compiled(*example: Any, target: str = "reference", **options: Any) -> convloom.Executable:
    return convloom.compile(MODEL, *example, target=target, **options)


def same(got: torch.Tensor, *arguments: Any, **keywords: Any) -> None:
    with torch.no_grad():
        torch.testing.assert_close(got, MODEL(*arguments, **keywords), rtol=1e-4, atol=1e-5)


def test_one_tensor_is_an_example() -> None:
    same(compiled(X)(X), X)
    same(compiled(X.numpy())(X), X)


@pytest.mark.interpreter
@pytest.mark.parametrize("target", ["reference", "interpreter"])
def test_keywords(target: str) -> None:
    exe = compiled((X,), kwargs={"mode": "more", "mask": MASK}, target=target)
    same(exe(X, mask=MASK, mode="more"), X, mask=MASK, mode="more")
    same(exe(mode="more", x=X, mask=MASK), X, mask=MASK, mode="more")
    assert [port.name for port in exe.inputs] == ["x", "mask"]
    exe.profile(x=X, mask=MASK, mode="more") if target == "interpreter" else None
    nested = compiled((X,), kwargs={"mask": {"mask": MASK}}, dynamic_batch=(1, 3))
    same(nested(X[:1], mask={"mask": MASK[:1]}), X[:1], mask=MASK[:1])


def test_what_was_named_in_the_example_may_be_given_by_position() -> None:
    exe = compiled(kwargs={"scale": X[:, :1, :4, :4], "x": X})
    same(exe(X, X[:, :1, :4, :4]), X, X[:, :1, :4, :4])
    same(exe(X, scale=X[:, :1, :4, :4]), X, X[:, :1, :4, :4])
    with pytest.raises(InvalidInputError, match="'x' is given by position and by name"):
        exe(X, x=X)
    for arguments, keywords in (((X,), {}), ((), {"y": X, "x": X})):
        with pytest.raises(InvalidInputError, match=r"expected 2 tensor\(s\) structured as the"):
            exe(*arguments, **keywords)


CONSTANTS = [
    ((X, 2), {}, (X, 3), {}, "expected the constant 2 of the example, got 3"),
    ((X, 2), {}, (X, 2.0), {}, "expected the constant 2 of the example, got 2.0"),
    ((X, True), {}, (X, 1), {}, "expected the constant True of the example, got 1"),
    ((X, 2), {}, (X, X), {}, "expected the constant 2 of the example, got Tensor"),
    ((X,), {"mode": "more"}, (X,), {"mode": "plain"}, "the constant 'more' of the example, got 'p"),
    ((X, 1), {"mask": None}, (X, 1), {"mask": 0}, "the constant None of the example, got 0"),
    ((X, 1), {"mode": "more"}, (X, 1), {}, r"x float32\[2, 3, 6, 6\], constant 1, constant 'more' "
     "and keywords mode.*, got 1$"),
]  # fmt: skip


@pytest.mark.parametrize(("example", "keywords", "call", "named", "message"), CONSTANTS)
def test_constants_are_part_of_the_code(
    example: Any, keywords: Any, call: Any, named: Any, message: str
) -> None:
    exe = compiled(example, kwargs=keywords)
    loaded = convloom.load(io.BytesIO(exe.to_bytes()))
    for each in (exe, loaded):
        same(each(*example, **keywords), *example, **keywords)
        with pytest.raises(InvalidInputError, match=message):
            each(*call, **named)


def test_numbers_do_not_stand_for_tensors() -> None:
    with pytest.raises(InvalidInputError, match=r"input x: expected a tensor .*, got int"):
        compiled(X)(3)


def test_arrays() -> None:
    exe, array = compiled((X,)), X.numpy()
    frozen = array[::-1].copy()
    frozen.flags.writeable = False
    same(exe(array), X)
    same(exe(x=array[:, :, ::-1]), X.flip(2))
    same(exe(frozen), X.flip(0))
    with pytest.raises(InvalidInputError, match=r"expected dtype torch.float32, got torch.float64"):
        exe(array.astype(np.float64))
    with pytest.raises(InvalidInputError, match="expected an array of numbers, got NumPy's <U1"):
        exe(np.array(["a"]))
    with pytest.raises(InvalidInputError, match="expected an array of numbers, got NumPy's object"):
        compiled(np.array([None]))


def test_keywords_that_do_not_fit() -> None:
    with pytest.raises(CaptureError, match=r"cannot be called with .* 1 argument\(s\) and keywords "
                       r"\(other\): got an unexpected keyword argument 'other'"):  # fmt: skip
        compiled((X,), kwargs={"other": X})
    with pytest.raises(InvalidInputError, match="kwargs: expected a dict by name, got 3"):
        compiled((X,), kwargs=3)


def test_dtypes_by_name() -> None:
    exe = compiled(X, dtype="bfloat16")
    assert torch.bfloat16 in {node.spec.dtype for node in exe.graph.nodes() if node.outputs}
    with pytest.raises(InvalidInputError, match=r"dtype: expected None, float32.*, got float8"):
        compiled(X, dtype="float8")


def test_autocast_around_compile_is_honoured() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        exe = compiled(X)
        with torch.no_grad():
            wanted = MODEL(X)
    assert exe(X).dtype is wanted.dtype is torch.bfloat16
    torch.testing.assert_close(exe(X), wanted, rtol=0.02, atol=0.02)


def test_what_an_executable_says_of_itself() -> None:
    exe = compiled((X,), dynamic_batch=(1, 4))
    assert repr(exe) == (
        f"<Executable of Net for reference: {len(exe.kernels)} kernel(s), "
        "(x float32[N, 3, 6, 6]) -> (output0 float32[N, 4, 4, 4])>"
    )
    loaded = convloom.load(io.BytesIO(exe.to_bytes()))
    assert (loaded.inputs, loaded.outputs) == (exe.inputs, exe.outputs)


@pytest.mark.interpreter
def test_bytes_are_the_file(tmp_path: Path) -> None:
    exe = compiled((X,), target="interpreter")
    exe.save(tmp_path / "net.loom")
    with (tmp_path / "open.loom").open("wb") as file:
        exe.save(file, model="")
    held = (tmp_path / "net.loom").read_bytes()
    assert held == exe.to_bytes() == (tmp_path / "open.loom").read_bytes()
    with (tmp_path / "open.loom").open("rb") as file:
        loaded = convloom.load(file, "reference")
    (tmp_path / "open.loom").unlink()
    same(loaded(X), X)
    again = pickle.loads(pickle.dumps(loaded))
    assert again.device == "reference"
    same(again(X), X)
    with pytest.raises(convloom.ArtifactError, match="not a convloom executable, or it was cut"):
        convloom.load(io.BytesIO(held[:-1]))


def test_exported_programs() -> None:
    program = torch.export.export(MODEL, (X,), {"mode": "more"})
    exe = convloom.compile(program, target="reference")
    same(exe(X, mode="more"), X, mode="more")
    direct = compiled((X,), kwargs={"mode": "more"})
    assert exe.graph.name == "Net" and exe.plan.to_text() == direct.plan.to_text()
    assert [record.module_path for record in exe.ledger.account().nodes] == [
        record.module_path for record in direct.ledger.account().nodes
    ]
    with pytest.raises(CaptureError, match=r"could not capture Net: Guard failed: x.size"):
        convloom.compile(program, (X[:, :, 1:],), kwargs={"mode": "more"}, target="reference")
    with pytest.raises(CaptureError, match=r"Net \(with a dynamic batch\)|Net cannot"):
        convloom.compile(program, target="reference", dynamic_batch=(1, 4))


def test_exported_programs_with_a_range_of_batches() -> None:
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(MODEL, (X,), dynamic_shapes=({0: batch},))
    exe = convloom.compile(program, (X[:1],), target="reference", dynamic_batch=(1, 4))
    for count in (1, 2):
        same(exe(X[:count]), X[:count])


class Flagged(nn.Module):
    """Constants that may be given by position or by name."""

    def forward(self, x: torch.Tensor, flag: bool = True, scale: float = 1.0) -> torch.Tensor:
        return (x.relu() if flag else x) * scale


def test_constants_given_by_name_are_called_by_name() -> None:
    exe = convloom.compile(
        Flagged(), (X,), kwargs={"flag": False, "scale": 2.0}, target="reference"
    )
    assert torch.equal(exe(X, flag=False, scale=2.0), X * 2.0)
    assert torch.equal(exe(X, scale=2.0, flag=False), X * 2.0)
    with pytest.raises(InvalidInputError, match=r"constant False of the example, got True"):
        exe(X, flag=True, scale=2.0)
    exe = convloom.compile(Flagged(), (X, False, 2.0), target="reference")
    assert torch.equal(exe(X, False, 2.0), X * 2.0)
