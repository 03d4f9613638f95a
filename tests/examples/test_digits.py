"""A small run of the example does what it claims; its files and its errors. No test depends on how fast it ran."""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from bitorch_qlinear import PackedQLinear, QLinear, _kernels, info, linear, pack
from examples.digits import __main__ as command
from examples.digits import costs, model, report

EPOCHS, HIDDEN, SEED = 3, 256, 1


class Run(NamedTuple):
    output: str
    results: dict[str, Any]
    png: bytes
    program: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("demo")
    png, results = folder / "demo.png", folder / "demo.json"
    program = folder / "demo.pt2"
    flags = {"epochs": EPOCHS, "hidden": HIDDEN, "seed": SEED, "device": "cpu", "plot": png, "json": results}
    flags["export"] = program
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
        patch.setattr(costs, "ROUNDS", 2)
        patch.setattr(costs, "BLOCK_SECONDS", 0.0)
        command.main([part for name, value in flags.items() for part in (f"--{name}", str(value))])
    return Run(output.getvalue(), json.loads(results.read_text()), png.read_bytes(), program)


def test_learns_and_packs_without_a_difference(run: Run) -> None:
    assert run.results["test_accuracy"]["binary"] > 0.85
    assert run.results["identical_predictions"] is True
    assert f"{model.HIDDEN_LAYERS} binary layers: {model.HIDDEN_LAYERS} packed" in run.output
    assert "identical for all 450 test images" in run.output
    assert run.output.count("words for the next layer") == model.HIDDEN_LAYERS - 1
    assert "limits through BatchNorm1d" in run.output


def test_exported_program_runs_alone(run: Run) -> None:
    digits = model.load_digits(SEED, torch.device("cpu"))
    logits = torch.export.load(run.program).module()(digits.x_test)
    recognized = (logits.argmax(1) == digits.y_test).float().mean().item()
    assert recognized == run.results["test_accuracy"]["binary"]
    # The words take 1/32 of the float weights; the real layers, the BatchNorms and the graph are the rest.
    weights = model.HIDDEN_LAYERS * HIDDEN * HIDDEN
    assert weights // 8 < run.program.stat().st_size < 2 * weights


def test_tables_name_all_models(run: Run) -> None:
    for name in (costs.FLOAT32, costs.QLINEAR, costs.PACKED, costs.FUSED):
        rows = [line for line in run.output.splitlines() if line.startswith(name + " ") and "  " in line]
        assert len(rows) == 2, f"one row of sizes and one of latencies for {name}"
        # A fused model has no single layer whose time could be shown.
        times = {costs.FLOAT32: 0, costs.FUSED: 2}.get(name, 4)
        assert [row.count("×") for row in rows] == [min(4, 2 * times), times]
    for word in (
        "[kB]",
        "[µs]",
        "batch 256",
        f"kernel: {info().kernel}",
        f"threads: {torch.get_num_threads()}",
        costs.processor_name(),
    ):
        assert word in run.output


def test_json_holds_what_was_measured_and_where(run: Run) -> None:
    results = run.results
    assert results["settings"] == {
        "epochs": EPOCHS,
        "hidden": HIDDEN,
        "hidden_layers": model.HIDDEN_LAYERS,
        "seed": SEED,
    }
    assert set(results["training"]) == set(results["test_accuracy"]) == {"binary", "float32"}
    for name, training in results["training"].items():
        assert all(len(values) == EPOCHS for values in training.values())
        assert min(training["epoch_seconds"]) > 0
        assert results["test_accuracy"][name] == training["test_accuracy"][-1]
    environment = results["environment"]
    assert environment["kernel"] == info().kernel
    assert environment["cpu_capability"] == info().cpu_capability
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == torch.get_num_threads()
    assert environment["processor"] and environment["date"]
    assert list(results["models"]) == [costs.FLOAT32, costs.QLINEAR, costs.PACKED, costs.FUSED]
    for name, values in results["models"].items():
        assert len(values) == (6 if name == costs.FUSED else 8) and all(value > 0 for value in values.values())


