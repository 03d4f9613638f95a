"""The CPU benchmarks: what is made of given figures, and that each runs to its end at a tiny size."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import check, cpu, measuring, memory, peers, plots, readme, targets, train
from benchmarks.measuring import Shape
from bitorch_qlinear import _library

TINY = Shape("tiny", "square", 3, 33, 5)
SETTING = {
    "processor": "P",
    "cpu_capability": "C",
    "kernel": "k",
    "threads": 1,
    "torch": "t",
    "commit": "c",
    "date": "d",
}


def result(name="a", m=2, k=32, n=3, dtype="float32", **seconds):
    times = {each.replace("_", " "): [0.9 * value, value, 1.1 * value] for each, value in seconds.items()}
    return {"name": name, "m": m, "k": k, "n": n, "dtype": dtype, "threads": 1, "seconds_quartiles": times}


RESULTS = [
    result("one", **{peers.LINEAR: 8e-3, peers.QLINEAR: 1e-3, peers.PACKED: 5e-4}),
    result("two", m=64, **{peers.LINEAR: 2e-3, peers.QLINEAR: 1e-3, peers.PACKED: 1e-3, peers.BITORCH: 4e-3}),
]


@pytest.fixture(autouse=True)
def _threads_and_kernel():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    _library.force_kernel(None)


def test_shapes_are_named_once_and_the_quick_ones_are_among_them():
    shapes, quick = measuring.load_shapes(), measuring.load_shapes(quick=True)
    assert len({shape.name for shape in shapes}) == len(shapes) == len({shape[2:] for shape in shapes})
    assert set(quick) < set(shapes)
    assert {shape.group for shape in shapes} == {"square", "batch 1", "odd", "layers"}
    assert set(train.QUICK) < set(train.STEPS) <= {shape.name for shape in shapes}


def test_interleaved_times_every_contestant():
    calls = dict.fromkeys("ab", 0)

    def count(name):
        calls[name] += 1

    times = measuring.interleaved({name: lambda name=name: count(name) for name in calls}, rounds=4)
    assert all(low <= middle <= high for low, middle, high in times.values()) and min(calls.values()) >= 4


@pytest.mark.parametrize("threshold", [*range(16, 40), 63, 64])
def test_bisection(threshold):
    assert cpu.bisect(16, 64, lambda size: size >= threshold) == threshold


def test_bisection_without_an_end():
    assert cpu.bisect(16, 64, lambda size: False) is None


def test_table_of_ratios_and_their_geometric_mean():
    lines = cpu.table(RESULTS, "github").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][5:] == ["QLinear, ×", "packed × packed, ×", "bitorch QLinear, ×"]
    assert cells[2][4:] == ["8,000", "8.00", "16.00", ""] and cells[3][5:] == ["2.00", "2.00", "0.50"]
    assert cells[4][5:] == ["4.00", f"{math.sqrt(32):.2f}", "0.50"]


def test_report_names_crossover_and_absent_peers():
    text = cpu.report(
        {"results": RESULTS, "crossover": {1: 140, 64: None}, "absent": {"bnn-lab GEMM": "no"}, "setting": SETTING}
    )
    assert (
        "batch 1: from K = N = 140 on" in text and "batch 64: not up to" in text and "absent: bnn-lab GEMM: no" in text
    )


def test_plots_are_pictures(tmp_path):
    figures = {"results": [*RESULTS, result(dtype="float16", **{peers.LINEAR: 1.0})], "setting": SETTING}
    for draw in (plots.ratios, plots.times):
        draw(figures, tmp_path / "x.png")
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert len(plots.alike(figures)) == 2


@pytest.mark.parametrize(
    ("measured", "least", "goal", "said"),
    [
        (3.0, 4, 5, "missed"),
        (4.0, 4, 5, "pass"),
        (5.0, 4, 5, "goal met"),
        (4.0, 4, None, "goal met"),
        (1.0, 0, 9, "shown"),
    ],
)
def test_verdict(measured, least, goal, said):
    figure = {"work": "w", "measured": measured, "least": least, "goal": goal, "why": ""}
    assert targets.verdict(figure) == said and said in targets.table([figure])


def test_target_whose_peer_is_absent():
    figure = {"work": "w", "measured": None, "least": 1, "goal": 2, "why": "no bnn"}
    assert "not measured: no bnn" in targets.table([figure])


def test_every_target_is_measured_at_a_tiny_size(monkeypatch):
    monkeypatch.setattr(targets, "product", lambda m, k, n: Shape("", "", min(m, 3), min(k, 40), min(n, 24)))
    monkeypatch.setattr(targets, "SWEEP_BYTES", 64)
    monkeypatch.setattr(targets, "TARGETS", [t for t in targets.TARGETS if "torch.sum" not in t.work])
    monkeypatch.setitem(sys.modules, "bnn", None)  # absent, as on most machines
    figures = targets.measure(rounds=2)
    absent = [figure["work"] for figure in figures if figure["measured"] is None]
    assert absent == ["the same, × bnn-lab's GEMM"] and all(figure["measured"] or figure["why"] for figure in figures)


def test_contestants_agree_on_the_shape():
    made = peers.contestants(TINY)
    for name in (peers.LINEAR, peers.QLINEAR, peers.PACKED, peers.BITORCH):
        assert made.calls[name]().shape == (3, 5)
    assert torch.equal(made.calls[peers.QLINEAR](), made.calls[peers.PACKED]())
    assert set(made.calls) | set(made.absent) == set(peers.NAMES)


def test_comparison_with_the_committed_figures():
    slower = [result("one", **{peers.LINEAR: 8e-3, peers.QLINEAR: 2e-3}), RESULTS[1]]
    rows = check.compare(RESULTS, slower)
    assert check.fallen(rows) == ["one"] and check.fallen(check.compare(RESULTS, RESULTS)) == []


def test_saved_bytes_without_the_weights():
    linear, x = torch.nn.Linear(64, 8), torch.randn(4, 64)
    assert train.saved_bytes(linear, x) == x.nbytes


def run(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, arguments)])
    runpy.run_module(module, run_name="__main__")


def test_cpu_from_end_to_end(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cpu, "CROSSOVER_BATCHES", (1,))
    monkeypatch.setattr(cpu, "CROSSOVER_RANGE", (16, 17))
    arguments = ["cpu", "--only", "64 cubed", "--rounds", 2, "--dtype", "float32", "bfloat16", "--kernel", "scalar"]
    run(monkeypatch, "benchmarks", *arguments, "--json", tmp_path / "cpu.json", "--plots", tmp_path)
    figures = json.loads((tmp_path / "cpu.json").read_text())
    assert [r["dtype"] for r in figures["results"]] == ["float32", "bfloat16"] and figures["setting"][
        "kernel"
    ] == "scalar"
    assert {path.name for path in tmp_path.iterdir()} == {"cpu.json", "cpu_ratio.png", "cpu_time.png"}
    assert "geometric mean" in capsys.readouterr().out


def test_train_from_end_to_end(monkeypatch, capsys, tmp_path):
    options = ["--only", "64 cubed", "--rounds", 2, "--run", "--hidden", 8, "--accuracy", 0.01]
    run(monkeypatch, "benchmarks", "train", *options, "--json", tmp_path / "train.json")
    runs = json.loads((tmp_path / "train.json").read_text())["run"]["runs"]
    assert {each["epochs"] for each in runs.values()} == {1} and "kB saved" in capsys.readouterr().out


def test_memory_from_end_to_end(capsys, tmp_path):
    memory.main(["--size", "256", "--layers", "2", "--batch", "2", "--json", str(tmp_path / "memory.json")])
    measured = json.loads((tmp_path / "memory.json").read_text())["bytes"]
    assert measured["PackedQLinear"]["resident"] < measured["float32 nn.Linear"]["resident"] / 8
    assert "peak after making" in capsys.readouterr().out


def test_commands_are_listed(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "benchmarks")
    listed = capsys.readouterr().out
    assert end.value.code == 2 and all(name in listed for name in ("cpu", "train", "memory", "targets", "gpu-model"))


def test_readme_is_made_of_the_committed_figures():
    text = Path(readme.README).read_text()
    for block, content in readme.blocks().items():
        assert readme.fill(text, block, content) == text, f"run python -m benchmarks.readme: {block} differs"
