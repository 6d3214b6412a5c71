"""The command line: answers as tables and as JSON, and one clear message where it cannot answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from convloom import zoo
from convloom.cli import inputs, networks, output
from convloom.cli import zoo as zoo_command
from convloom.cli.main import main
from convloom.errors import ArtifactError, ConvloomError, InvalidInputError
from convloom.zoo.digits import DigitsSplit, load_digits_split
from PIL import Image, ImageOps
from safetensors.torch import save_file

SM_90 = ("--target", "cuda:sm_90")
INTERPRETER = ("--target", "interpreter")
REFERENCE = ("--target", "reference")
QUICK_MODELS = ("lenet5", "cifar_convnet", "mlp", "alexnet", "resnet18")


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs a command that succeeds; its JSON, or its text without --json."""

    def ask(*arguments: str | Path) -> Any:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 0
        printed = capsys.readouterr().out
        return json.loads(printed) if "--json" in arguments else printed

    return ask


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that fails as it should; its message."""

    def ask(*arguments: str | Path) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and "Traceback" not in printed.err
        _, mark, message = printed.err.partition("convloom: error: ")
        assert mark
        return message.strip()

    return ask


@pytest.fixture(scope="module")
def digits() -> DigitsSplit:
    return load_digits_split()


@pytest.fixture
def scan(digits: DigitsSplit, tmp_path: Path) -> Path:
    """A held-out scan as an image file; it shows `digits.test_labels[0]`."""
    path = tmp_path / "digit.png"
    Image.fromarray((digits.test_images[0, 0] * 255).byte().numpy()).save(path)
    return path


# zoo


def test_zoo_lists_every_model(answer: Callable[..., Any]) -> None:
    rows = answer("zoo", "--json")
    assert [row["name"] for row in rows] == list(zoo.names())
    for row in rows:
        assert list(row) == ["name", "input_shape", "parameters", "macs", "activation_bytes"]
        assert row["input_shape"] == list(zoo.entry(row["name"]).input_shape)
        assert all(row[key] > 0 for key in ("parameters", "macs", "activation_bytes"))


def test_zoo_as_a_table(answer: Callable[..., Any]) -> None:
    table = answer("zoo", "resnet50", "lenet5")
    assert "25,557,032" in table and "61,706" in table and "3x224x224" in table


def test_recorded_parameters_are_those_of_the_models() -> None:
    for row in zoo_command.figures(zoo.names(), measured=False):
        with torch.device("meta"):
            model = zoo.build(row["name"]).eval()
        assert row["parameters"] == sum(p.numel() for p in model.parameters()), row["name"]


@pytest.mark.parametrize("name", QUICK_MODELS)
def test_recorded_figures_are_those_of_the_captured_graph(name: str) -> None:
    """If this fails: convloom zoo --measure --json > cli/zoo_figures.json."""
    recorded, measured = (zoo_command.figures([name], measured) for measured in (False, True))
    assert recorded == measured


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in zoo.names() if name not in QUICK_MODELS])
def test_recorded_figures_of_large_models(name: str) -> None:
    test_recorded_figures_are_those_of_the_captured_graph(name)


def test_a_model_without_recorded_figures_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: Callable[..., Any]
) -> None:
    expected = answer("zoo", "lenet5", "--json")
    empty = tmp_path / "figures.json"
    empty.write_text("[]")
    monkeypatch.setattr(zoo_command, "FIGURES", empty)
    assert answer("zoo", "lenet5", "--json") == expected


# compile and explain


@pytest.mark.interpreter
def test_compile_without_machine_code(answer: Callable[..., Any]) -> None:
    found = answer("compile", "lenet5", *INTERPRETER, "--json")
    assert list(found) == ["summary", "kernels"]
    assert found["summary"]["convs"] == 2
    assert found["summary"]["kernels"] == len(found["kernels"])
    for kernel in found["kernels"]:
        assert list(kernel) == ["name", "ops", "registers", "spill_bytes", "shared_bytes"]
        assert kernel["registers"] is kernel["spill_bytes"] is kernel["shared_bytes"] is None


def test_compile_for_a_gpu_that_is_not_here(answer: Callable[..., Any]) -> None:
    arguments = ("compile", "cifar_convnet", *SM_90, "--dtype", "float16", "--batch", "8")
    found = answer(*arguments, "--json")
    keys = {"convs", "kernels", "torch_fallbacks", "arena_bytes", "activation_bytes"}
    assert set(found["summary"]) == keys
    assert all(isinstance(count, int) for count in found["summary"].values())
    # Activations are those of the captured graph, eight times and in two bytes rather than four.
    recorded = zoo_command.figures(["cifar_convnet"], measured=False)[0]
    assert found["summary"]["activation_bytes"] == 8 * recorded["activation_bytes"] // 2
    for kernel in found["kernels"]:
        assert 0 < kernel["registers"] <= 255 and kernel["spill_bytes"] == 0
        assert kernel["shared_bytes"] >= 0 and isinstance(kernel["ops"], list)
    table = answer(*arguments)
    assert "kernels (every op alone -> this plan), 1 conv\n" in table and "conv2d, relu" in table
    assert all(title in table for title in ("regs", "spilled", "shared", "tensor", "async"))


@pytest.mark.interpreter
def test_compile_without_passes_launches_more_kernels(answer: Callable[..., Any]) -> None:
    arguments = ("compile", "lenet5", *INTERPRETER, "--json", "--passes")
    fused, unfused, some = (
        answer(*arguments, passes)["summary"]["kernels"]
        for passes in ("default", "none", "drop_identities, fuse_epilogues")
    )
    assert fused <= some < unfused


@pytest.mark.interpreter
def test_explain(answer: Callable[..., Any]) -> None:
    text = answer("explain", "lenet5", *INTERPRETER)
    assert text.startswith("lenet5 on interpreter: 12 -> ") and "\nconv1 " in text
    assert "=> heavy(x, epilogue=[f])" in text and "nothing was measured" in text
    account = answer("explain", "lenet5", *INTERPRETER, "--json")
    assert account["schema"] == "convloom-ledger" and account["model"] == "lenet5"
    assert account["nodes"] and account["plan"]["steps"] and account["summary"]["convs"] == 2
    assert all(set(each) == {"count", "rule", "reason"} for each in account["refusals"])
    dot = answer("explain", "lenet5", *INTERPRETER, "--dot")
    assert dot.startswith("digraph") and dot.endswith("}\n") and "conv1" in dot


@pytest.mark.skipif(torch.cuda.is_available(), reason="plans for this machine's GPU")
def test_explain_plans_for_a_gpu_where_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", "mlp", "--svg", str(tmp_path / "mlp.svg"), "--json"]) == 0
    printed = capsys.readouterr()
    assert "no GPU here: planned for cuda:sm_90; --target names another" in printed.err
    account = json.loads(printed.out)
    assert account["target"] == "cuda:sm_90" and account["totals"]["after"]["us"] > 0
    assert "H200 (sm_90)" in (tmp_path / "mlp.svg").read_text()
    assert main(["explain", "mlp", "--measure"]) == 0
    assert capsys.readouterr().out.startswith("mlp on interpreter: ")


def test_explain_a_kernel(
    answer: Callable[..., Any], refusal: Callable[..., str], tmp_path: Path
) -> None:
    arguments = ("explain", "mlp", *SM_90)
    kernels = answer("compile", "mlp", *SM_90, "--json")["kernels"]
    name = kernels[-1]["name"]
    source = answer(*arguments, "--kernel", name)
    assert "@triton.jit" in source and "BLOCK" in source
    assert ".target sm_90" in answer(*arguments, "--kernel", name, "--ptx")
    found = answer(*arguments, "--kernel", name, "--sass", "--json")
    assert found["kernel"] == name and "EXIT" in found["sass"]
    assert "no kernel named" in refusal(*arguments, "--kernel", "linnear")
    page = tmp_path / "page.html"
    answer(*arguments, "--html", page)
    assert f'"registers":{kernels[0]["registers"]},' in page.read_text(), "known since compile"
    own = answer("compile", "mlp", *INTERPRETER, "--json")["kernels"][0]["name"]
    assert "interpreter" in refusal("explain", "mlp", *INTERPRETER, "--kernel", own, "--ptx")
    assert "--kernel" in refusal(*arguments, "--ptx")
    assert "--dot" in refusal(*arguments, "--dot", "--json")


@pytest.mark.interpreter
def test_explain_measures(answer: Callable[..., Any], refusal: Callable[..., str]) -> None:
    account = answer("explain", "lenet5", *INTERPRETER, "--measure", "--json")
    assert account["measured_on"] == "the interpreter, not a GPU"
    assert account["totals"]["measured"]["how"] == "measured"
    assert "no steps that could be timed" in refusal(
        "explain", "lenet5", "--target", "reference", "--measure"
    )


def test_explain_draws(tmp_path: Path, answer: Callable[..., Any]) -> None:
    page, drawing = tmp_path / "new" / "lenet5.html", tmp_path / "lenet5.svg"
    arguments = ("explain", "lenet5", *REFERENCE, "--html", page, "--svg", drawing)
    assert answer(*arguments) == ""
    text = page.read_text()
    assert "<title>lenet5 on reference</title>" in text
    assert "@triton.jit" in text, "with the source of its kernels"
    assert drawing.read_text().startswith("<?xml")
    assert answer(*arguments, "--json")["model"] == "lenet5"


def test_explain_compares_passes(answer: Callable[..., Any]) -> None:
    arguments = ("explain", "lenet5", *REFERENCE, "--diff", "none", "default")
    found = answer(*arguments, "--json")
    assert found["schema"] == "convloom-ledger-diff" and found["changes"]
    assert found["before"]["kernels"] > found["after"]["kernels"]
    text = answer(*arguments)
    assert text.startswith("lenet5: none -> default")
    assert "12 kernels vanished, 1 kernel appeared in their place\n  - conv2d(" in text
    some = answer("explain", "lenet5", *REFERENCE, "--diff", "default", "fuse_epilogues", "--json")
    assert some["after"]["name"] == "fuse_epilogues" and some["gone_refusals"] is not None


def test_explain_compares_files(
    tmp_path: Path, answer: Callable[..., Any], refusal: Callable[..., str]
) -> None:
    files = {}
    for name, model, passes in (("old", "lenet5", "none"), ("other", "mlp", "default")):
        account = answer("explain", model, *REFERENCE, "--passes", passes, "--json")
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(json.dumps(account))
    old = files["old"]
    assert answer("explain", "--diff", old, old, "--json")["changes"] == []
    mixed = answer("explain", "lenet5", *REFERENCE, "--diff", old, "default", "--json")
    assert mixed["before"]["name"] == str(old) and mixed["changes"]
    message = refusal("explain", "--diff", old, files["other"])
    assert f"got lenet5 ({old}) and mlp ({files['other']}); captured ops only in" in message


def _newer(folder: Path) -> str:
    (folder / "new.json").write_text('{"schema": "convloom-ledger", "version": 99}')
    return "new.json"


def _words(folder: Path) -> str:
    (folder / "words.json").write_text("these are words")
    return "words.json"


def _bytes(folder: Path) -> str:
    (folder / "bytes.json").write_bytes(b"\xff\xfe\x00")
    return "bytes.json"


def _another_file(folder: Path) -> str:
    (folder / "plan.json").write_text('{"steps": []}')
    return "plan.json"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: "none.json", "cannot read 'none.json': No such file"),
        (lambda folder: str(folder), "Is a directory"),
        (_words, "'words.json': expected JSON"),
        (_bytes, "'bytes.json': expected JSON"),
        (_another_file, "'plan.json': expected a ledger as `convloom explain NAME --json`"),
        (_newer, "'new.json': expected version 2 of the ledger's schema, got 99"),
        (lambda folder: "default", "to compare passes, say of which model"),
    ],
)
def test_explain_refuses_what_cannot_be_compared(
    make: Callable[[Path], str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refusal: Callable[..., str],
) -> None:
    monkeypatch.chdir(tmp_path)
    first = make(tmp_path)
    assert message in refusal("explain", "--diff", first, first)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "expected NAME, a model or a file, got none"),
        (("--diff", "a.json"), "expected two compilations, A and B, got 1: a.json"),
        (("--diff", "a", "b", "lenet5"), "got 3: a b lenet5"),
        (("lenet5", "--diff", "a", "b", "--measure"), "--diff and --measure exclude each other"),
        (("lenet5", "--html", "x.html", "--dot"), "--html and --dot exclude each other"),
        (("lenet5", "--diff", "none", "defolt", *("--target", "reference")), "mean default?"),
    ],
)
def test_explain_refuses_options_that_do_not_go_together(
    options: tuple[str, ...], message: str, refusal: Callable[..., str]
) -> None:
    assert message in refusal("explain", *options)


@pytest.mark.interpreter
def test_debug_output_stays_out_of_json(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[..., Any]
) -> None:
    monkeypatch.setenv("CONVLOOM_DEBUG", "4")
    assert answer("compile", "mlp", *INTERPRETER, "--json")["summary"]["convs"] == 0


# run


@pytest.mark.interpreter
@pytest.mark.parametrize("ink", ["bright", "dark"])
def test_run_reads_a_digit(
    ink: str, scan: Path, digits: DigitsSplit, answer: Callable[..., Any]
) -> None:
    if ink == "dark":
        ImageOps.invert(Image.open(scan)).resize((64, 64)).convert("RGB").save(scan)
    found = answer("run", "lenet5", "--weights", "digits", scan, *INTERPRETER, "--json")
    assert found["target"] == "interpreter" and found["output_shape"] == [1, 10]
    classes = [place["class"] for place in found["top"][0]]
    assert classes[0] == digits.test_labels[0] and len(classes) == 5
    text = answer("run", "lenet5", "--weights", "digits", scan, *INTERPRETER)
    assert f"class {classes[0]:>4}" in text


@pytest.mark.interpreter
def test_run_reads_the_image_that_comes_with_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, digits: DigitsSplit, answer: Callable[..., Any]
) -> None:
    """The first command of README.md, in any folder."""
    monkeypatch.chdir(tmp_path)
    found = answer("run", "lenet5", "--weights", "digits", "digit.png", *REFERENCE, "--json")
    assert found["top"][0][0]["class"] == digits.test_labels[0]
    Image.new("L", (32, 32)).save("digit.png")
    assert inputs.present(Path("digit.png")).read_bytes() == Path("digit.png").read_bytes()


@pytest.mark.interpreter
def test_run_writes_what_torch_computes(tmp_path: Path, answer: Callable[..., Any]) -> None:
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    source, written = tmp_path / "x.npy", tmp_path / "new" / "y.npy"
    np.save(source, x.numpy())
    text = answer("run", "cifar_convnet", source, *INTERPRETER, "--output", written)
    assert "(3, 10)" in text
    y = torch.from_numpy(np.load(written))
    with torch.no_grad():
        torch.testing.assert_close(y, networks.zoo_model("cifar_convnet")(x))
    assert [path.name for path in written.parent.iterdir()] == ["y.npy"]


@pytest.mark.interpreter
def test_run_with_a_weight_file(tmp_path: Path, scan: Path, answer: Callable[..., Any]) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file(networks.zoo_model("lenet5", "digits").state_dict(), weights)
    arguments = ("run", "lenet5", scan, *INTERPRETER, "--json", "--weights")
    assert answer(*arguments, weights) == answer(*arguments, "digits")


def _not_an_image(folder: Path) -> Path:
    path = folder / "photo.jpg"
    path.write_text("these are words")
    return path


def _half_an_image(folder: Path) -> Path:
    path = folder / "half.png"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    return path


def _not_an_array(folder: Path) -> Path:
    path = folder / "x.npy"
    path.write_bytes(b"\x93NUMPY and then nothing")
    return path


def _objects(folder: Path) -> Path:
    path = folder / "objects.npy"
    np.save(path, np.array([{"a": 1}]), allow_pickle=True)
    return path


def _array(shape: tuple[int, ...], kind: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        np.save(folder / "x.npy", np.zeros(shape, kind))
        return folder / "x.npy"

    return write


BAD_INPUTS = (
    (lambda folder: folder / "none.png", ArtifactError, "no such file"),
    (lambda folder: folder, ArtifactError, "a folder"),
    (_not_an_image, ArtifactError, "Pillow knows no such image"),
    (_half_an_image, ArtifactError, "cannot be decoded"),
    (_not_an_array, ArtifactError, "expected a .npy file"),
    (_objects, ArtifactError, "expected a .npy file"),
    (_array((3, 32, 31), "f4"), InvalidInputError, "expected shape (3, 32, 32)"),
    (_array((32, 32), "f4"), InvalidInputError, "got (32, 32)"),
    (_array((0, 3, 32, 32), "f4"), InvalidInputError, "got (0, 3, 32, 32)"),
    (_array((3, 32, 32), "i4"), InvalidInputError, "got int32"),
)


@pytest.mark.parametrize(("write", "kind", "message"), BAD_INPUTS)
def test_run_refuses_bad_inputs(
    write: Callable[[Path], Path],
    kind: type[ConvloomError],
    message: str,
    tmp_path: Path,
    refusal: Callable[..., str],
) -> None:
    path = write(tmp_path)
    with pytest.raises(kind):
        inputs.read_input(path, zoo.entry("cifar_convnet"))
    kept = tmp_path / "y.npy"
    said = refusal("run", "cifar_convnet", path, *INTERPRETER, "--output", kept)
    assert message in said and str(path) in said
    assert not kept.exists()


@pytest.mark.parametrize(
    ("content", "message"), [(None, "no such file"), (b"garbage", "damaged"), (b"", "damaged")]
)
def test_run_refuses_bad_weights(
    content: bytes | None, message: str, tmp_path: Path, scan: Path, refusal: Callable[..., str]
) -> None:
    weights = tmp_path / "weights.safetensors"
    if content is not None:
        weights.write_bytes(content)
    said = refusal("run", "lenet5", "--weights", weights, scan, *INTERPRETER)
    assert message in said and str(weights) in said


def test_run_refuses_weights_of_another_model(scan: Path, refusal: Callable[..., str]) -> None:
    shipped = Path(zoo.__file__).parent / "weights" / "lenet5_digits.safetensors"
    said = refusal("run", "cifar_convnet", "--weights", shipped, scan, *INTERPRETER)
    assert "does not fit" in said


# Names


@pytest.mark.parametrize("command", [("compile",), ("explain",), ("run", "x.npy"), ("zoo",)])
def test_unknown_models_are_refused_with_near_names(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    name, *rest = command
    assert main([name, "resnet5o", *rest]) == 2
    said = capsys.readouterr().err
    assert said.startswith("convloom: error: ") and "did you mean resnet50" in said


def test_a_name_that_is_like_no_model_gets_the_command_that_lists_them(
    refusal: Callable[..., str],
) -> None:
    said = refusal("explain", "no_such_network")
    assert said == (
        "unknown zoo model 'no_such_network': `convloom zoo` lists the "
        f"{len(zoo.names())} that there are"
    )


@pytest.mark.parametrize("columns", ["60", "200", "", "many"])
def test_tables_are_as_wide_as_columns_says(
    columns: str, monkeypatch: pytest.MonkeyPatch, answer: Callable[..., Any]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    width = int(columns) if columns.isdigit() else output.PLAIN_WIDTH
    assert output.console().width == width
    assert max(map(len, answer("zoo", "lenet5").splitlines())) <= width


@pytest.mark.parametrize("command", [("compile", "lenet5"), ("explain", "lenet5")])
def test_unknown_targets_and_passes_are_refused(
    command: tuple[str, ...], refusal: Callable[..., str]
) -> None:
    assert "unknown target 'cuda:sm_70'" in refusal(*command, "--target", "cuda:sm_70")
    passes = ("--passes", "drop_identities,fold_batchnorm")
    assert "fold_batch_norm" in refusal(*command, *INTERPRETER, *passes)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("fly",),
        ("compile",),
        ("compile", "lenet5", "--batch", "0"),
        ("compile", "lenet5", "--dtype", "int8"),
        ("explain", "lenet5", "--kernel", "k", "--ptx", "--sass"),
    ],
)
def test_wrong_usage_is_refused(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: convloom" in capsys.readouterr().err


def test_help_breaks_no_name_at_its_hyphen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for columns in range(60, 100, 5):
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit):
            main(["explain", "--help"])
        assert '"conv-pool@layer1.*"' in capsys.readouterr().out


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVLOOM_DEBUG", "1")
    with pytest.raises(InvalidInputError):
        main(["zoo", "no_such_model"])
    monkeypatch.setenv("CONVLOOM_DEBUG", "loud")
    assert main(["zoo", "no_such_model"]) == 2


# Images and files


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK"])
@pytest.mark.parametrize("size", [(300, 200), (10, 500), (224, 224), (1, 1)])
def test_any_image_becomes_the_models_input(mode: str, size: tuple[int, int]) -> None:
    for name in ("resnet18", "lenet5", "unet"):
        entry = zoo.entry(name)
        x = inputs.image_tensor(Image.new(mode, size), entry)
        assert x.shape == (1, *entry.input_shape) and x.dtype is torch.float32
        assert x.isfinite().all()


def test_an_image_of_the_right_size_keeps_its_pixels() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    x = inputs.image_tensor(Image.fromarray(noise), zoo.entry("cifar_convnet"))
    scales = (inputs.MEAN, inputs.DEVIATION)
    mean, deviation = (torch.tensor(each)[:, None, None] for each in scales)
    restored = (x[0] * deviation + mean) * 255
    torch.testing.assert_close(restored, torch.from_numpy(noise).permute(2, 0, 1).float())


def test_a_photograph_is_cropped_from_its_centre() -> None:
    photo = Image.new("RGB", (640, 256), "red")
    photo.paste("lime", (192, 0, 448, 256))
    x = inputs.image_tensor(photo, zoo.entry("resnet18"))
    assert (x[0, 1] > x[0, 0]).all()


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "out.bin"
    path.write_bytes(b"before")

    def fail(file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ArtifactError, match="No space left on device"):
        output.write_file(path, fail)
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
    output.write_file(path, lambda file: file.write(b"after"))
    assert path.read_bytes() == b"after" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ArtifactError, match="cannot write"):
        output.write_file(tmp_path, lambda file: file.write(b"x"))


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({"a": [float("nan"), (1.5, float("inf"))]})
    assert json.loads(capsys.readouterr().out) == {"a": [None, [1.5, None]]}
