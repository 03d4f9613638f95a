"""The CPU benchmarks make the right tables from given figures, and each runs to its end with tiny sizes."""

import json
import math
import platform
import runpy
import subprocess
import sys

import pytest
import torch

from benchmarks import check, cpu, measuring, memory, models, models_process, peers, plots, tables, targets, train
from benchmarks.measuring import Shape
from bitorch_qlinear import _kernels

TINY = Shape(3, 33, 5, "tiny")
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
    return {
        "name": name,
        "m": m,
        "k": k,
        "n": n,
        "dtype": dtype,
        "threads": 1,
        "seconds_quartiles": times,
    }


RESULTS = [
    result("one", **{peers.LINEAR: 8e-3, peers.QLINEAR: 1e-3, peers.PACKED_LAYER: 8e-4, peers.PACKED: 5e-4}),
    result("two", m=64, **{peers.LINEAR: 2e-3, peers.QLINEAR: 1e-3, peers.PACKED: 1e-3, peers.BITORCH: 4e-3}),
]


CUBES = [
    result("tiny", m=1, k=64, n=64, **{peers.LINEAR: 8e-6, peers.PACKED_LAYER: 1e-5, peers.PACKED: 5e-6}),
    result("small", m=256, k=256, n=256, **{peers.LINEAR: 4e-4, peers.PACKED_LAYER: 4e-5, peers.PACKED: 2e-5}),
    result("large", m=512, k=512, n=512, **{peers.PACKED_LAYER: 2e-4, peers.PACKED: 1e-4}),
]


def model_result(variant, size, batch, *processes):
    """Make a result of whole models from the seconds of the float, the packed and the fused form in each process."""
    runs = [
        {name: [0.9 * value, value, 1.1 * value] for name, value in zip(models.NAMES, each, strict=True)}
        for each in processes
    ]
    return {"variant": variant, "size": size, "batch": batch, "processes": runs}


MODELS = {
    "layers": 4,
    "rounds": 2,
    "results": [
        model_result(models.HARDTANH, 1024, 1, (8.0, 4.0, 1.0), (9.0, 3.0, 2.0), (6.0, 4.0, 2.0)),
        model_result(models.HARDTANH, 4096, 16, (8.0, 4.0, 4.0)),
        model_result(models.NORM, 1024, 1, (8.0, 4.0, 4.0)),
    ],
    "memory": {"size": 1024, "batch": 32, "bytes": dict(zip(models.NAMES, (1 << 21, 1 << 21, 1 << 16), strict=True))},
    "setting": SETTING,
}


@pytest.fixture(autouse=True)
def _threads_and_kernel():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    _kernels.force_kernel(None)


def test_shapes_are_named_once_and_the_quick_ones_are_among_them():
    shapes, quick = measuring.load_shapes(), measuring.load_shapes(quick=True)
    assert len({shape.name for shape in shapes}) == len(shapes) == len({shape[:3] for shape in shapes})
    assert set(quick) < set(shapes)
    assert set(train.QUICK) < set(train.STEPS) <= {shape.name for shape in shapes}


def test_interleaved_times_every_contestant():
    calls = dict.fromkeys("ab", 0)

    def count(name):
        calls[name] += 1

    times = measuring.interleaved({name: lambda name=name: count(name) for name in calls}, rounds=4)
    assert all(low <= middle <= high for low, middle, high in times.values()) and min(calls.values()) >= 4


def test_a_long_call_is_made_once_a_turn(monkeypatch):
    monkeypatch.setattr(measuring, "LONG_SECONDS", 0)
    calls = []
    measuring.interleaved({"a": lambda: calls.append(torch.get_num_threads())}, rounds=5, threads={"a": 1})
    assert calls == [1] * (3 + 5)  # torch's Timer makes three calls if it is asked for one


def test_spread_is_half_the_distance_of_the_quartiles():
    assert measuring.spread({"a": [0.9, 1.0, 1.2]}, "a") == "± 15.0%"


