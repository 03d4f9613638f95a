"""linear_chain equals linear followed by binary_linear, and refuses what they refuse."""

import itertools
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.operators import BITS, FLOAT_ROWS, MATRIX_WORDS, VECTOR, resized, strided
from support.reference import FLOATS, assert_equal, pack_signs, random_values, random_words
from torch._subclasses.fake_tensor import FakeTensorMode

from bitorch_qlinear import functional as F


def problem(sizes, m=(3,), dtype=torch.float32, seed=0, prepared=True, strict=False, out_dtype=None):
    """Valid arguments for layers from sizes[0] to sizes[1] to sizes[2] and so on."""
    generator = torch.Generator().manual_seed(seed)
    weights = [random_words(n, k, generator, stray=True) for k, n in itertools.pairwise(sizes)]
    inner = list(itertools.pairwise(sizes))[:-1]
    return {
        "x": random_values((*m, sizes[0]), dtype, generator),
        "weights": weights,
        "k": sizes[0],
        "limits": [
            torch.randint(k // 2 - 3, k // 2 + 4, (n,), dtype=torch.int32, generator=generator) for k, n in inner
        ],
        "flips": [random_words(1, n, generator, stray=True)[0] for _, n in inner],
        "bias": torch.randn(sizes[-1], generator=generator),
        "prepared": [F.prepare_weight(w, k) for w, k in zip(weights, sizes, strict=False)] if prepared else None,
        "scale": torch.randn(sizes[-1], generator=generator),
        "out_dtype": out_dtype,
        "strict": strict,
        "toggles": None,
    }


def toggles_for(sizes, seed):
    """Some for each layer except the last; a layer may have none, and a channel several."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for k, n in list(itertools.pairwise(sizes))[:-1]:
        count = int(torch.randint(0, 5, (), generator=generator)) * (n > 0)
        channels = torch.randint(0, n, (count,), generator=generator)
        limits = torch.randint(k // 2 - 3, k // 2 + 4, (count,), generator=generator)
        made.append(torch.stack([channels, limits]).int())
    return made


def call(values):
    names = ("x", "weights", "k", "limits", "flips", "bias")
    keywords = {name: value for name, value in values.items() if name not in names}
    return F.linear_chain(*[values[name] for name in names], **keywords)


def in_steps(values):
    """What the operator replaces."""
    x, k, last = values["x"], values["k"], len(values["weights"]) - 1
    dtype = values["out_dtype"] or (x.dtype if x.is_floating_point() else torch.float32)
    for i, words in enumerate(values["weights"]):
        options = {"bias": values["bias"], "scale": values["scale"], "out_dtype": dtype}
        if i < last:
            options = {"out_limits": values["limits"][i], "out_flips": values["flips"][i]}
        inputs = x
        if i or not x.is_floating_point():
            x = F.binary_linear(x, words, k, **options)
        else:
            x = F.linear(x, words, k, strict=values["strict"], **options)
        if i < last and values["toggles"] and values["toggles"][i].numel():
            if inputs.is_floating_point():
                inputs = F.pack_bits(inputs, values["strict"])
            counts = (k - F.binary_linear(inputs, words, k, out_dtype=torch.int32)) // 2
            bits = F.unpack_bits(x, len(words), torch.bool)
            for channel, limit in values["toggles"][i].t().tolist():
                bits[..., channel] ^= counts[..., channel] <= limit
            x = F.pack_bits(torch.where(bits, 1.0, -1.0))
        k = len(words)
    return x


sizes = st.lists(st.sampled_from([1, 2, 31, 32, 33, 64, 65, 130]), min_size=2, max_size=6)


@given(
    sizes=sizes,
    m=st.lists(st.sampled_from([0, 1, 2, 5, 17]), max_size=2),
    dtype=st.sampled_from(FLOATS),
    out_dtype=st.sampled_from([None, *FLOATS]),
    flags=st.tuples(st.booleans(), st.booleans()),
    from_words=st.booleans(),
    has_toggles=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_equals_its_steps(kernel, sizes, m, dtype, out_dtype, flags, from_words, has_toggles, seed):
    values = problem(sizes, m, dtype, seed, *flags, out_dtype)
    if has_toggles:
        values["toggles"] = toggles_for(sizes, seed)
    if from_words:
        values["x"] = F.pack_bits(values["x"], values["strict"])
    assert_equal(call(values), in_steps(values))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = call({name: moved(value, mode.from_tensor) for name, value in values.items()})
    meta = call({name: moved(value, lambda tensor: tensor.to("meta")) for name, value in values.items()})
    want = in_steps(values)
    for each in (fake, meta):
        assert (each.shape, each.dtype, each.stride()) == (want.shape, want.dtype, want.stride())


def moved(value, move):
    if isinstance(value, torch.Tensor):
        return move(value)
    return [move(each) for each in value] if isinstance(value, list) else value


def test_int32_and_empty_forms():
    values = problem([70, 40, 9]) | {"bias": None, "scale": None, "out_dtype": torch.int32}
    want = in_steps(values)
    assert_equal(call(values), want)
    values["prepared"][0] = torch.empty(0, dtype=torch.uint8)
    assert_equal(call(values), want)


def test_a_chain_of_one_is_linear():
    values = problem([70, 9])
    assert_equal(call(values), F.linear(values["x"], values["weights"][0], 70, values["bias"], scale=values["scale"]))


def test_opcheck_and_flops():
    from torch.utils.flop_counter import FlopCounterMode

    values = problem([70, 40, 33, 9]) | {"toggles": toggles_for([70, 40, 33, 9], 1)}
    names = ("x", "weights", "k", "limits", "flips", "bias")
    keywords = {name: value for name, value in values.items() if name not in names}
    torch.library.opcheck(
        torch.ops.bitorch_qlinear.linear_chain.default,
        tuple(values[name] for name in names),
        keywords,
        test_utils=["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"],
    )
    with FlopCounterMode(display=False) as counted:
        call(values)
    assert counted.get_total_flops() == 2 * 3 * (70 * 40 + 40 * 33 + 33 * 9)


LIST_FAULTS = {
    "weights": MATRIX_WORDS,
    "limits": BITS | {"strided": strided},
    "flips": BITS,
    "prepared": {
        "float32": lambda p: p.float(),
        "two dimensions": lambda p: p[None],
        "three bytes": lambda p: p[:3],
        "gone": resized,
        "no header": torch.zeros_like,
    },
}
NAMED = {
    "weights": "x|x_words|weight_words",
    "limits": "out_limits",
    "flips": "out_flips",
    "prepared": "weight_prepared",
}


@pytest.mark.parametrize("place", [0, 1, -1])
@pytest.mark.parametrize("argument, what", [(a, what) for a, faults in LIST_FAULTS.items() for what in faults])
def test_wrong_tensors_in_a_list_are_refused(kernel, argument, what, place):
    values = problem([70, 40, 33, 9])
    values[argument][place] = LIST_FAULTS[argument][what](values[argument][place])
    with pytest.raises(RuntimeError, match=f"({NAMED[argument]}): (expected|its storage)"):
        call(values)


@pytest.mark.parametrize(
    "argument, what", [("x", w) for w in FLOAT_ROWS] + [(a, w) for a in ("bias", "scale") for w in VECTOR]
)
def test_wrong_tensors_are_refused(kernel, argument, what):
    values = problem([70, 40, 9])
    values[argument] = (FLOAT_ROWS if argument == "x" else VECTOR)[what](values[argument])
    with pytest.raises(RuntimeError, match=f"({argument}|{argument}_words): (expected|its storage)"):
        call(values)


TOGGLE_FAULTS = {
    "dtype": lambda t: t.long(),
    "dimensions": lambda t: t[0],
    "rows": lambda t: t.repeat(2, 1)[:3],
    "strided": lambda t: t.t().contiguous().t(),
    "gone": resized,
    "negative": lambda t: t * 0 - 1,
    "beyond": lambda t: t * 0 + 40,
}


WRITER = """
import mmap, sys
with open(sys.argv[1], "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
    channel = memoryview(memory).cast("i")
    print(flush=True)
    while True:
        channel[0] = 64
        channel[0] = 0
"""


@pytest.mark.parametrize("what", TOGGLE_FAULTS)
def test_wrong_toggles_are_refused(kernel, what):
    values = problem([70, 40, 9]) | {"toggles": [torch.tensor([[3, 39, 3], [30, 35, 40]], dtype=torch.int32)]}
    assert_equal(call(values), in_steps(values))
    values["toggles"] = [TOGGLE_FAULTS[what](values["toggles"][0])]
    with pytest.raises(RuntimeError, match=r"toggles: (expected|its storage)"):
        call(values)


@pytest.mark.parametrize("what", ["dtype", "dimensions", "rows", "strided"])
def test_wrong_toggles_are_refused_while_torch_traces(what):
    values = problem([70, 40, 9]) | {"toggles": [torch.tensor([[3, 39, 3], [30, 35, 40]], dtype=torch.int32)]}
    values["toggles"] = [TOGGLE_FAULTS[what](values["toggles"][0])]
    with pytest.raises(RuntimeError, match="toggles: expected contiguous int32"):
        call({name: moved(value, lambda tensor: tensor.to("meta")) for name, value in values.items()})


def test_channels_that_another_thread_writes_are_refused_or_right(tmp_path, threads):
    """The operator uses the channels that it has checked: one that changes meanwhile cannot lead out of a row.

    Another process writes 0 and a channel beyond the row in turn, into memory that both share.
    """
    values = problem([32, 33, 64], m=(2001,))
    memory = tmp_path / "toggles"
    memory.write_bytes(bytes(8 * 33))
    toggles = torch.from_file(str(memory), shared=True, size=66, dtype=torch.int32).view(2, 33)
    toggles.copy_(torch.stack([torch.arange(33), torch.full((33,), 32)]))
    values["toggles"] = [toggles]
    right = call(values)
    torch.set_num_threads(1)  # further threads would take the time of the process that writes
    with subprocess.Popen([sys.executable, "-c", WRITER, memory], stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        try:
            for _ in range(1000):
                try:
                    y = call(values)
                except RuntimeError as error:
                    assert "toggles: expected channels from 0 to 32, got 64" in str(error)
                else:
                    assert_equal(y, right)
        finally:
            writer.kill()


@pytest.mark.parametrize("argument", ["weights", "limits", "flips", "prepared", "toggles"])
@pytest.mark.parametrize("change", [lambda v: v[:-1], lambda v: v + v[:1], lambda v: []])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_lists_of_other_lengths_are_refused(argument, change, device):
    values = problem([70, 40, 33, 9])
    values["toggles"] = [torch.zeros(2, 1, dtype=torch.int32)] * 2
    values = {name: moved(value, lambda tensor: tensor.to(device)) for name, value in values.items()}
    values[argument] = change(values[argument])
    with pytest.raises(
        RuntimeError, match=r"(weights|limits|flips|prepared|toggles): expected (at least )?\d tensors?, got \d"
    ):
        call(values)


@pytest.mark.parametrize("k", [-1, 0, 69, 71, 2**31, 2**63 - 1])
def test_a_wrong_k_is_refused(k):
    with pytest.raises(RuntimeError, match=re.compile("(x|k|weight_words): expected")):
        call(problem([70, 40, 9]) | {"k": k})


def test_layers_that_do_not_fit_are_refused():
    values = problem([70, 40, 9])
    values["weights"][1] = pack_signs(torch.randn(9, 70))
    with pytest.raises(RuntimeError, match=r"(x_words|weight_words): expected"):
        call(values)
