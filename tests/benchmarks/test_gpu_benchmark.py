"""Everything around the GPU benchmark that needs no GPU: tables, targets, files, the runner, sanitizers' verdicts."""

import contextlib
import json
import re
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from benchmarks.gpu import contestants, correctness, measurements, plot, rates, shapes, tables, targets
from benchmarks.measuring import Shape
from bitorch_qlinear import _kernels, _library, kernels
from tools import gpu_first, gpu_run, sanitize

CPU = torch.device("cpu")
SMALL = [Shape(m=3, k=45, n=16), Shape(m=17, k=64, n=16)]


def made_up_timer(calls, flush):
    """Run two of the calls and return made-up quartiles around 3 µs, or one time per call without a flush."""
    for call in calls[:2]:
        call()
    return [1e-6, 3e-6, 5e-6] if flush else [2e-6 / len(calls)]


def measured(shapes, **more):
    return measurements.measure(shapes, 32, CPU, made_up_timer, cache_bytes=1000, setting={"device": "made up"}, **more)


def figures_with(products, packing=None, training=None):
    rows = [
        {**shape.fields(), "contestant": name, "mode": mode, "seconds_quartiles": [s, s, s], "tops": 1.0, "gb_s": 1.0}
        for shape, name, mode, s in products
    ]
    return measurements.Results({}, rows, packing or {}, training or {}, {}, {}, {}, [])


FAST = figures_with(
    [
        (shapes.LARGE, contestants.BF16, measurements.COLD, 10.0),
        (shapes.LARGE, contestants.PACKED, measurements.COLD, 1.0),
        (shapes.LARGE, contestants.LAYER, measurements.COLD, 2.0),
        (shapes.LARGE, f"{contestants.PACKED}, mma_sm80", measurements.COLD, 2.5),
        (shapes.MEDIUM, contestants.PACKED, measurements.COLD, 1.0),
        (shapes.MEDIUM, f"{contestants.PACKED}, mma_sm80", measurements.COLD, 1.6),
        (shapes.MEDIUM, contestants.INT8, measurements.COLD, 3.0),
        (shapes.MEDIUM, contestants.PACKED_INT, measurements.COLD, 1.0),
        (shapes.ROW, contestants.FP16, measurements.CHAIN, 50e-6),
        (shapes.ROW, contestants.LAYER, measurements.CHAIN, 5e-6),
        (shapes.ROWS, contestants.FP16, measurements.CHAIN, 30e-6),
        (shapes.ROWS, contestants.LAYER, measurements.CHAIN, 6e-6),
        (shapes.NARROW, contestants.BF16, measurements.WARM, 3.0),
        (shapes.NARROW, contestants.LAYER, measurements.WARM, 2.0),
        (Shape(4, 4096, 4096), contestants.LAYER, measurements.CHAIN, 3.3e-6),
    ],
    packing={
        "copy": {"gb_s": 1000.0, "seconds_quartiles": [1.0] * 3},
        "pack_bits": {"gb_s": 850.0, "seconds_quartiles": [1.0] * 3},
    },
    training={
        "nn.Linear": {"seconds_quartiles": [1.2] * 3, "saved": {"activations": 700, "weights": 0}},
        "QLinear, threshold 1": {"seconds_quartiles": [1.0] * 3, "saved": {"activations": 100, "weights": 0}},
    },
)