def test_commit_has_a_plus_if_measured_files_differ(monkeypatch):
    said = {"status": "", "rev-parse": "abc"}
    asked = []

    def git(*arguments):
        asked.append(arguments)
        return said[arguments[0]]

    monkeypatch.setattr(measuring, "git", git)
    assert measuring.commit() == "abc"
    said["status"] = " M csrc/x.cpp"
    assert measuring.commit() == "abc+"
    assert ":(top,exclude)benchmarks/results" in asked[0] and ":(top,exclude)README.md" in asked[0]


def test_setting_has_the_versions():
    where = measuring.setting()
    assert where["python"] == platform.python_version() and where["bitorch"] == "0.4.1"


@pytest.mark.parametrize("threshold", [*range(16, 40), 63, 64])
def test_bisection(threshold):
    assert cpu.bisect(16, 64, lambda size: size >= threshold) == threshold


def test_bisection_without_an_end():
    assert cpu.bisect(16, 64, lambda size: False) is None


def test_table_of_ratios_and_their_geometric_mean():
    lines = cpu.table(RESULTS, "github").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][5:] == ["QLinear, ×", "PackedQLinear, ×", "packed × packed, ×", "bitorch QLinear, ×"]
    assert cells[2][4:] == ["8,000 ± 10.0%", "8.00 ± 10.0%", "10.00 ± 10.0%", "16.00 ± 10.0%", ""]
    assert [cell.split()[0] for cell in cells[3][5:] if cell] == ["2.00", "2.00", "0.50"]
    assert cells[4][5:] == ["4.00", "10.00", f"{math.sqrt(32):.2f}", "0.50"]


def test_report_names_crossover_and_absent_peers():
    text = cpu.report(
        {
            "results": RESULTS,
            "crossover": {"1": 140, "2": 16, "64": None},
            "absent": {"float32": {}, "float16": {"bnn-lab GEMM": "no"}},
            "setting": SETTING,
        }
    )
    assert "at batch 1 PackedQLinear is faster from K = N = 140 on" in text
    assert "at batch 2 PackedQLinear is faster at all" in text
    assert "at batch 64 nn.Linear is still faster at K = N = 2048" in text
    assert "absent: bnn-lab GEMM (float16): no" in text


def test_peers_are_chosen_and_absent_by_type():
    figures = cpu.measure([TINY], ["float32", "bfloat16"], [1], 2, [peers.LINEAR, peers.INT8])
    assert [list(r["seconds_quartiles"]) for r in figures["results"]] == [[peers.LINEAR, peers.INT8], [peers.LINEAR]]
    assert figures["absent"] == {"float32": {}, "bfloat16": {peers.INT8: "does not take bfloat16"}}


def test_unknown_peer_names_the_choices(capsys):
    with pytest.raises(SystemExit):
        cpu.main(["--peers", "nobody"])
    said = capsys.readouterr().err
    assert all(name in said for name in peers.NAMES[1:])


def test_sizes_are_the_smallest_product_and_the_cubes(monkeypatch):
    monkeypatch.setattr(cpu, "LINEAR_MULTIPLY_ADDS", 512**3)
    monkeypatch.setattr(cpu, "interleaved", lambda calls, rounds: {key: [1.0] * 3 for key in calls})
    monkeypatch.setattr(cpu, "contestants", lambda shape, names: peers.Contestants(dict.fromkeys(names), {}))
    found = cpu.measure_sizes(2)
    assert [r["n"] for r in found] == [64, 256, 512, 1024, 2048, 4096] and found[0]["m"] == 1
    assert [peers.LINEAR in r["seconds_quartiles"] for r in found] == [True] * 3 + [False] * 3


