"""``python -m bitorch_qlinear convert`` packs named layers of a file into what pack() makes of the whole model."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.reference import assert_equal
from torch import nn

import bitorch_qlinear
from bitorch_qlinear import QLinear, __main__, binarize, pack, quantizations
from bitorch_qlinear.convert import files
from bitorch_qlinear.quantizations import registry

LAYERS = r"blocks\.\d\.fc[12]"
X = torch.linspace(-1, 1, 5 * 12).reshape(5, 12).mul(1e3).sin()


class Block(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.norm = nn.BatchNorm1d(40)
        self.fc1 = nn.Linear(40, 33, dtype=dtype)
        self.fc2 = nn.Linear(33, 40, bias=False, dtype=dtype)

    def forward(self, x):
        return x + self.fc2(self.fc1(self.norm(x)))


class Model(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.stem = nn.Linear(12, 40)
        self.blocks = nn.ModuleList([Block(dtype), Block(dtype)])
        self.head = nn.Linear(40, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def write(state, path):
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, {"note": "mine"})
    else:
        torch.save(state, path)
    return path


def read(path):
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def convert(source, target, *arguments, layers=(LAYERS,)):
    patterns = [part for layer in layers for part in ("--layers", layer)]
    return __main__.main(["convert", str(source), str(target), *patterns, *map(str, arguments)])


def refused(capsys, source, target, *arguments, layers=(LAYERS,)):
    """Return the error of a conversion that must not write anything."""
    before = sorted(path.name for path in target.parent.iterdir()) if target.parent.is_dir() else []
    held = target.read_bytes() if target.is_file() else None
    assert convert(source, target, *arguments, layers=layers) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("error: ")
    if target.parent.is_dir():
        assert sorted(path.name for path in target.parent.iterdir()) == before
    assert held is None or target.read_bytes() == held
    return error.removeprefix("error: ")


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_equal(actual[name], tensor, name)


# ---- what comes out ----

OPTIONS = [
    {},
    {"input_quantization": "steheaviside", "weight_quantization": "approxsign"},
    {"input_quantization": "identity", "weight_quantization": "steheaviside"},
    {"input_quantization": "progressive_sign", "weight_quantization": "weightdorefa"},
    {"weight_scale": "mean"},
    {"input_quantization": "inputdorefa", "weight_quantization": "steheaviside", "weight_scale": "mean"},
    {"weight_quantization": "ternary"},
    {"input_quantization": "steheaviside", "weight_quantization": "ternary", "weight_scale": "mean"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("extensions", [(".pt", ".safetensors"), (".safetensors", ".bin"), (".pth", ".pt")])
def test_the_file_holds_what_pack_makes(extensions, options, tmp_path):
    model = Model().eval()
    model.blocks[0].fc1.weight.data[:, ::5] = 0
    source, target = (tmp_path / f"model{number}{extension}" for number, extension in enumerate(extensions))
    write(model.state_dict(), source)
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    assert convert(source, target, *flags) == 0
    packed = pack(binarize(model, **options).eval())
    assert_same_state(read(target), packed.state_dict())
    other = pack(binarize(Model(), **options).eval())
    other.load_state_dict(read(target))
    assert_equal(other(X), packed(X))
    assert_same_state(read(source), model.state_dict())


@pytest.mark.parametrize("extension", [".pt", ".safetensors"])
@pytest.mark.parametrize("kind", ["mean", "learned"])
@pytest.mark.parametrize("weights", ["sign", "ternary"])
def test_layers_with_a_scale(kind, extension, weights, tmp_path):
    options = {"weight_scale": kind, "weight_quantization": weights}
    model = binarize(Model(), **options).eval()
    for layer in model.modules():
        if isinstance(layer, QLinear) and kind == "learned":
            layer.scale.data.uniform_(-1, 1)
    source = write(model.state_dict(), tmp_path / f"a{extension}")
    assert convert(source, tmp_path / "b.pt", "--weight-scale", kind, "--weight-quantization", weights) == 0
    assert_same_state(read(tmp_path / "b.pt"), pack(model).state_dict())
    other = pack(binarize(Model(), **options).eval())
    other.load_state_dict(read(tmp_path / "b.pt"))
    assert_equal(other(X), pack(model)(X))


def test_a_scale_is_not_left_out(tmp_path, capsys):
    for kind, other in (("mean", None), ("mean", "learned"), ("learned", None), ("learned", "mean")):
        source = write(binarize(Model(), weight_scale=kind).state_dict(), tmp_path / f"{kind}.pt")
        error = refused(capsys, source, tmp_path / "b.pt", *(["--weight-scale", other] if other else []))
        assert f"--weight-scale {kind}" in error, error


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_float_dtype(dtype, tmp_path):
    model = Model(dtype)
    assert convert(write(model.state_dict(), tmp_path / "a.pt"), tmp_path / "b.safetensors") == 0
    assert_same_state(read(tmp_path / "b.safetensors"), pack(binarize(model)).state_dict())


def test_a_lone_layer(tmp_path):
    layer = nn.Linear(70, 9)
    assert convert(write(layer.state_dict(), tmp_path / "a.pt"), tmp_path / "b.pt", layers=[""]) == 0
    assert_same_state(read(tmp_path / "b.pt"), pack(QLinear.from_linear(layer)).state_dict())


def test_a_second_conversion_packs_further_layers(tmp_path):
    model = Model()
    first, second = tmp_path / "1.pt", tmp_path / "2.pt"
    assert convert(write(model.state_dict(), tmp_path / "0.pt"), first, layers=[r".*fc1"]) == 0
    assert convert(first, second, "--input-quantization", "steheaviside", layers=[r"blocks.0.fc2", ".*1.fc2"]) == 0
    expected = binarize(model, rules={".*fc2": {"input_quantization": "steheaviside"}})
    assert_same_state(read(second), pack(expected).state_dict())


def test_versions_of_modules_and_metadata_are_kept(tmp_path):
    model = Model()
    assert convert(write(model.state_dict(), tmp_path / "a.pt"), tmp_path / "b.pt") == 0
    assert read(tmp_path / "b.pt")._metadata == model.state_dict()._metadata
    assert convert(write(model.state_dict(), tmp_path / "a.safetensors"), tmp_path / "b.safetensors") == 0
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata() == {"note": "mine", "format": "pt"}


def test_other_entries_are_kept_in_a_torch_file(tmp_path):
    state = {**Model().state_dict(), "epoch": 3, "note": "mine"}
    assert convert(write(state, tmp_path / "a.pt"), tmp_path / "b.pt") == 0
    held = read(tmp_path / "b.pt")
    assert held["epoch"] == 3 and held["note"] == "mine"


def test_the_report(tmp_path, capsys):
    source = write(Model().state_dict(), tmp_path / "a.pt")
    assert convert(source, tmp_path / "b.pt", "--dry-run") == 0
    assert not (tmp_path / "b.pt").exists()
    dry = capsys.readouterr().out.splitlines()
    assert convert(source, tmp_path / "b.pt") == 0
    lines = capsys.readouterr().out.splitlines()
    assert dry[:-1] == lines[:-1]
    assert dry[-1] == "nothing was written (--dry-run)" and lines[-1] == f"wrote {tmp_path / 'b.pt'}"
    # fc1: 33 × 40 weights and 33 biases before, 33 × 2 words, the biases and four numbers of 8 bytes after
    assert lines[1].split() == ["blocks.0.fc1", "33", "×", "40", "float32", "5.41", "kB", "428", "B"]
    assert lines[2].split() == ["blocks.0.fc2", "40", "×", "33", "float32", "5.28", "kB", "352", "B"]
    state = Model().state_dict()
    before = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    after = before - 2 * (5412 + 5280) + 2 * (428 + 352)
    assert lines[-2] == (
        f"4 layers packed, {len(state) - 6} other entries kept; all tensors: "
        f"{before / 1000:.3g} kB before, {after / 1000:.3g} kB after"
    )


# ---- shared memory ----


def tied_state():
    model = Model()
    model.blocks[1].fc1.weight = model.blocks[0].fc1.weight
    return model


@pytest.mark.parametrize("extension", [".pt", ".safetensors"])
def test_packed_layers_that_share_a_weight(extension, tmp_path):
    model = tied_state()
    target = tmp_path / f"b{extension}"
    assert convert(write(model.state_dict(), tmp_path / "a.pt"), target) == 0
    state = read(target)
    assert_same_state(state, pack(binarize(model)).state_dict())
    shared = state["blocks.0.fc1.weight"].data_ptr() == state["blocks.1.fc1.weight"].data_ptr()
    assert shared == (extension == ".pt")


def test_a_weight_that_a_real_layer_shares_is_refused(tmp_path, capsys):
    source = write(tied_state().state_dict(), tmp_path / "a.pt")
    said = refused(capsys, source, tmp_path / "b.pt", layers=[r"blocks\.0\.fc1"])
    assert said.startswith(
        "blocks.0.fc1.weight: expected a weight of its own, got one that shares its memory with blocks.1"
    )


def test_views_of_one_buffer_that_do_not_overlap_are_not_shared(tmp_path):
    flat = torch.randn(2 * 40 * 64)
    state = {"a.weight": flat[: 40 * 64].view(40, 64), "b.weight": flat[40 * 64 :].view(40, 64)}
    assert convert(write(state, tmp_path / "a.pt"), tmp_path / "b.safetensors", layers=["a"]) == 0
    assert_equal(read(tmp_path / "b.safetensors")["b.weight"], state["b.weight"])


def test_shared_entries_that_stay_are_refused_for_safetensors_only(tmp_path, capsys):
    state = Model().state_dict()
    state["again"] = state["head.weight"]
    source = write(state, tmp_path / "a.pt")
    said = refused(capsys, source, tmp_path / "b.safetensors")
    assert "head.weight: expected memory of its own" in said and "again: write a .pt" in said
    assert convert(source, tmp_path / "b.pt") == 0
    held = read(tmp_path / "b.pt")
    assert held["again"].data_ptr() == held["head.weight"].data_ptr()


# ---- refusals ----


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([r"blocks\.\d\.norm"], "blocks.0.norm.weight: expected the 2-D weight of a linear layer, got shape (40,)"),
        (
            ["fc1"],
            "--layers 'fc1': expected a pattern that matches the whole name of a layer, and this one matches none; the",
        ),
        ([LAYERS, "stem.weight"], "--layers 'stem.weight': expected a pattern that matches the whole name of a layer"),
        ([r"blocks\.0\.fc"], r"--layers 'blocks\\.0\\.fc': expected a pattern that matches the whole name of a layer"),
        (["("], "--layers '(': expected a regular expression"),
    ],
)
def test_wrong_names(layers, message, tmp_path, capsys):
    source = write(Model().state_dict(), tmp_path / "a.pt")
    assert refused(capsys, source, tmp_path / "b.pt", layers=layers).startswith(message)


def test_all_layers_with_a_problem_are_named(tmp_path, capsys):
    source = write(Model().state_dict(), tmp_path / "a.pt")
    said = refused(capsys, source, tmp_path / "b.pt", layers=[".*"])
    assert "blocks.0.norm.weight: " in said and "blocks.1.norm.weight: " in said


def changed(**entries):
    state = Model().state_dict()
    for name, value in entries.items():
        state[name.replace("__", ".")] = value
    return state


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            {"blocks__0__fc1__weight": torch.ones(33, 40, dtype=torch.int32)},
            "blocks.0.fc1.weight: expected float64, float",
        ),
        (
            {"blocks__0__fc1__weight": torch.ones(33, 40).to(torch.float8_e4m3fn)},
            "blocks.0.fc1.weight: expected float64",
        ),
        ({"blocks__0__fc1__weight": torch.ones(33, 40).to_sparse()}, "blocks.0.fc1.weight: expected a dense tensor"),
        ({"blocks__0__fc1__weight": 3}, "blocks.0.fc1.weight: expected a dense tensor, got a int"),
        ({"blocks__0__fc1__bias": torch.ones(34)}, "blocks.0.fc1.bias: expected shape (33,), got (34,)"),
        (
            {"blocks__0__fc1__bias": torch.ones(33).int()},
            "blocks.0.fc1.bias: expected a dense tensor of floats, got torch",
        ),
        (
            {"blocks__0__fc1__scale": torch.ones(33)},
            "blocks.0.fc1.weight: expected the weight of a linear layer, which",
        ),
        (
            {"blocks__0__fc1__adapter__weight": torch.ones(33, 2)},
            "blocks.0.fc1.weight: expected the weight of a linear",
        ),
    ],
)
def test_entries_that_are_no_linear_layer(entries, message, tmp_path, capsys):
    source = write(changed(**entries), tmp_path / "a.pt")
    said = refused(capsys, source, tmp_path / "b.pt")
    assert said.startswith(message) and said.count("\n") == 1


def test_ternary_weights_that_are_not_finite_are_refused(tmp_path, capsys):
    state = Model().state_dict()
    state["blocks.1.fc2.weight"][7, 3] = float("nan")
    source = write(state, tmp_path / "a.pt")
    said = refused(capsys, source, tmp_path / "b.pt", "--weight-quantization", "ternary")
    assert said.startswith("blocks.1.fc2: cannot be packed: weight: expected finite values") and "row 7" in said


def test_a_packed_layer_is_not_packed_again(tmp_path, capsys):
    source = write(pack(binarize(Model())).state_dict(), tmp_path / "a.pt")
    assert "blocks.0.fc1.weight: expected float weights, got the words of a layer that is packed already" in refused(
        capsys, source, tmp_path / "b.pt"
    )


@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 6}])
def test_the_projection_of_an_attention_is_refused(sizes, tmp_path, capsys):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, **sizes)})
    source = write(model.state_dict(), tmp_path / "a.pt")
    assert "MultiheadAttention reads" in refused(capsys, source, tmp_path / "b.pt", layers=[r".*out_proj"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--input-quantization", "sing"], "input_quantization: expected one of "),
        (["--weight-scale", "max"], "weight_scale: expected None, 'mean' or 'learned', got 'max'"),
        (["--weight-scale", "learned"], "blocks.0.fc1: "),
        (
            ["--input-quantization", "weightdorefa"],
            "blocks.0.fc1: cannot be packed: input_quantization: expected a sign-like",
        ),
        (
            ["--weight-quantization", "identity"],
            "blocks.0.fc1: cannot be packed: weight_quantization: expected one whose",
        ),
    ],
)
def test_quantizations_that_cannot_be_packed(flags, message, tmp_path, capsys):
    source = write(Model().state_dict(), tmp_path / "a.pt")
    assert refused(capsys, source, tmp_path / "b.pt", *flags).startswith(message)


def test_files_that_are_not_as_expected(tmp_path, capsys):
    state = Model().state_dict()
    source = write(state, tmp_path / "a.pt")
    existing = write(state, tmp_path / "existing.pt")
    assert "an existing file, which --force replaces" in refused(capsys, source, existing)
    assert "an existing file, which --force replaces" in refused(capsys, source, source)
    assert "expected the extension .pt, .pth, .bin, .safetensors, got .onnx" in refused(
        capsys, source, tmp_path / "b.onnx"
    )
    assert "got none" in refused(capsys, source, tmp_path / "b")
    assert "expected a folder" in refused(capsys, source, tmp_path / "no" / "b.pt")
    assert "No such file" in refused(capsys, tmp_path / "no.pt", tmp_path / "b.pt")
    assert "expected the extension" in refused(capsys, write(state, tmp_path / "a.npz"), tmp_path / "b.pt")
    for name in ("bytes.pt", "bytes.safetensors"):
        (tmp_path / name).write_bytes(b"no state dict" * 9)
        assert f"{name}: expected a" in refused(capsys, tmp_path / name, tmp_path / "b.pt")
    whole = write(Model(), tmp_path / "whole.pt")
    assert "expected a state dict that torch.load(weights_only=True) can read" in refused(
        capsys, whole, tmp_path / "b.pt"
    )
    listed = write([torch.ones(3)], tmp_path / "list.pt")
    assert "expected a state dict, got a list" in refused(capsys, listed, tmp_path / "b.pt")
    nested = write({"model": state, "epoch": 3}, tmp_path / "nested.pt")
    assert "without tensors but the dictionaries model: save the state dict" in refused(
        capsys, nested, tmp_path / "b.pt"
    )
    more = write({**state, "epoch": 3}, tmp_path / "more.pt")
    assert "epoch: expected a tensor, because safetensors" in refused(capsys, more, tmp_path / "b.safetensors")


def test_force_replaces_a_file_even_the_source(tmp_path):
    model = Model()
    for extension in (".pt", ".safetensors"):
        path = write(model.state_dict(), tmp_path / f"a{extension}")
        before = path.read_bytes()
        with path.open("rb") as reader:  # which sees the old file or the new one and nothing between
            assert convert(path, path, "--force") == 0
            assert reader.read() == before
        assert_same_state(read(path), pack(binarize(model)).state_dict())
        assert sorted(tmp_path.glob(f"*{extension}*")) == [path]


@pytest.mark.parametrize("extension", [".pt", ".safetensors"])
def test_a_failure_while_writing_leaves_nothing_behind(extension, tmp_path, capsys, monkeypatch):
    source, target = write(Model().state_dict(), tmp_path / "a.pt"), tmp_path / f"b{extension}"
    target.write_bytes(b"before")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    assert "no space left" in refused(capsys, source, target, "--force")


def test_entries_are_not_changed():
    state = Model().state_dict()
    before = copy.deepcopy(state)
    files.pack_entries(state, [LAYERS], {})
    assert_same_state(state, before)


def test_a_folder_is_no_target(tmp_path, capsys):
    source, folder = write(Model().state_dict(), tmp_path / "a.pt"), tmp_path / "folder.pt"
    folder.mkdir()
    assert "expected a file, got a folder" in refused(capsys, source, folder, "--force")


class Shifted(quantizations.Quantization):
    """A weight quantization with a parameter, which belongs to the layer's entries."""

    name, bit_width = "shifted", 1

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(0.02))

    def quantize(self, x):
        return torch.where(x < self.shift, -1.0, 1.0)