def test_targets():
    """Those of the issue come first, then a latency for each product of few rows."""
    found = {target.what: target for target in targets.targets(FAST)}
    assert len(found) == 6 + len(shapes.FEW) + 5
    measured = {what: (target.measured, target.verdict) for what, target in found.items() if target.measured}
    assert measured == {
        "8192³, packed × packed, against bf16": (10, "goal met"),
        "8192³, x bf16, against bf16": (5, "pass"),
        "4096³, packed × packed, against mma_sm80": (1.6, "missed"),
        "4096³, int32 out, against _int_mm": (3, "pass"),
        "1 × 8192 → 8192, x bf16, in a graph of layers, against fp16": (pytest.approx(10), "pass"),
        "256 × 1024 → 1024, x bf16, in a graph, against bf16": (1.5, "goal met"),
        "4 × 4096 → 4096, x bf16, in a graph of layers": (pytest.approx(3.3), "missed"),
        "1 × 8192 → 8192, x bf16, in a graph of layers": (pytest.approx(5), "pass"),
        "16 × 8192 → 8192, x bf16, in a graph of layers": (pytest.approx(6), "missed"),
        "16 × 8192 → 8192, x bf16, in a graph of layers, against fp16": (pytest.approx(5), "pass"),
        "8192³, packed × packed, mma_sm80, against bf16": (4, "pass"),
        "packing bf16 8192², against a copy": (0.85, "pass"),
        "training step 8192³ bf16, against nn.Linear": (1.2, "pass"),
        "activations saved for it": (1 / 7, "pass"),
    }
    bounds = [(target.wanted, target.goal) for target in found.values()]
    assert bounds[:2] == [("≥ 7 ×", "≥ 10 ×"), ("≥ 4.5 ×", "≥ 7 ×")]
    assert bounds[6:16] == [("≤ 5.3 µs", "")] * 5 + [("≤ 3.2 µs", "")] * 5
    for target in targets.targets(figures_with([])):
        assert (target.measured, target.verdict) == (None, "not measured")


def test_everything_is_measured_with_a_made_up_timer():
    figures = measured(SMALL)
    assert set(figures.compared) == {str(shape) for shape in SMALL}
    names = {row["contestant"] for row in figures.products}
    assert {
        contestants.BF16,
        contestants.FP16,
        contestants.PACKED,
        contestants.PACKED_INT,
        contestants.PACKING,
        contestants.LAYER,
    } <= names
    assert {row["mode"] for row in figures.products} == {measurements.COLD, measurements.WARM}
    assert targets.median(figures, SMALL[0], contestants.PACKED, measurements.COLD) == 3e-6
    (row,) = (
        row
        for row in figures.products
        if (row["m"], row["contestant"], row["mode"]) == (3, contestants.PACKED, measurements.COLD)
    )
    assert row["tops"] == pytest.approx(2 * 3 * 16 * 45 / 3e-6 / 1e12)
    assert row["gb_s"] == pytest.approx(((3 + 16) * 8 + 2 * 3 * 16) / 3e-6 / 1e9)
    # For 32 x 32 inputs, nn.Linear keeps 16 bits per value, and QLinear a bit per sign and, with a threshold, another
    # one for the range; it also keeps the signs of the weights.
    saved = {name: layer["saved"] for name, layer in figures.training.items()}
    assert saved["nn.Linear"] == {"activations": 2 * 32 * 32, "weights": 0}
    assert saved["QLinear"] == {"activations": 32 * 4, "weights": 32 * 4}
    assert saved["QLinear, threshold 1"] == {"activations": 2 * 32 * 4, "weights": 32 * 4}
    assert set(figures.packing) == {"rows", "k", "copy", "pack_bits"}
    assert figures.failed == {} and figures.skipped == []


def test_packing_is_timed_in_graphs_of_several_calls():
    """A graph of one call would measure its own start, too, and the writes that a flush has left over."""
    lengths = []

    def timer(calls, flush):
        lengths.append((len(calls), flush))
        return made_up_timer(calls, flush)

    measurements.measure_packing(8, 64, CPU, timer)
    assert lengths == [(8, False)] * 2


def test_a_chain_has_weights_beyond_the_cache(monkeypatch):
    shape, lengths = Shape(1, 64, 64), []
    monkeypatch.setattr(measurements, "FEW", [shape])

    def timer(calls, flush):
        lengths.append(len(set(map(id, calls))))
        return made_up_timer(calls, flush)

    contestant = next(c for c in contestants.ours(shape, CPU) if c.name == contestants.PACKED)
    found = measurements.modes(shape, contestant, contestant.make(), timer, cache_bytes=4 * contestant.weight_bytes)
    assert list(found) == [measurements.COLD, measurements.WARM, measurements.CHAIN]
    assert lengths == [1, 1, 12]


