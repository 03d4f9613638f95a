"""Each example runs, learns what it claims on a small scale, and its packed model computes the same."""

import re

import pytest

from examples import adapter, mixer, serving, transformer


def percent(pattern, output):
    return float(re.search(pattern + r".*? ([\d.]+)%", output)[1])


@pytest.mark.parametrize(
    "program, arguments",
    [
        (mixer, ["--channels", "64", "--blocks", "2", "--epochs", "4"]),
        (transformer, ["--width", "64", "--blocks", "1", "--epochs", "4"]),
    ],
)
def test_networks(program, arguments, capsys):
    program.main(arguments)
    output = capsys.readouterr().out
    assert "The packed model's logits are identical for all test images." in output
    assert percent("binary: test accuracy", output) > 60
    assert re.search(r"packed: [\d.]+ × float32 at batch 450 \(kernel \w+\)", output)


def test_adapter(capsys):
    adapter.main(["--hidden", "64", "--epochs", "4", "--rank", "16"])
    output = capsys.readouterr().out
    assert "The packed words are unchanged." in output
    before, after = percent("of the digits,", output), percent("with an adapter", output)
    assert after > before + 10


def test_serving(capsys):
    serving.main(["--hidden", "64", "--layers", "2", "--requests", "50", "--workers", "3"])
    output = capsys.readouterr().out
    assert "The served outputs are identical" in output
    assert len(re.findall(r"p50 \d+ µs, p95 \d+ µs, p99 \d+ µs", output)) == 2