def test_entries_of_a_quantization_count(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(registry, "_classes", {**registry._classes, "shifted": Shifted})
    layer = QLinear(40, 33, weight_quantization="shifted").eval()
    layer.weight_quantization.shift.data.fill_(-0.05)
    state = {f"fc.{name}": tensor for name, tensor in layer.state_dict().items()}
    options = {"weight_quantization": "shifted"}
    packed, _ = files.pack_entries(state, ["fc"], options)
    assert_same_state(packed, pack(nn.ModuleDict({"fc": layer})).state_dict())
    del state["fc.weight_quantization.shift"]
    with pytest.raises(ValueError, match=r"fc: (?s:.*)Missing key.*weight_quantization\.shift"):
        files.pack_entries(state, ["fc"], options)


@pytest.mark.slow
def test_the_command(tmp_path):
    source = write(Model().state_dict(), tmp_path / "a.pt")
    root = str(Path(bitorch_qlinear.__file__).parents[1])
    command = [sys.executable, "-m", "bitorch_qlinear", "convert", str(source), str(tmp_path / "b.safetensors")]
    result = subprocess.run([*command, "--layers", LAYERS], capture_output=True, text=True, cwd=root)
    assert result.returncode == 0 and "4 layers packed" in result.stdout and result.stderr == ""
    result = subprocess.run([*command, "--layers", LAYERS], capture_output=True, text=True, cwd=root)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stdout == ""