def test_absent_peers_are_named(monkeypatch):
    def missing(*args, **kwargs):
        raise RuntimeError("not here\nnor elsewhere")

    monkeypatch.setattr(torch, "_scaled_mm", missing)
    monkeypatch.setattr(torch, "_int_mm", missing)
    monkeypatch.setitem(sys.modules, "bitorch.layers", None)
    figures = measured(SMALL[:1])
    assert figures.absent[contestants.FP8] == figures.absent[contestants.INT8] == f"not here ({SMALL[0]})"
    assert contestants.BITORCH in figures.absent
    assert f"absent: {contestants.FP8}: not here" in tables.report(figures)
    assert "torch._int_mm" not in figures.compared[str(SMALL[0])]


@pytest.mark.parametrize("ours", [False, True])
def test_calls_that_cannot_be_captured_are_absent_or_failed_and_the_rest_is_measured(ours):
    def timer(calls, flush):
        for call in calls[:2]:
            if call.__qualname__.startswith("ours") is ours:
                raise RuntimeError("operation not permitted when stream is capturing")
        return made_up_timer(calls, flush)

    figures = figures_with([])
    measurements.measure_shape(SMALL[0], CPU, timer, 1000, figures)
    measured_names = {row["contestant"] for row in figures.products}
    binary = {contestants.PACKED, contestants.PACKED_INT, contestants.PACKING, contestants.LAYER}
    if ours:
        assert set(figures.failed) == {f"{SMALL[0]}, {name}" for name in binary}
        assert {contestants.BF16, contestants.FP16} <= measured_names and not binary & measured_names
        assert f"failed: {SMALL[0]}, {contestants.PACKED}: operation not permitted" in tables.report(figures)
    else:
        assert (
            {contestants.BF16, contestants.FP16} <= set(figures.absent)
            and measured_names == binary
            and not figures.failed
        )


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    monkeypatch.setattr(contestants.F, "linear", lambda x, *args, **kwargs: torch.zeros(len(x), 16, dtype=torch.int32))
    figures = measured(SMALL)
    assert figures.products == [] and set(figures.failed) == {str(shape) for shape in SMALL}
    assert "packing inside and the chosen kernel differ, first at" in figures.failed[str(SMALL[0])]


def test_figures_measured_before_an_interrupt_are_kept(tmp_path, monkeypatch):
    check, kept = measurements.check, []

    def interrupted(shape, device):
        if shape == SMALL[1]:
            raise KeyboardInterrupt
        return check(shape, device)

    monkeypatch.setattr(measurements, "check", interrupted)
    last = Shape(m=5, k=64, n=16)

    def keep(figures):
        tables.write(tmp_path, figures)
        kept.append(json.loads((tmp_path / "gpu.json").read_text()))

    figures = measured([*SMALL, last], keep=keep)
    assert figures.failed == {str(SMALL[1]): "interrupted"} and figures.skipped == [str(last)]
    assert {row["m"] for row in figures.products} == {SMALL[0].m}
    # The figures are kept after packing, after training and after each product.
    assert [(len(each["packing"]), len(each["training"]), len(each["compared"])) for each in kept] == [
        *((4, 0, 0), (4, 3, 0), (4, 3, 1), (4, 3, 1)),
    ]


def test_measurements_without_time_are_reported():
    figures = measured(SMALL, seconds=-1.0)
    assert figures.skipped == ["packing", "training", *map(str, SMALL)] and not figures.products
    assert f"lack of time: packing, training, {SMALL[0]}" in tables.report(figures)