def test_plots_are_pictures(tmp_path):
    results = [*RESULTS, result(dtype="float16", **{peers.LINEAR: 1.0})]
    figures = {"results": results, "sizes": CUBES, "setting": SETTING}
    cpu.draw(figures, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"cpu_ratio.png", "cpu_time.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
    assert len(plots.alike(figures)) == 2


def test_error_bars_end_at_the_quartiles():
    times = [{peers.LINEAR: [1.0, 2.0, 3.0], "a": [0.25, 0.5, 1.0]}, {peers.LINEAR: [1.0] * 3, "a": [-0.1, 0.5, 1.0]}]
    assert plots.errors(times, "a") == [[2.0, 1.0], [4.0, 0.0]]


@pytest.mark.parametrize(
    ("measured", "least", "goal", "said"),
    [
        (3.0, 4, 5, "missed"),
        (4.0, 4, 5, "pass"),
        (5.0, 4, 5, "goal met"),
        (4.0, 4, None, "pass"),
        (1.0, 0, 9, "shown"),
    ],
)
def test_verdict(measured, least, goal, said):
    figure = {"work": "w", "measured": measured, "least": least, "goal": goal, "why": ""}
    assert targets.verdict(figure) == said and said in targets.table([figure])


def test_target_whose_peer_is_absent():
    figure = {"work": "w", "measured": None, "least": 1, "goal": 2, "why": "no bnn"}
    assert "not measured: no bnn" in targets.table([figure])


@pytest.mark.slow
def test_every_target_is_measured_at_a_tiny_size(monkeypatch):
    shapes = [Shape(min(s.m, 3), min(s.k, 40), min(s.n, 24), s.name) for s in measuring.load_shapes()]
    monkeypatch.setattr(targets, "load_shapes", lambda quick=False: shapes)
    monkeypatch.setattr(targets, "named", lambda names: [shape for shape in shapes if shape.name in names])
    monkeypatch.setattr(cpu, "measure_sizes", lambda rounds: CUBES)
    monkeypatch.setattr(targets, "SWEEP_BYTES", 64)
    monkeypatch.setattr(targets, "TARGETS", [t for t in targets.TARGETS if "torch.sum" not in t.work])
    monkeypatch.setitem(sys.modules, "bnn", None)  # absent, as on most machines
    figures = targets.measure(targets.measure_runs(rounds=2))
    absent = [figure["work"] for figure in figures if figure["why"] not in ("", "one processor")]
    assert absent == ["PackedQLinear against bnn-lab's product, 512 × 4096 → 4096"]
    assert all(figure["why"] or (figure["measured"] and figure["seconds_quartiles"]) for figure in figures)


def test_two_threads_are_judged_by_the_shape_that_gains_the_least():
    times = {"a": {1: [2.0] * 3, 2: [1.0] * 3}, "b": {1: [9.0] * 3, 2: [10.0] * 3}}
    measured = targets.two_threads()(targets.Runs({}, {}, [], times, {}, 2))
    assert measured.value == 0.9 and set(measured.seconds_quartiles) == {"b, 1", "b, 2"}


def test_flatness_leaves_the_smallest_product_out():
    runs = targets.Runs({}, {}, CUBES, {}, {}, 2)
    assert targets.flatness(runs).value == pytest.approx((256**3 / 2e-5) / (512**3 / 1e-4))


def test_contestants_agree_on_the_shape():
    made = peers.contestants(TINY)
    for name in (peers.LINEAR, peers.QLINEAR, peers.PACKED_LAYER, peers.PACKED, peers.BITORCH):
        assert made.calls[name]().shape == (3, 5)
    for name in (peers.PACKED_LAYER, peers.PACKED):
        assert torch.equal(made.calls[peers.QLINEAR](), made.calls[name]())
    assert set(made.calls) | set(made.absent) == set(peers.NAMES)


def test_comparison_with_the_committed_figures():
    slower = [result("one", **{peers.LINEAR: 8e-3, peers.QLINEAR: 2e-3, peers.PACKED_LAYER: 8e-4}), RESULTS[1]]
    rows = check.compare(RESULTS, slower)
    assert [name for name, *_ in rows] == ["QLinear, one", "PackedQLinear, one", "QLinear, two"]
    assert check.fallen(rows) == ["QLinear, one"] and check.fallen(check.compare(RESULTS, RESULTS)) == []


LOST = "QLinear, one, QLinear, two, QLinear, training step, one, QLinear, training step, two, fused model of 1024 wide"


@pytest.mark.parametrize(
    ("speed", "kernels", "lost"),
    [
        (0.8, ("k", "k", "k"), None),
        (0.6, ("k", "k", "k"), f"{LOST} layers, BatchNorm, Hardtanh, batch 1"),
        (0.6, ("k", "k", "other"), LOST.partition(", fused")[0] + "$"),
        (0.6, ("other", "other", "k"), "fused model of 1024 wide"),
        (0.6, ("other", "other", "other"), None),
    ],
)
def test_check_judges_only_on_the_processor_of_each_file(monkeypatch, capsys, speed, kernels, lost):
    steps = [{name: value for name, value in each.items() if name not in ("dtype", "threads")} for each in RESULTS]
    files = {
        name: {"results": results, "setting": SETTING | {"kernel": kernel}}
        for (name, results), kernel in zip(
            {"cpu": RESULTS, "train": steps, "models": MODELS["results"]}.items(), kernels, strict=True
        )
    }

    def slower(times, name):
        return times | {name: [value / speed for value in times[name]]}

    def slower_layers(results):
        return [each | {"seconds_quartiles": slower(each["seconds_quartiles"], peers.QLINEAR)} for each in results]

    fused = [
        each | {"processes": [slower(times, models.FUSED) for times in each["processes"]]} for each in MODELS["results"]
    ]
    monkeypatch.setattr(check, "load", files.__getitem__)
    monkeypatch.setattr(check, "again", lambda inference, training: (slower_layers(RESULTS), slower_layers(steps)))
    monkeypatch.setattr(check, "models_again", lambda committed: fused[::-1])
    monkeypatch.setattr(check, "setting", lambda: SETTING)
    if lost:
        with pytest.raises(SystemExit, match=f"30% slower than committed: {lost}"):
            check.main([])
    else:
        check.main([])
    said = capsys.readouterr().out
    assert "training step, two" in said and "packed model of 4096 wide layers, BatchNorm, Hardtanh, batch 16" in said
    assert said.count("not judged") == kernels.count("other")


def test_check_times_the_models_and_batches_of_the_figures(monkeypatch):
    asked = []
    monkeypatch.setattr(models, "measure_times", lambda cases, *_: asked.extend(cases))
    check.models_again(MODELS | {"results": [*MODELS["results"], model_result(models.HARDTANH, 1024, 256, (1.0,) * 3)]})
    assert asked == [(models.HARDTANH, 1024, [1, 256]), (models.HARDTANH, 4096, [16]), (models.NORM, 1024, [1])]


def test_check_measures_the_types_and_threads_of_the_figures():
    half = result("half", m=3, k=33, n=5, dtype="float16", **{peers.LINEAR: 1.0}) | {"threads": 2}
    step = {name: half[name] for name in ("name", "m", "k", "n")}
    forward, steps = check.again({"results": [half]}, {"results": [step], "setting": SETTING})
    assert (forward[0]["dtype"], forward[0]["threads"]) == ("float16", 2) and check.title(half, "A") == (
        "A, half, float16, 2 threads"
    )
    assert set(forward[0]["seconds_quartiles"]) == set(check.NAMES)
    assert set(steps[0]["seconds_quartiles"]) == {peers.LINEAR, peers.QLINEAR}


def test_tables_name_absent_peers_and_where_the_linear_always_wins():
    names = ["large batch", "one row", "odd sizes", "tiny", "small batch"]
    times = {peers.LINEAR: 2.0, peers.QLINEAR: 1.0, peers.PACKED_LAYER: 0.5, peers.PACKED: 1.0}
    results = [result(name, **times) for name in names]
    missing, saved = {peers.BITORCH: "no module"}, {peers.LINEAR: 1, peers.QLINEAR: 1}
    inference = {"results": results, "absent": {"float32": missing}, "crossover": {"1": None}, "setting": SETTING}
    training = {"results": [each | {"saved_bytes": saved} for each in results], "absent": missing}
    said = "not timed: bitorch QLinear (float32): no module; bitorch QLinear (training): no module"
    assert said in tables.comparison(inference, training)
    assert "nn.Linear is still faster at K = N = 2048" in tables.inference_table(inference)


def test_the_comparison_has_both_layers():
    names = ["large batch", "one row", "odd sizes", "tiny", "small batch"]
    results = [result(name, **{peers.LINEAR: 2.0, peers.QLINEAR: 1.0, peers.PACKED_LAYER: 0.5}) for name in names]
    text = tables.comparison({"results": results, "absent": {}, "setting": SETTING}, {"results": results, "absent": {}})
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    assert head[-1] == "times as fast as `nn.Linear`"
    assert [row[-1] for row in rows] == ["**4**"] * 4 + ["**2**"] * 4
    layers = ["`PackedQLinear`, inference"] * 4 + ["`QLinear`, inference"] * 2 + ["`QLinear`, training step"] * 2
    assert [row[0] for row in rows] == layers


def test_the_text_about_the_smallest_cube_has_its_times():
    said = tables.smallest_cube({"sizes": CUBES})
    assert "256 × 256 → 256 takes 20.0 µs" in said and "take 12.5 µs" in said
    assert "1 × 64 → 64, with hardly any arithmetic, takes 5.0 µs" in said
    assert "up to 256 × 256 → 256" in tables.flatness({"sizes": CUBES})


def test_the_text_about_the_training_run_has_its_accuracy():
    runs = {
        peers.QLINEAR: {"seconds": 10.0, "epochs": 3, "test_accuracy": 0.98},
        peers.BITORCH: {"absent": "no module"},
    }
    figures = {"run": {"hidden": 8, "wanted_accuracy": 0.97, "runs": runs}, "setting": SETTING}
    said = tables.training_run(figures)
    assert "98.00%" in said and "absent: no module" in said and "Not measured yet" in tables.training_run(None)


def cells_of(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")][2:]


def test_whole_models_have_the_medians_of_all_processes():
    first, second, third = cells_of(models.table(MODELS, "pipe"))
    # The ratios of fused to packed are 4, 1.5 and 2.
    assert first[1:] == ["1", "8,000,000", "2", "4.5", "2.00", "1.50 to 4.00", "2", "pass"]
    assert second[5:] == third[5:] == ["1.00", "1.00 to 1.00", "", ""]


def test_avx2_must_reach_a_share_of_the_bounds_of_whole_models():
    faster, slower = (
        MODELS | {"setting": SETTING | {"kernel": kernel}, "results": [model_result(models.HARDTANH, 1024, 1, each)]}
        for kernel, each in (("avx2", (8.0, 1.91, 1.0)), ("k", (8.0, 1.91, 1.0)))
    )
    assert cells_of(models.table(faster, "pipe"))[0][-2:] == ["1.9", "pass"]
    assert cells_of(models.table(slower, "pipe"))[0][-2:] == ["2", "missed"]


def test_the_summary_of_whole_models_has_one_row_and_many():
    (row,) = cells_of(tables.models_summary(MODELS))
    assert row == ["4 × 1024", "1", "8e+03 ms", "4e+03 ms", "2e+03 ms", "**4.5**"]
    assert "2.0 MiB" not in models.memory_text(MODELS) and "0.1 MiB fused: 1/32.0 of packed" in models.memory_text(
        MODELS
    )


def test_tables_of_whole_models_say_what_was_not_measured():
    assert "Not measured yet" in tables.models_table(None) and "Not measured yet" in tables.models_summary(None)
    assert "has no AVX2" in tables.models_avx2_table(None)


def test_the_memory_between_fused_layers_is_that_of_words():
    found = models.measure_memory(size=256, batch=512)["bytes"]
    floats, words = 512 * 256 * 4, 512 * 256 // 8
    assert 2 * floats <= found[models.FLOAT] <= 2.1 * floats and 2 * floats <= found[models.PACKED] <= 2.1 * floats
    assert 2 * words <= found[models.FUSED] <= 2.2 * words


@pytest.mark.parametrize("variant", models_process.VARIANTS)
def test_all_layers_of_the_whole_models_are_fused(variant):
    torch.manual_seed(0)
    model, x = models_process.make(variant, 96, binary=True), torch.randn(3, 96)
    assert torch.equal(models_process.fuse(model, models.pack(model), x)(x), model(x))


def test_whole_models_that_are_not_fused_are_an_error():
    model = models_process.make(models.HARDTANH, 32, binary=True)
    model[2] = torch.nn.Tanh()
    with pytest.raises(RuntimeError, match="expected words between all layers"):
        models_process.fuse(model, models.pack(model), torch.randn(2, 32))


@pytest.mark.slow
def test_models_from_end_to_end(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(models, "QUICK", [(models.NORM, 64, [1, 2])])
    monkeypatch.setattr(models, "MEMORY", {"size": 64, "batch": 32})
    options = ["--quick", "--processes", "2", "--rounds", "2", "--kernel", "scalar"]
    models.main([*options, "--json", str(tmp_path / "models.json")])
    figures = json.loads((tmp_path / "models.json").read_text())
    assert [(each["batch"], len(each["processes"])) for each in figures["results"]] == [(1, 2), (2, 2)]
    said = capsys.readouterr().out
    assert "4 × 64, BatchNorm" in said and "2 processes of 2 turns each" in said and "kernel scalar" in said


def test_make_benchmark_writes_figures_of_one_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "setting", lambda: SETTING)
    monkeypatch.setattr(tables.cpu, "measure", lambda *_: {"results": RESULTS, "absent": {"float32": {}}})
    monkeypatch.setattr(tables.cpu, "measure_sizes", lambda rounds: CUBES)
    monkeypatch.setattr(tables.cpu, "crossovers", lambda: {"1": 16})
    saved = dict.fromkeys(train.NAMES, 1)
    steps = [RESULTS[1] | {"saved_bytes": saved}]
    monkeypatch.setattr(tables.train, "measure", lambda *_: {"results": steps, "absent": {}})
    monkeypatch.setattr(tables.memory, "measure", lambda **sizes: {**sizes, "layers": 1, "bytes": {}})
    monkeypatch.setattr(tables.targets, "collect", lambda *_: None)
    monkeypatch.setattr(tables.targets, "measure_runs", lambda rounds: None)
    monkeypatch.setattr(tables.targets, "measure", lambda *_: [])
    monkeypatch.setattr(tables.models, "measure", lambda *_: dict(MODELS))
    tables.measure()
    written = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(written) >= {"cpu", "train", "memory", "targets", "models"}
    assert {figures["setting"]["commit"] for figures in written.values()} == {"c"}


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
    assert {path.name for path in tmp_path.iterdir()} == {"cpu.json", "cpu_ratio.png"}
    assert "geometric mean" in capsys.readouterr().out


def test_train_from_end_to_end(monkeypatch, capsys, tmp_path):
    run(monkeypatch, "benchmarks", "train", "--only", "64 cubed", "--rounds", 2, "--json", tmp_path / "train.json")
    (found,) = json.loads((tmp_path / "train.json").read_text())["results"]
    assert set(found["saved_bytes"]) == set(train.NAMES) and "kB saved" in capsys.readouterr().out


def test_train_run_from_end_to_end(monkeypatch, capsys, tmp_path):
    options = ["--run", "--hidden", 8, "--accuracy", 0.01]
    run(monkeypatch, "benchmarks", "train", *options, "--json", tmp_path / "run.json")
    runs = json.loads((tmp_path / "run.json").read_text())["run"]["runs"]
    assert {each["epochs"] for each in runs.values()} == {1} and "8 wide" in capsys.readouterr().out


@pytest.mark.slow
def test_memory_from_end_to_end(capsys, tmp_path):
    large = bytearray(b"1") * (256 << 20)  # the peak of this process must not count for its children
    memory.main(["--size", "256", "--layers", "2", "--batch", "2", "--json", str(tmp_path / "memory.json")])
    del large
    measured = json.loads((tmp_path / "memory.json").read_text())["bytes"]
    assert all(each["computed"] > 0 for each in measured.values())
    assert measured["PackedQLinear"]["resident"] < measured["float32 nn.Linear"]["resident"] / 8
    assert "peak after making" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "option", "said"),
    [
        (cpu, ["--threads", "0"], "--threads: expected a whole number of at least 1, got '0'"),
        (cpu, ["--rounds", "1"], "--rounds: expected a whole number of at least 2, got '1'"),
        (train, ["--threads", "0"], "--threads: expected a whole number of at least 1, got '0'"),
        (train, ["--hidden", "wide"], "--hidden: expected a whole number of at least 1, got 'wide'"),
        (memory, ["--layers", "-1"], "--layers: expected a whole number of at least 1, got '-1'"),
        (targets, ["--rounds", "0"], "--rounds: expected a whole number of at least 2, got '0'"),
    ],
)
def test_a_wrong_number_gives_a_clear_error(module, option, said, capsys):
    with pytest.raises(SystemExit) as error:
        module.main(option)
    assert error.value.code == 2 and said in capsys.readouterr().err


