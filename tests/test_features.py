"""Named intermediate activations: `compile(..., outputs=[...])` against hooks on the module."""

from __future__ import annotations

import convloom
import pytest
import torch
from convloom import zoo
from convloom.errors import CaptureError, InvalidInputError
from convloom.zoo.digits import load_digits_split
from torch import nn

from .nets import IMAGE, check, exporting_once, inputs_of, make, randomise
from .test_docs import DOCS, blocks

EVERY_WAY = ("default", "none", ("fold_batch_norm", "fuse_epilogues"))


@pytest.fixture(scope="module", autouse=True)
def exported_once():
    with exporting_once():
        yield


class Taken(nn.Module):
    """What a module returns, seen by hooks: the truth, independent of the compiler's own hooks."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *inputs: torch.Tensor):
        seen: dict[str, list] = {}
        handles = []

        def note(path, y):
            seen.setdefault(path, []).append(_cloned(y))

        for path, layer in self.module.named_modules():
            handles.append(layer.register_forward_hook(lambda *all, path=path: note(path, all[-1])))
        result = self.module(*inputs)
        for handle in handles:
            handle.remove()
        return {name: self._value(name, result, seen) for name in self.names}

    @staticmethod
    def _value(name: str, result, seen: dict[str, list]):
        if not name:
            return result
        path, _, call = name.partition(":")
        return seen[path][int(call) if call else -1]


def _cloned(value):
    return tuple(map(_cloned, value)) if isinstance(value, tuple) else value.clone()


def agree(module, inputs, names, **options) -> convloom.Executable:
    """Compiles for the named outputs and asserts that each is the module's; returns it."""
    options = {"target": "reference", "tuning": "heuristic", **options}
    exe = convloom.compile(module, inputs, outputs=list(names), **options)
    got = exe(*inputs)
    assert list(got) == list(names)
    check(got, Taken(module, names), inputs, options.get("dtype"))
    return exe


def block():
    """Convolutions with everything that fusion would hide, and one relu called three times."""

    def forward(m, x):
        y = m.relu(m.bn1(m.conv1(x)))
        y = m.relu(m.bn2(m.conv2(y)) + x)
        return m.head(m.relu(m.conv3(y)).mean((2, 3)))

    return make(
        forward,
        IMAGE,
        conv1=nn.Conv2d(6, 6, 3, padding=1, bias=False),
        bn1=nn.BatchNorm2d(6),
        relu=nn.ReLU(inplace=True),
        conv2=nn.Conv2d(6, 6, 3, padding=1),
        bn2=nn.BatchNorm2d(6),
        conv3=nn.Conv2d(6, 4, 1),
        head=nn.Linear(4, 3),
    )


BLOCK = block()


@pytest.mark.parametrize("passes", EVERY_WAY, ids=str)
@pytest.mark.parametrize(
    "names",
    [
        ("",),
        ("conv1",),  # the batch normalisation behind it may not be folded into what is returned
        ("bn1", "bn2"),
        ("relu", "relu:0", "relu:1", "relu:2"),
        ("conv2", "head", "", "conv1", "bn2"),
    ],
    ids=str,
)
def test_activations_are_the_modules(names, passes):
    """Also where an in-place relu writes over what conv and bn returned."""
    agree(*BLOCK, names, passes=passes)


@pytest.mark.interpreter
def test_kernels_compute_the_activations():
    agree(*BLOCK, ("conv1", "bn2", "relu:0", "relu", ""), target="interpreter")
    agree(*BLOCK, ("bn1", "relu"), target="interpreter", dtype=torch.float16)


def test_offline_target_plans_the_activations():
    module, inputs = BLOCK
    exe = convloom.compile(
        module, inputs, target="cuda:sm_90", tuning="heuristic", outputs=["conv1", "bn2"]
    )
    shapes = [port.spec.shape for port in exe.plan.outputs]
    assert shapes == [(2, 6, 7, 5), (2, 6, 7, 5)]
    assert len(exe.kernels) == len(exe.plan.kernels) > 0


def test_activations_with_a_dynamic_batch():
    module, inputs = BLOCK
    names = ("conv1", "relu:1", "")
    exe = convloom.compile(
        module, inputs, target="reference", dynamic_batch=(1, 4), outputs=list(names)
    )
    for batch in (1, 3, 4):
        x = inputs_of((batch, *IMAGE[1:]), seed=batch)
        check(exe(*x), Taken(module, names), x)


def test_names_are_those_of_the_network():
    """Submodules of submodules; a whole stage; the stage and its last module are one tensor."""
    module = randomise(zoo.cifar_resnet20())
    paths = [path for path, _ in module.named_modules() if path.count(".") == 1]
    names = (paths[-1], paths[-1].partition(".")[0], paths[0])
    agree(module, inputs_of((2, 3, 32, 32)), names)


class Halves(nn.Module):
    def forward(self, x):
        first, second = x.chunk(2, 1)
        return {"first": first.relu(), "rest": (second, 7)}