def test_files(tmp_path):
    figures = measured([*SMALL, SMALL[0]._replace(m=2)])
    tables.write(tmp_path / "new", figures)
    plot.plot(tmp_path / "new" / "gpu.png", figures)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"gpu.json", "gpu.md", "gpu.png"}
    read = json.loads((tmp_path / "new" / "gpu.json").read_text())
    assert read["products"] == figures.products and len(read["targets"]) == len(targets.targets(FAST))
    text = (tmp_path / "new" / "gpu.md").read_text()
    assert "| 3 × 45 → 16" in text and "not measured" in text and "device: made up" in text
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in tables.report(FAST).splitlines()[-21:]]
    assert lines[0] == ["8192³, packed × packed, against bf16", "≥ 7 ×", "≥ 10 ×", "10", "goal met"]
    assert lines[13] == ["4 × 4096 → 4096, x bf16, in a graph of layers", "≤ 3.2 µs", "", "3.3", "missed"]


@pytest.mark.skipif(sanitize.find_tool("nvcc") is None, reason="there is no nvcc")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would be measured")
def test_rates_are_not_measured_without_a_gpu():
    """The program that measures them compiles and loads, and each function reports that CUDA does not work."""
    shown = {}
    found = rates.measure_rates((9, 0), shown.__setitem__)
    assert found == shown and list(found) == [part.name for part in rates.PARTS]
    assert all(re.match(r"not measured: .*CUDA", text) for text in found.values()), found
    (failure,) = rates.measure_rates((8, 99)).values()
    assert re.match(r"not measured: .*(error|fatal).*sm_899", failure)


@pytest.mark.slow
def test_rates_are_kept_if_the_process_that_measures_them_fails_or_hangs():
    python = [sys.executable, "-c"]
    first = "import json, time; print(json.dumps(['one', '1 TB/s']), flush=True); "
    assert rates.rates_of_the_gpu([*python, first]) == {"one": "1 TB/s"}
    failed = rates.rates_of_the_gpu([*python, first + "raise ValueError('no')"])
    assert failed == {"one": "1 TB/s", "rates": "not measured to the end: ValueError: no"}
    stopped = rates.rates_of_the_gpu([*python, first + "time.sleep(60)"], 2)
    assert stopped == {"one": "1 TB/s", "rates": "not measured to the end: stopped after 2 s"}


def test_rates_in_words():
    warps, *_, loads = rates.PARTS
    assert rates.in_words(warps, rates.Measured(5e15, 19600)) == (
        "10,000 TOPS, 19,600 multiply-adds a clock and multiprocessor"
    )
    assert rates.in_words(loads, rates.Measured(9.3e12, 40)) == "9.3 TB/s, 40 bytes a clock and multiprocessor"


@pytest.mark.parametrize(("capability", "parts"), [((7, 5), 3), ((8, 6), 4), ((9, 0), 9), ((12, 0), 3)])
def test_rates_of_a_device_are_those_of_its_parts(capability, parts, monkeypatch):
    """Bits have instructions from 8.0 to 9.0, warpgroups and boxes belong to 9.0, and all devices load."""

    class Program:
        def __getattr__(self, name):
            def function(*arguments):
                assert all(0 <= argument.value <= 1 << 24 for argument in arguments[:-1])
                return b""

            return function

    commands = []
    monkeypatch.setattr(rates.subprocess, "run", lambda command, **more: commands.append(command))
    monkeypatch.setattr(rates.ctypes, "CDLL", lambda path: Program())
    assert len(rates.measure_rates(capability)) == parts
    assert "-arch=sm_{}{}".format(*capability) + "a" * (capability == (9, 0)) in commands[0]


def test_tables_are_markdown():
    assert tables.table([["a product", "3"], ["b", "12.5"]], ["what", "µs"]) == (
        "| what      |   µs |\n| --------- | ---: |\n| a product |    3 |\n| b         | 12.5 |"
    )


def test_the_shapes_of_the_targets_come_first():
    assert shapes.SHAPES[:4] == [shapes.LARGE, shapes.MEDIUM, shapes.ROW, shapes.NARROW]
    assert set(shapes.FEW) <= set(shapes.SHAPES[2:13]) and {shapes.ROW, shapes.ROWS} <= set(shapes.FEW)
    assert len(shapes.FEW) == 10
    assert len(shapes.SHAPES) == len(set(shapes.SHAPES)) == 3 + len(shapes.BATCHES) * len(shapes.WEIGHTS)