def test_commands_are_listed(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "benchmarks")
    listed = capsys.readouterr().out
    assert end.value.code == 2 and all(name in listed for name in ("cpu", "train", "memory", "targets", "tables"))


def test_pages_are_made_of_the_committed_figures():
    contents = tables.blocks()
    for page in tables.PAGES:
        assert tables.fill(page.read_text(), contents) == page.read_text(), f"run python -m benchmarks tables: {page}"


def test_every_table_is_on_a_page():
    text = "".join(page.read_text() for page in tables.PAGES)
    assert all(f"<!-- {name}: written by" in text for name in tables.blocks())


def test_accuracy_of_the_demo_is_the_mean_over_its_seeds():
    figures = {"test_accuracy_by_seed": {"binary": [0.9, 0.98, 0.97], "float32": [0.99, 0.97, 0.98]}}
    cells = [[cell.strip() for cell in row.split("|")[2:-1]] for row in tables.demo_accuracy(figures).splitlines()]
    assert cells[2:4] == [["98.00%", "97.00%", "99.00%"], ["95.00%", "90.00%", "98.00%"]]
    assert "3 splits" in tables.demo_accuracy(figures) and "Not measured" in tables.demo_accuracy(None)


def test_outputs_of_examples_lack_only_the_table_of_explain():
    printed = "layer  kind  weights  binarize()\n1\n\nlayer  computed by  pack()\n2\n\nfloat32: 98.0%\n"
    figures = {"outputs": {"mixer": printed}, "setting": SETTING}
    shown = "```text\nlayer  kind  weights  binarize()\n1\n\nfloat32: 98.0%\n```"
    assert tables.example_output(figures, "mixer") == shown
    assert "P, capability C" in tables.examples_setting(figures)
    assert tables.example_output(None, "mixer") == tables.examples_setting(None) == tables.EXAMPLES_MISSING