def test_a_module_that_returns_a_structure():
    def forward(m, x):
        parts = m.halves(m.conv(x))
        return parts["first"] * parts["rest"][0]

    module, inputs = make(forward, IMAGE, conv=nn.Conv2d(6, 8, 3), halves=Halves())
    exe = convloom.compile(module, inputs, target="reference", outputs=["halves", "conv"])
    got = exe(*inputs)
    first, second = module.conv(*inputs).chunk(2, 1)
    torch.testing.assert_close(got["halves"]["first"], first.relu())
    torch.testing.assert_close(got["halves"]["rest"][0], second)
    assert got["halves"]["rest"][1] == 7


def test_a_module_under_two_names():
    shared = nn.Conv2d(6, 6, 1)
    module, inputs = make(lambda m, x: m.again(m.conv(x).relu()), IMAGE, conv=shared, again=shared)
    exe = convloom.compile(module, inputs, target="reference", outputs=["again", "conv", "conv:0"])
    got = exe(*inputs)
    torch.testing.assert_close(got["conv:0"], shared(*inputs))
    torch.testing.assert_close(got["again"], module(*inputs))
    assert torch.equal(got["again"], got["conv"])


def test_what_is_not_needed_is_not_computed():
    """Not even looked at: there is no kernel for what lies behind the wanted output."""
    module, inputs = make(
        lambda m, x: m.late(m.conv(x)).erfinv().cumsum(1),
        IMAGE,
        conv=nn.Conv2d(6, 4, 3),
        late=nn.Conv2d(4, 8, 3),
    )
    with pytest.raises(convloom.UnsupportedOpError):
        convloom.compile(module, inputs, target="reference")
    for passes in EVERY_WAY:
        exe = agree(module, inputs, ("conv",), passes=passes)
        assert exe.summary["convs"] == 1
        assert not any("late" in path for path in exe.plan.constants)


def test_a_name_given_twice_is_one_output():
    module, inputs = BLOCK
    exe = convloom.compile(module, inputs, target="reference", outputs=["bn1", "bn1"])
    assert list(exe(*inputs)) == ["bn1"]
    assert len(exe.plan.outputs) == 1


def test_the_module_is_left_as_it_was():
    module, inputs = BLOCK
    with pytest.raises(InvalidInputError):
        convloom.compile(module, inputs, target="reference", outputs=["relu:9"])
    for layer in module.modules():
        assert not layer._forward_hooks and not layer._forward_pre_hooks
    assert isinstance(module(*inputs), torch.Tensor)


def test_hooks_go_when_the_capture_fails():
    module, inputs = make(lambda m, x: m.conv(x) if x.sum() > 0 else x, IMAGE,
                          conv=nn.Conv2d(6, 6, 1))  # fmt: skip
    with pytest.raises(CaptureError):
        convloom.compile(module, inputs, target="reference", outputs=["conv"])
    assert not module.conv._forward_hooks and not module._forward_hooks


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (["conv9"], r"outputs: the model has no module 'conv9'; did you mean conv3, conv2, conv1"),
        (["relu:first"], r"has no module 'relu:first'; known: bn1"),
        ([":0"], r"has no module ':0'; known: bn1"),
        (["relu:3"], r"'relu:3' asks for call 3 of a module that is called 3 time\(s\)"),
        ([], "expected at least one module path .* got none"),
        ("relu", "expected a list of module paths, got 'relu'"),
        ([7], r"expected a list of module paths, got \[7\]"),
    ],
    ids=str,
)
def test_wrong_outputs(outputs, message):
    module, inputs = BLOCK
    with pytest.raises(InvalidInputError, match=message):
        convloom.compile(module, inputs, target="reference", outputs=outputs)


class Size(nn.Module):
    def forward(self, x):
        return x.shape[2]


def test_outputs_of_modules_without_any():
    module, inputs = make(
        lambda m, x: m.conv(x) * m.size(x), IMAGE, conv=nn.Conv2d(6, 6, 1), size=Size(),
        idle=nn.ReLU(),
    )  # fmt: skip
    with pytest.raises(InvalidInputError, match="module 'idle' is not called for this input"):
        convloom.compile(module, inputs, target="reference", outputs=["conv", "idle"])
    with pytest.raises(InvalidInputError, match="module 'idle' is not called for this input"):
        convloom.compile(module, inputs, target="reference", outputs=["idle"])
    with pytest.raises(InvalidInputError, match="module 'size' returns int, which holds no tensor"):
        convloom.compile(module, inputs, target="reference", outputs=["size"])


@pytest.mark.interpreter
def test_the_documented_example_runs(capsys):
    """And says something: the features know more than the pixels do."""
    (code,) = [block for block in blocks((DOCS / "compile.md").read_text(), "python")
               if "outputs=" in block]  # fmt: skip
    names: dict = {}
    exec(compile(code, "compile.md", "exec"), names)
    assert "by the network's features" in capsys.readouterr().out
    split = load_digits_split()
    pixels, held_out = split.train_images[:300].flatten(1), split.test_images.flatten(1)
    gram = pixels.T @ pixels + torch.eye(pixels.shape[1])
    line = torch.linalg.solve(gram, pixels.T @ (names["odd"] * 2.0 - 1))
    by_pixels = ((held_out @ line > 0) == (split.test_labels % 2 == 1)).float().mean()
    assert by_pixels < 0.95 < names["right"]