class Forced(contextlib.AbstractContextManager):
    """Stands for a kernel or tile that is forced, and remembers which one."""

    now: ClassVar[dict[str, str | None]] = {"kernel": None, "tile": None}

    def __init__(self, what, name):
        self.what, self.name = what, name

    def __enter__(self):
        self.before, self.now[self.what] = self.now[self.what], self.name or self.now[self.what]

    def __exit__(self, *error):
        self.now[self.what] = self.before


@pytest.fixture
def faked_kernels(monkeypatch):
    """Make the CPU look like a GPU with two kernels that have tiles, one that has none, and one that packs x."""
    names = ["popc", "mma_sm80", "wgmma_sm90a", "fused_skinny"]
    for module in (contestants, correctness):
        monkeypatch.setattr(module, "kernels", lambda device: names)
    for module in (correctness, measurements):
        monkeypatch.setattr(module, "forced", lambda name: Forced("kernel", name))
        monkeypatch.setattr(module, "forced_tile", lambda name: Forced("tile", name))


TILED = {
    *(("mma_sm80", tile) for tile in (None, "128x256", "128x128", "64x64")),
    *(("wgmma_sm90a", tile) for tile in (None, "128x192", "128x128")),
}


def test_every_tile_is_timed_from_256_rows_on(faked_kernels, monkeypatch):
    calls = []

    def timer(calls_of_graph, flush):
        calls.append((Forced.now["kernel"], Forced.now["tile"]))
        return made_up_timer(calls_of_graph, flush)

    figures = figures_with([])
    measurements.measure_shape(Shape(256, 40, 16), CPU, timer, 1000, figures)
    assert not figures.failed
    assert set(calls) == {*TILED, ("popc", None), (None, None)}
    names = {row["contestant"] for row in figures.products if row["contestant"].startswith("packed x, ")}
    tiled = {", ".join(filter(None, (contestants.PACKED, *pair))) for pair in TILED}
    assert names == {*tiled, "packed x, popc", contestants.PACKED_INT}
    compared = figures.compared["256 × 40 → 16"].split(", ")
    assert compared[:2] == ["NumPy", "packing inside"] and compared.count("128x128") == 2 and "64x64" in compared
    few = {each.tile for each in contestants.ours(Shape(255, 40, 16), CPU)}
    assert few == {None}


@pytest.mark.parametrize("pair", [("wgmma_sm90a", "128x192"), ("mma_sm80", "64x64"), ("fused_skinny", None)], ids=str)
def test_a_wrong_tile_is_not_timed(faked_kernels, monkeypatch, pair):
    function = "linear" if pair == ("fused_skinny", None) else "binary_linear"
    right = getattr(correctness.F, function)

    def wrong(*arguments, **more):
        result = right(*arguments, **more)
        return result.neg() if (Forced.now["kernel"], Forced.now["tile"]) == pair else result

    monkeypatch.setattr(correctness.F, function, wrong)
    name = ", ".join(filter(None, pair))
    with pytest.raises(RuntimeError, match=f"{name} and the chosen kernel differ"):
        correctness.check(Shape(256, 41, 16), CPU)


def test_what_all_kernels_have_wrong_differs_from_numpy(monkeypatch):
    """If the bits are packed wrongly, all products of them agree."""
    pack = correctness.F.pack_bits
    monkeypatch.setattr(correctness.F, "pack_bits", lambda x: pack(x.roll(1, 1)) if len(x) == 70 else pack(x))
    with pytest.raises(RuntimeError, match="NumPy and the chosen kernel differ"):
        correctness.check(Shape(70, 33, 65), CPU)


def test_a_forced_tile_is_put_back(monkeypatch):
    names = ["64x64"]
    monkeypatch.setattr(_kernels, "forced_cuda_tile", lambda: names[-1])
    monkeypatch.setattr(_kernels, "force_cuda_tile", names.append)
    with pytest.raises(KeyError), _kernels.forced_tile("128x128"):
        raise KeyError
    with _kernels.forced_tile(None):
        pass
    assert names == ["64x64", "128x128", "64x64"]


