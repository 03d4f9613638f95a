"""Each example runs, learns what it claims on a small scale, and its packed model computes the same."""

import re

import pytest
import torch
from torch import nn

from bitorch_qlinear import FusedSequential, PackedQLinear
from examples import adapter, common, mixer, serving, transformer

pytestmark = pytest.mark.usefixtures("threads")

SPEEDS = r"The packed model against float32: [\d.]+ × at batch .* \(kernel \w+, 1 thread\)"


def percent(pattern: str, output: str) -> float:
    found = re.search(pattern + r".*? ([\d.]+)%", output)
    assert found, output
    return float(found[1])


@pytest.mark.parametrize(
    ("program", "arguments", "layers"),
    [
        (mixer, ["--channels", "64", "--blocks", "1", "--epochs", "3"], 2),
        (transformer, ["--width", "64", "--blocks", "1", "--epochs", "6"], 4),
    ],
)
def test_networks(program, arguments, layers, capsys):
    program.main(arguments)
    output = capsys.readouterr().out
    assert "The packed model's logits are identical for all 450 test images." in output
    assert percent("float32: test accuracy", output) > 50
    assert percent("binary: test accuracy", output) > 50
    assert re.search(SPEEDS, output)
    assert f"{layers} binary layers: {layers} packed" in output
    assert output.count("words for the next layer") == 1, "the layer in the middle hands on words"


def test_transformer_says_what_stays_real(capsys):
    transformer.main(["--width", "16", "--blocks", "1", "--epochs", "1"])
    report = capsys.readouterr().out.partition("\n\n")[0]
    assert re.search(r"embed .* first layer", report) and re.search(r"classify .* last layer", report)
    assert report.count("replaces it:") == 4


@pytest.mark.parametrize("build", [lambda: transformer.Encoder(32, 1), lambda: mixer.Mixer(32, 1, binary=False)])
def test_twins_are_real(build):
    assert not any(type(module).__name__ == "QLinear" for module in build().modules())


def test_adapter(capsys):
    adapter.main(["--hidden", "128", "--epochs", "5", "--rank", "16"])
    output = capsys.readouterr().out
    assert "identical for all 450 test images" in output
    assert "The packed words are unchanged." in output
    before, after = percent("of the digits,", output), percent("with an adapter", output)
    assert after > before + 10
    assert re.search(SPEEDS, output) and re.search(r"training step .* [\d.]+ × at batch 64", output)


def test_serving(capsys):
    serving.main(["--hidden", "64", "--layers", "2", "--requests", "50", "--workers", "2"])
    output = capsys.readouterr().out
    assert "The served outputs are identical" in output
    names = [f"{name}, {workers}" for name in ("float32", "packed") for workers in ("1 worker", "2 workers")]
    for name in [*names, "packed, 2 processes"]:
        assert re.search(rf"^{name} ( +[\d,]+){{4}}$", output, re.MULTILINE)
    assert len(re.findall(r"^packed against float32( +[\d.]+ ×){4}$", output, re.MULTILINE)) == 2


def test_served_model_is_fused_and_packed(tmp_path):
    model = serving.pack(serving.binarize(serving.build_classifier(32, 2)), fuse=True)
    torch.save(model, tmp_path / "packed.pt")
    loaded = serving.load(tmp_path / "packed.pt")
    assert type(loaded) is FusedSequential
    assert sum(isinstance(module, PackedQLinear) for module in loaded) == 2


def test_every_request_is_answered_once():
    requests = [torch.full((1, 2), float(number)) for number in range(40)]
    latencies, outputs, seconds = serving.serve(nn.Identity(), requests, workers=4)
    assert all(map(torch.equal, requests, outputs))
    assert len(latencies) == 40 and min(latencies) > 0 and seconds > 0


@pytest.mark.slow
def test_processes_answer_all_requests(tmp_path):
    torch.save(serving.pack(serving.binarize(serving.build_classifier(32, 2)), fuse=True), tmp_path / "packed.pt")
    latencies, seconds = serving.serve_from_processes(tmp_path / "packed.pt", list(torch.randn(60, 1, 256)), 2)
    assert len(latencies) == 120 and min(latencies) > 0 and seconds > 0


def test_wrong_output_of_the_served_model_is_an_error(monkeypatch):
    def load_badly(path):
        model = serving.torch.load(path, weights_only=False)
        with torch.no_grad():
            model[-1].bias += 1
        return model

    monkeypatch.setattr(serving, "load", load_badly)
    with pytest.raises(RuntimeError, match="the served model differs from the trained one in 10 of 10 logits"):
        serving.main(["--hidden", "32", "--layers", "2", "--requests", "50"])


def test_difference_of_a_packed_model_is_an_error():
    layer = nn.Linear(4, 2)
    with pytest.raises(RuntimeError, match=r"the packed model differs from the trained one in \d+ of 6 logits"):
        common.check_parity(layer, nn.Linear(4, 2), torch.randn(3, 4))


def test_frozen_modules_keep_their_statistics():
    digits = common.Digits(torch.randn(70, 4), torch.zeros(70, dtype=torch.int64), torch.randn(2, 4), torch.zeros(2))
    norms = nn.Sequential(nn.BatchNorm1d(4)), nn.Sequential(nn.BatchNorm1d(4))
    frozen = nn.Sequential(nn.Linear(4, 4), norms[0], norms[1])
    common.train(frozen, digits, 1, 1e-3, frozen=[norms[1]])
    assert norms[0][0].num_batches_tracked == 2 and norms[1][0].num_batches_tracked == 0
    assert not frozen.training


@pytest.mark.parametrize("program", [adapter, mixer, serving, transformer])
def test_threads_of_the_command_line_count(program, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(*_):
        raise Stopped

    monkeypatch.setattr(program, "load_digits" if hasattr(program, "load_digits") else "build_classifier", stop)
    for arguments, threads in ((["--threads", "2"], 2), ([], 1)):
        with pytest.raises(Stopped):
            program.main(arguments)
        assert torch.get_num_threads() == threads


@pytest.mark.parametrize("program", [adapter, mixer, serving, transformer])
def test_bad_flag(program, capsys):
    with pytest.raises(SystemExit):
        program.main(["--threads", "0"])
    assert "--threads: expected a whole number of at least 1, got '0'" in capsys.readouterr().err