def test_sizes_are_those_of_the_weights(run: Run) -> None:
    floats, qlinear, packed, fused = run.results["models"].values()
    weights = model.HIDDEN_LAYERS * HIDDEN * HIDDEN
    assert floats["resident_hidden_bytes"] == 4 * weights
    assert qlinear["resident_hidden_bytes"] == 4 * weights  # it keeps nothing else
    # The words, and the form that a kernel reads where it wants another: 1/32 or 2/32 of the floats, and a header and
    # four numbers a layer.
    forms = 2 if _kernels.prepared_layout().unit_bytes else 1
    assert 0 <= packed["resident_hidden_bytes"] - forms * weights // 8 <= 1024
    assert 0 < packed["checkpoint_hidden_bytes"] - weights // 8 < 16384
    assert floats["checkpoint_hidden_bytes"] > 4 * weights
    assert fused["resident_hidden_bytes"] == packed["resident_hidden_bytes"]
    for values in (floats, qlinear, packed, fused):
        assert values["checkpoint_model_bytes"] > values["checkpoint_hidden_bytes"]
        assert values["resident_model_bytes"] > values["resident_hidden_bytes"]


def test_plot_is_a_png(run: Run) -> None:
    assert run.png.startswith(b"\x89PNG\r\n\x1a\n")


def test_default_model_is_binarized_inside() -> None:
    arguments = command.parse_arguments([])
    classifier = model.build_model(64, arguments.hidden)
    layers = list(model.hidden_layers(classifier))
    assert len(layers) >= 2 and all(type(layer) is QLinear for layer in layers)
    assert all(layer.in_features == layer.out_features >= 1024 for layer in layers)
    assert type(classifier.first) is type(classifier.last) is nn.Linear


@pytest.mark.slow
def test_same_seed_same_training() -> None:
    def curve() -> tuple[list[float], list[float]]:
        digits = model.load_digits(SEED, torch.device("cpu"))
        torch.manual_seed(SEED)
        training = model.train(model.build_model(64, 32), digits, 2)
        return training.loss, training.test_accuracy

    assert curve() == curve()


def test_twin_begins_with_the_same_weights_and_sees_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = model.load_digits(SEED, torch.device("cpu"))
    arguments = command.parse_arguments(["--hidden", "32", "--epochs", "2", "--seed", str(SEED), "--device", "cpu"])
    seen: dict[bool, list[torch.Tensor]] = {True: [], False: []}
    for binary in (True, False):

        def keep(network: nn.Module, *_: object, kept: list[torch.Tensor] = seen[binary]) -> model.Training:
            kept += [tensor.clone() for tensor in network.parameters()]
            kept.append(torch.randperm(100))  # train_epoch draws its batches from here on
            return model.Training([0.0], [0.0], [0.0])

        monkeypatch.setattr(command, "train", keep)
        network, _ = command.train_from_seed(binary, digits, arguments)
        assert all(isinstance(layer, QLinear) is binary for layer in model.hidden_layers(network))
    assert len(seen[True]) == len(seen[False]) > 1
    assert all(map(torch.equal, seen[True], seen[False]))


@pytest.mark.slow
def test_report_needs_only_the_json(run: Run, tmp_path: Path) -> None:
    assert report.text(run.results) in run.output
    report.plot(tmp_path / "again.png", run.results)
    assert (tmp_path / "again.png").stat().st_size > 0