def test_tiles_are_those_of_the_kernels():
    folder = Path(__file__).parents[2] / "csrc" / "cuda"
    text = (folder / "heuristics.h").read_text() + (folder / "warpgroup_tiles.h").read_text()

    def numbers(name):
        return re.search(rf"\b{name}(?:\[\w+\])? = \{{?([\d, ]+)", text)[1].rstrip(", ").split(", ")

    tiles = zip(numbers("kTileRows"), numbers("kTileColumns"), strict=True)
    (rows,) = numbers("kWarpgroupRows")
    assert contestants.TILES["mma_sm80"] == [f"{m}x{n}" for m, n in tiles]
    assert contestants.TILES["wgmma_sm90a"] == [f"{rows}x{n}" for n in numbers("kWarpgroupColumns")]
    assert len(contestants.TILES) == 2


# ---- the runner ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_part_that_fails_hides_no_other(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(gpu_run, "SPARE", 0)

    def part(name, code, seconds=60.0):
        return gpu_run.Part(name, [sys.executable, "-c", code], seconds, f"{name}.txt")

    every = [
        part("first", "print('one'); raise SystemExit(3)"),
        part("slow", "import time; print('two'); time.sleep(60)", 2.0),
        part("honest", f"raise SystemExit({gpu_run.OUT_OF_TIME})"),
        part("last", "print('three')"),
    ]
    assert not gpu_run.run_all(every, tmp_path, time.time() + 60)
    *_, first, slow, honest, last = capfd.readouterr().out.splitlines()
    assert first.endswith("failed, exit code 3") and slow.endswith("stopped after 2 s")
    assert honest.endswith("out of time") and last.endswith("done")
    assert (tmp_path / "last.txt").read_text() == "three\n"
    slow = (tmp_path / "slow.txt").read_text()
    assert slow.startswith("two\n") and slow.endswith("\nstopped after 2 s\n")
    assert gpu_run.run_all(every[3:], tmp_path, time.time() + 60)
    needed = [part._replace(needed=True) for part in every[:3]]
    assert not gpu_run.run_all([needed[0], every[3]], tmp_path, time.time() + 60)
    assert capfd.readouterr().out.endswith("done\n")
    for part in needed[1:]:
        assert not gpu_run.run_all([part, every[3]], tmp_path, time.time() + 60)
        assert capfd.readouterr().out.endswith("\nthe other parts were not started\n")


@pytest.mark.slow
def test_a_kernel_that_hangs_or_fails_is_reported():
    python = [sys.executable, "-c"]
    assert gpu_first.verdict([*python, "print(1)"]) == ("ok", "1\n", False)
    hanging = gpu_first.verdict([*python, "import time; print('1 x 2 x 3', flush=True); time.sleep(60)"], 1)
    assert hanging == ("hangs: stopped after 1 s, at: 1 x 2 x 3", "1 x 2 x 3\n", True)
    assert gpu_first.verdict([*python, "import time; time.sleep(60)"], 0.5).text.endswith("at: nothing was printed")
    failed = gpu_first.verdict([*python, "print('no'); assert 0, '3 are wrong\\nthe last line'"])
    assert failed.text == "AssertionError: 3 are wrong" and failed.output.startswith("no\n") and not failed.hangs
    assert gpu_first.verdict([*python, "raise SystemExit(3)"]).text == "exit code 3"


@pytest.mark.skipif(not _library.has_cuda, reason=_library.no_cuda_reason)
@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0), (12, 0)])
def test_the_first_products_are_computed_by_their_kernel(capability):
    for kernel in _kernels.available_cuda_kernels(capability):
        for product in gpu_first.products(kernel):
            with kernels.forced(kernel):
                value_bytes = 2 * kernel.startswith("fused")
                chosen = _kernels.cuda_choice(capability, 100, *product, value_bytes)
            assert chosen.startswith((f"{kernel}:", f"{kernel} with"))


