"""Weights from files: the shipped digits, checkpoints of both formats, and what can be wrong."""

from __future__ import annotations

import builtins
import re
import sys

import pytest
import safetensors.torch
import torch
from convloom import zoo
from convloom.errors import ArtifactError, ConvloomError
from convloom.zoo import checkpoint, lenets
from convloom.zoo.checkpoint import load_weights, read_notes
from convloom.zoo.digits import load_digits_split


@pytest.fixture(scope="module")
def split():
    return load_digits_split()


def test_split_is_stratified_and_complete(split):
    assert split.train_images.shape == (1442, 1, 32, 32)
    assert split.test_images.shape == (355, 1, 32, 32)
    assert split.test_images.dtype == torch.float32
    assert split.test_labels.dtype == torch.int64
    assert (split.test_images.min(), split.test_images.max()) == (0, 1)
    assert split.test_labels.bincount().tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]
    assert split.train_labels.bincount().tolist() == [
        143, 146, 142, 147, 145, 146, 145, 144, 140, 144,
    ]  # fmt: skip


def test_no_held_out_image_was_trained_on(split):
    seen = {image.numpy().tobytes() for image in split.train_images}
    assert not any(image.numpy().tobytes() in seen for image in split.test_images)


def test_lenet5_reads_the_digits(split):
    from convloom.zoo.train_lenet5 import accuracy

    model = zoo.lenet5(weights="digits").eval()
    measured = accuracy(model, split.test_images, split.test_labels)
    assert measured >= 0.98
    notes = read_notes(lenets.DIGITS_WEIGHTS)
    assert measured == pytest.approx(float(notes["test_accuracy"]), abs=0.005)
    assert notes["test_images"] == str(len(split.test_labels))
    assert notes["seed"]
    assert notes["split"]


def test_shipped_weights_are_small():
    assert lenets.DIGITS_WEIGHTS.stat().st_size < 500_000


def test_training_script_learns_and_writes_what_loads(split, tmp_path):
    from convloom.zoo.train_lenet5 import accuracy, save, train

    path = tmp_path / "new" / "lenet5.safetensors"
    model = train(split, epochs=1)
    notes = save(model, split, path)
    assert [file.name for file in path.parent.iterdir()] == ["lenet5.safetensors"]
    assert read_notes(path) == notes
    again = zoo.lenet5(weights=path).eval()
    assert accuracy(again, split.test_images, split.test_labels) > 0.5