def test_accuracies_are_side_by_side(run: Run) -> None:
    for name, title in report.TRAINED.items():
        (row,) = [line for line in run.output.splitlines() if line.startswith(title)]
        recognized = round(450 * run.results["test_accuracy"][name])
        assert f"{recognized / 450:.2%}" in row and f"{recognized} of 450" in row


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "shown"), [(io.StringIO, False), (Terminal, True)])
def test_progress_bar_only_in_a_terminal(
    stream: type[io.StringIO], shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = stream()
    monkeypatch.setattr(sys, "stderr", written)
    assert list(model.progress_bar(3, "training", "epoch")) == [0, 1, 2]
    assert ("training" in written.getvalue()) is shown


def test_every_class_is_split_alike() -> None:
    digits = model.load_digits(SEED, torch.device("cpu"))
    assert (len(digits.x_train), len(digits.x_test)) == (1347, 450)
    assert digits.x_train.min() == -1 and digits.x_train.max() == 1
    train, test = (labels.bincount(minlength=model.CLASSES) / len(labels) for labels in (digits.y_train, digits.y_test))
    torch.testing.assert_close(train, test, atol=0.005, rtol=0)


def test_difference_of_the_packed_model_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    trained, x = nn.Sequential(QLinear(64, 10)), torch.randn(5, 64)

    for wrong_if_fused in (False, True):

        def pack_badly(trained: nn.Module, fuse: bool = False, wrong: bool = wrong_if_fused) -> nn.Module:
            return nn.Sequential(PackedQLinear(64, 10)) if fuse is wrong else pack(trained, fuse=fuse)

        monkeypatch.setattr(model, "pack", pack_badly)
        name = "fused" if wrong_if_fused else "packed"
        with pytest.raises(RuntimeError, match=rf"the {name} model differs from the trained one in \d+ of 50 logits"):
            model.pack_and_check(trained, x)


def test_difference_of_the_exported_program_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Program:
        def module(self) -> nn.Module:
            return nn.Linear(8, 3)

    monkeypatch.setattr(torch.export, "load", lambda _: Program())
    with pytest.raises(RuntimeError, match=r"the exported program differs from the trained one in \d+ of 12 logits"):
        model.export_and_check(nn.Linear(8, 3), torch.randn(4, 8), tmp_path / "program.pt2")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "0"], "--epochs: expected a whole number of at least 1, got '0'"),
        (["--hidden", "wide"], "--hidden: expected a whole number of at least 1, got 'wide'"),
        (["--hidden", "9000000"], "--hidden: expected a width whose weights fit into memory, got 9000000"),
        (["--seed", "-1"], "--seed"),
        (["--seed", str(2**32)], "--seed: expected a whole number from 0 to 2**32 - 1"),
        (["--device", "nowhere"], "cannot compute on 'nowhere' here"),
        (["--device", "meta"], "cannot compute on 'meta' here"),
        (["--plot", "no/such/folder/demo.png"], "--plot: expected the path of a file in an existing folder"),
        (["--export", "."], "--export: expected the path of a file in an existing folder"),
        (["--json", "."], "--json: expected the path of a file in an existing folder"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_bad_flag(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        command.main(flags)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "train", interrupt)
    with pytest.raises(SystemExit) as error:
        command.main(["--hidden", "8"])
    assert error.value.code == 130
    assert capsys.readouterr().err.strip() == "demo: interrupted"


def test_the_timed_qlinear_does_not_warn(recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "ROUNDS", 1)
    monkeypatch.setattr(costs, "BLOCK_SECONDS", 0.0)
    monkeypatch.setattr(linear, "_warned_of_packing", False)
    twin = model.build_model(64, 512, binary=False).eval()
    binary = model.build_model(64, 512).eval()  # large enough to be warned of
    costs.measure(twin, binary, pack(binary), pack(binary, fuse=True), torch.randn(256, 64))
    assert not [warning for warning in recwarn if "packs its weights" in str(warning.message)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device")
def test_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--device", "cuda"])
    assert "cannot compute on 'cuda' here" in capsys.readouterr().err


def test_help_documents_each_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        command.main(["--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{flag} " in text for flag in ("epochs", "hidden", "seed", "device", "plot", "export", "json"))


@pytest.mark.parametrize(
    ("module", "package"),
    [
        ("tabulate", "tabulate"),
        ("matplotlib", "matplotlib"),
        ("sklearn.datasets", "scikit-learn"),
        ("tqdm", "tqdm"),
    ],
)
def test_missing_package(module: str, package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as error:
        command.main(["--plot", str(tmp_path / "demo.png")])
    assert str(error.value).startswith(f"The demo needs {package} (")
    assert str(error.value).endswith("pip install 'bitorch_qlinear[demo]'")


def test_processor_without_cpuinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise OSError

    monkeypatch.setattr(Path, "read_text", refuse)
    assert costs.processor_name()