@pytest.mark.slow
def test_the_run_ends_in_time(tmp_path, capfd, monkeypatch):
    """A part is told the time that remains; a part without any time left is reported as a failure."""
    monkeypatch.setattr(gpu_run, "SPARE", 1)
    told = [sys.executable, "-c", "import sys; print(sys.argv[1:])"]
    every = [
        gpu_run.Part("told", told, 500, "told.txt", told=True),
        gpu_run.Part("slow", [sys.executable, "-c", "import time; time.sleep(60)"], 500, "slow.txt"),
        gpu_run.Part("late", told, 500, "late.txt"),
    ]
    start = time.time()
    assert not gpu_run.run_all(every, tmp_path, start + 5)
    assert time.time() - start < 20
    assert (tmp_path / "told.txt").read_text() == "['--seconds', '4']\n"
    *_, slow, late = capfd.readouterr().out.splitlines()
    assert "slow" in slow and "stopped after" in slow
    assert "late" in late and late.endswith("out of time") and not (tmp_path / "late.txt").exists()


@pytest.mark.slow
def test_a_part_that_is_stopped_may_say_how_far_it_came(tmp_path):
    code = """
import time
print("working", flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("two failed")
"""
    part = gpu_run.Part("tests", [sys.executable, "-c", code], 60, "tests.txt")
    assert gpu_run.run(part, 2, tmp_path) is None
    assert (tmp_path / "tests.txt").read_text() == "working\ntwo failed\n\nstopped after 2 s\n"


@pytest.mark.slow
def test_a_part_that_ignores_the_interrupt_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "GRACE", 1)
    code = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )
    part = gpu_run.Part("tests", [sys.executable, "-c", code], 60, "tests.txt")
    assert gpu_run.run(part, 2, tmp_path) is None
    assert (tmp_path / "tests.txt").read_text().startswith("deaf\n")


def test_a_process_that_escapes_and_holds_the_output_is_not_waited_for(tmp_path, monkeypatch):
    """A compiler's worker, for example, starts a new session and inherits the pipe."""
    monkeypatch.setattr(gpu_run, "GRACE", 1)
    code = """
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(15)"], start_new_session=True).pid)
"""
    part = gpu_run.Part("tests", [sys.executable, "-c", code], 60, "tests.txt")
    start = time.time()
    assert gpu_run.run(part, 60, tmp_path) == 0
    assert time.time() - start < 10
    assert int((tmp_path / "tests.txt").read_text())


def test_a_part_leaves_nothing_running(tmp_path):
    """If a sanitizer is killed, the program that it watches goes on using the GPU, which is timed next."""
    code = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=subprocess.DEVNULL,
                         stderr=subprocess.DEVNULL)
print(child.pid)
"""
    part = gpu_run.Part("sanitizers", [sys.executable, "-c", code], 30, "sanitizer.txt")
    assert gpu_run.run(part, 30, tmp_path) == 0
    child = int((tmp_path / "sanitizer.txt").read_text())
    for _ in range(100):
        if not running(child):
            return
        time.sleep(0.05)
    pytest.fail("the program still runs")


def running(pid):
    """Return whether the process exists and is not a zombie."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_every_part_runs_if_there_is_time(tmp_path, capfd):
    """This includes a part whose own time is as short as the time that is reserved for its last output."""
    every = [part._replace(command=["true"]) for part in gpu_run.parts(tmp_path)]
    assert gpu_run.run_all(every, tmp_path, time.time() + gpu_run.SECONDS)
    assert {path.name for path in tmp_path.iterdir()} == {part.file for part in every}
    assert all(line.endswith("done") for line in capfd.readouterr().out.splitlines()[-len(every) :])