def test_examples_are_run_and_kept_as_they_print(monkeypatch, tmp_path):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 0, stdout=f"output of {command[-1]}\n")

    monkeypatch.setattr(tables.subprocess, "run", run)
    monkeypatch.setattr(tables, "setting", lambda: SETTING)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    tables.run_examples()
    figures = tables.load("examples")
    assert figures["setting"] == SETTING and list(figures["outputs"]) == list(tables.EXAMPLES)
    assert tables.example_output(figures, "serving") == "```text\noutput of examples.serving\n```"


def test_tables_are_filled_in_between_their_markers():
    page = "a\n<!-- x: written by y -->\nold\n<!-- /x -->\nb <!-- z: checked by t -->\n"
    filled = tables.fill(page, {"x": "new"})
    marker = "<!-- x: written by `python -m benchmarks tables` -->"
    assert filled == f"a\n{marker}\n\nnew\n\n<!-- /x -->\nb <!-- z: checked by t -->\n"
    assert tables.fill(filled, {"x": "new"}) == filled


@pytest.mark.parametrize(
    ("page", "said"),
    [
        ("<!-- other: written by y -->\n<!-- /other -->", "there is no table 'other'"),
        ("<!-- x: written by y -->\n", "<!-- /x --> is missing"),
    ],
)
def test_an_unknown_or_open_table_is_an_error(page, said):
    with pytest.raises(ValueError, match=said):
        tables.fill(page, {"x": "new"})


def test_the_import_s_time_is_that_of_both_imports():
    """A statement that looks unused is easily removed, and then nothing is imported."""
    command = [
        sys.executable,
        "-c",
        "import runpy, sys; runpy.run_module('benchmarks.import_process'); print(*sys.modules)",
    ]
    seconds, modules = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=tables.ROOT
    ).stdout.splitlines()
    assert all(float(each) > 0 for each in seconds.split())
    assert {"torch", "bitorch_qlinear"} <= set(modules.split())