def test_digits_without_scikit_learn(monkeypatch):
    real_import = builtins.__import__

    def without_sklearn(name, *arguments, **keywords):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real_import(name, *arguments, **keywords)

    for name in [name for name in sys.modules if name.startswith("sklearn")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(ConvloomError, match=r"pip install scikit-learn"):
        load_digits_split()


@pytest.mark.parametrize("name", zoo.names())
def test_every_model_reads_its_weights(name, tmp_path, monkeypatch):
    """Its own names fit, and those of another model are refused by name; on tensors without
    storage, as the largest have half a gigabyte."""
    state = {}
    monkeypatch.setattr(checkpoint, "_read", lambda path, hint: dict(state))
    with torch.device("meta"):
        model = zoo.build(name)
        state.update(model.state_dict())
        loaded = zoo.build(name, weights=tmp_path / "own.pth")
        assert list(loaded.state_dict()) == list(state)
        first = next(iter(state))
        state["another"] = state.pop(first)
        with pytest.raises(ArtifactError, match=r"cannot load weights from .*own\.pth") as e:
            zoo.build(name, weights=tmp_path / "own.pth")
    assert f"missing: {first};" in str(e.value) and "unexpected: another;" in str(e.value)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_checkpoint_round_trip(tmp_path, suffix):
    model = zoo.cifar_convnet()
    path = tmp_path / f"net{suffix}"
    if suffix == ".pth":
        torch.save(model.state_dict(), path)
    else:
        safetensors.torch.save_file(model.state_dict(), path)
    loaded = zoo.cifar_convnet(weights=path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


def test_checkpoint_without_batch_counters(tmp_path):
    """Files older than torch 0.4.1 have none."""
    state = zoo.resnet18().state_dict()
    kept = {name: v for name, v in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(kept, tmp_path / "old.pth")
    assert torch.equal(zoo.resnet18(weights=tmp_path / "old.pth").fc.weight, state["fc.weight"])


def test_published_densenet_names(tmp_path):
    """torchvision's published DenseNet still has the names of an older version of its code."""
    state = zoo.densenet121().state_dict()
    old = {re.sub(r"\.(norm|conv)([12])\.", r".\1.\2.", name): v for name, v in state.items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "densenet121.pth")
    loaded = zoo.densenet121(weights=tmp_path / "densenet121.pth").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in state.items())


def test_missing_shipped_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(lenets, "DIGITS_WEIGHTS", tmp_path / "gone.safetensors")
    with pytest.raises(ArtifactError, match=r"gone.safetensors.*expected.*got no such file") as e:
        zoo.lenet5(weights="digits")
    assert "python -m convloom.zoo.train_lenet5" in str(e.value)


def test_corrupt_shipped_weights(monkeypatch, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(lenets.DIGITS_WEIGHTS.read_bytes()[:1000])
    monkeypatch.setattr(lenets, "DIGITS_WEIGHTS", cut)
    with pytest.raises(ArtifactError, match=r"cut.safetensors.*got a damaged one"):
        zoo.lenet5(weights="digits")
    with pytest.raises(ArtifactError, match=r"cannot read the notes of .*cut.safetensors"):
        read_notes(cut)


@pytest.mark.parametrize(
    ("name", "content", "got"),
    [
        ("absent.pth", None, "no such file"),
        ("digitz", None, "no such file"),
        ("empty.pth", b"", "a damaged one"),
        ("noise.pth", bytes(range(256)) * 8, "a pickle that is damaged"),
        ("cut.pth", b"PK\x03\x04" + bytes(99), "a damaged one"),
        ("noise.safetensors", b"noise" * 100, "a damaged one"),
        ("net.onnx", b"noise", "a file with the suffix '.onnx'"),
    ],
)
def test_unreadable_checkpoint(tmp_path, name, content, got):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError) as e:
        zoo.lenet5(weights=path)
    message = str(e.value)
    assert str(path) in message
    assert "expected a .safetensors or .pth file" in message
    assert got in message
    assert "\n" not in message


def test_folder_as_checkpoint(tmp_path):
    with pytest.raises(ArtifactError, match="got a folder"):
        zoo.lenet5(weights=tmp_path)


def test_pickle_of_something_else(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "run.pth")
    with pytest.raises(ArtifactError, match="got a dict that holds other things"):
        zoo.lenet5(weights=tmp_path / "run.pth")


class Explosive:
    """A pickle that would create a file when loaded carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_pickled_code_is_not_run(tmp_path):
    torch.save({"a": Explosive(str(tmp_path / "ran"))}, tmp_path / "evil.pth")
    with pytest.raises(ArtifactError, match="holds more than tensors"):
        zoo.lenet5(weights=tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_mismatch_lists_every_difference_and_changes_nothing(tmp_path):
    state = zoo.lenet5(num_classes=12).state_dict()
    state["extra.weight"] = state.pop("conv1.weight")
    torch.save(state, tmp_path / "other.pth")
    model = zoo.lenet5()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ArtifactError) as e:
        load_weights(model, tmp_path / "other.pth")
    message = str(e.value)
    assert "missing: conv1.weight;" in message
    assert "unexpected: extra.weight;" in message
    assert "fc3.bias (expected (10,), got (12,))" in message
    assert "fc3.weight (expected (10, 84), got (12, 84))" in message
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_long_mismatch_is_abridged(tmp_path):
    torch.save(zoo.resnet18().state_dict(), tmp_path / "resnet18.pth")
    with pytest.raises(ArtifactError, match=r"missing: .* and \d+ more; unexpected: "):
        zoo.resnet50(weights=tmp_path / "resnet18.pth")