def test_the_parts_fit_into_the_time(tmp_path):
    every = gpu_run.parts(tmp_path)
    *others, last = every
    # Of 8 minutes, 60 s remain for the build, which compiles for one GPU, and half a minute for the sanitizers.
    assert sum(part.seconds for part in others) <= gpu_run.SECONDS - 60 - 2 * gpu_run.SPARE < 8 * 60
    assert [part.name for part in others[1:]] == ["kernels", "tests", "benchmarks"] and last.told
    files = {part.file for part in every} | {"gpu.json", "gpu.md", "gpu.png"}
    assert len(files) == len(every) + 3 <= 8
    rounds = 1 + -(-len(_kernels.CUDA_KERNELS) // gpu_first.WORKERS)  # the first one finds out which kernels exist
    assert rounds * gpu_first.SECONDS <= others[1].seconds, "kernels that hang are reported in time"


# ---- sanitizers ------------------------------------------------------------------------------------

ALL_RIGHT = "right: popc\nright: skinny\nevery result is right\n"
LATE = sanitize.OUT_OF_TIME


@pytest.mark.parametrize(
    ("code", "output", "deserved", "said"),
    [
        (
            0,
            f"{ALL_RIGHT}========= ERROR SUMMARY: 0 errors\n",
            0,
            "clean: ERROR SUMMARY: 0 errors; right results: popc, ",
        ),
        (86, f"{ALL_RIGHT}========= ERROR SUMMARY: 4 errors\n", 1, "found something: ERROR SUMMARY: 4 errors"),
        (1, "AssertionError: (1, 1, 1)\n========= ERROR SUMMARY: 0 errors", 1, "a wrong result"),
        (None, "AssertionError: (1, 1, 1)\n", 1, "a wrong result: AssertionError"),
        (1, "========= Error: Device not supported\n", 0, "refused or failed by itself (exit code 1): Error: Device"),
        (1, "Traceback\nRuntimeError: CUDA error: unspecified launch failure\n", 1, "the program failed: RuntimeError"),
        (1, "Traceback\nRuntimeError: bitorch_qlinear: x: expected rows\n", 1, "the program failed: RuntimeError"),
        (1, "Traceback\nRuntimeError: operation not supported\n", 0, "refused or failed by itself (exit code 1)"),
        (0, "", 0, "refused or failed by itself (exit code 0): no output"),
        (None, "========= COMPUTE-SANITIZER\n", LATE, "out of time after 80 s; right results: none"),
        (None, "=========\nright: popc\nright: skinny\n", LATE, "out of time after 80 s; right results: popc, skinny"),
    ],
)
def test_verdicts(code, output, deserved, said):
    assert sanitize.verdict(code, output, 80.0)[0] == deserved
    assert sanitize.verdict(code, output, 80.0)[1].startswith(said)


@pytest.mark.slow
def test_tools_run_side_by_side(tmp_path, capfd):
    fake = tmp_path / "fake.py"
    fake.write_text(
        "import sys, time\n"
        "tool = sys.argv[2]\n"
        "if tool == 'synccheck': print('right: popc', flush=True), time.sleep(60)\n"
        f"print({ALL_RIGHT!r} + '=' * 9, tool.upper(), 'SUMMARY: 0 errors', 'x' * 100000)\n"
        "sys.exit(86 if tool == sys.argv[-1] else 0)\n"
    )
    assert sanitize.run_tools([sys.executable, str(fake)], ["racecheck"], 5) == 1
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith("memcheck: clean: MEMCHECK SUMMARY: 0 errors")
    assert lines[1].startswith("racecheck: found something: RACECHECK SUMMARY")
    assert lines[2] == "synccheck: out of time after 5 s; right results: popc"
    assert lines[3].startswith("initcheck: clean")
    assert (
        sanitize.run_tools([sys.executable, str(fake)], ["nothing"], 2) == sanitize.OUT_OF_TIME == gpu_run.OUT_OF_TIME
    )


@pytest.mark.parametrize("shape", [shape for shape in sanitize.selection(2) if shape[0] * shape[1] < 20000], ids=str)
def test_the_sanitized_program_computes_what_it_should(shape):
    sanitize.check_product(*shape, CPU)
