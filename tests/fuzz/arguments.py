"""Arguments for every operator, determined by a seed: valid ones in memory of every form, some of them then spoilt."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from support.reference import FLOATS, random_values
from support.shapes import PANEL, UNIT, around
from torch import Tensor

from bitorch_qlinear import _kernels, kernels

from .memory import extent, guarded, is_inside

NAMESPACE = "bitorch_qlinear::"
# tests/operators/test_chain.py and test_records.py test these, which take lists of tensors.
LISTS = {"linear_chain", "record_values", "same_values"}
OPERATORS = sorted(
    {n[len(NAMESPACE) :] for n in torch._C._dispatch_get_all_op_names() if n.startswith(NAMESPACE)} - LISTS
)
KERNELS = _kernels.available_kernels()
HEADER_BYTES = 64
PANELS_OFFSET = 192  # the panels follow the header and the fingerprint
MAGIC = b"bitorchq"

WORDS = (torch.int32, torch.uint32)
DTYPES = sorted({v for v in vars(torch).values() if isinstance(v, torch.dtype)}, key=str)
SIZES = [0, 1, 1, 2, 3, 5, 17, *around(PANEL), 2 * PANEL + 2]
LENGTHS = [0, 1, 2, *around(12, UNIT, 32, 64, 240, 256), 500, 1009]
WRONG_INTEGERS = [-1, 0, 1, 31, 2**15, 2**31 - 1, 2**31, 2**32 + 40, 2**62, 2**63 - 1, -(2**31), -(2**63), 2**63, 2**64]
WRONG_TYPES = [None, "x", 2.5, [], 3 + 1j, object, b"\0", -7]


class Case(NamedTuple):
    """One call of an operator, with its arguments by their names in the schema."""

    operator: str
    kernel: str
    values: dict[str, Any]


def schema(operator: str) -> list[torch.Argument]:
    return getattr(torch.ops.bitorch_qlinear, operator).default._schema.arguments


class Maker:
    """A source of random arguments whose sizes fit together."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        pick = self.random.choice
        self.leading = tuple(pick(SIZES[:6]) for _ in range(pick([0, 1, 2, 3]))) if self.chance(0.3) else (pick(SIZES),)
        self.n, self.k = pick(SIZES), pick([pick(LENGTHS), self.random.randrange(200)])
        self.dtype, self.transpose = pick(FLOATS), self.chance(0.5)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    # ---- tensors ------------------------------------------------------------------------------

    def elements(self, count: int, dtype: torch.dtype) -> Tensor:
        """Return the bytes of ``count`` random values of the dtype (uint8, one dimension)."""
        if dtype in FLOATS:
            return random_values((count,), dtype, self.generator).view(torch.uint8)
        content = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=self.generator)
        return content & 1 if dtype is torch.bool else content

    def view(self, sizes: tuple[int, ...], strides: list[int], dtype: torch.dtype, offset: int = 0) -> Tensor:
        """Return a tensor of these strides in guarded memory, which begins or ends with it."""
        content = self.elements(max(extent(sizes, tuple(strides), offset), offset), dtype)
        raw = guarded(content, at_end=self.chance(0.75), misaligned=self.chance(0.1))
        return raw.view(dtype).as_strided(sizes, strides, offset)

    def contiguous(self, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        strides = [math.prod(max(size, 1) for size in sizes[d + 1 :]) for d in range(len(sizes))]
        return self.view(sizes, strides, dtype, self.random.choice([0, 0, 1, 7]))

    def strided(self, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a tensor whose dimensions may be permuted, have gaps, be expanded or overlap."""
        strides, step = [0] * len(sizes), self.random.choice([1, 1, 2, 3])
        order = list(range(len(sizes)))[::-1]
        if self.chance(0.3):
            self.random.shuffle(order)
        for d in order:
            strides[d] = step
            step = step * max(sizes[d], 1) + self.random.choice([0, 0, 0, 5])
        for d, size in enumerate(sizes):
            if self.chance(0.15):
                strides[d] = self.random.choice([0, 0, 1, 2])
            if size == 1 and self.chance(0.2):  # nothing ever steps along a dimension of size 1
                strides[d] = self.random.choice([0, 2**31, 2**62])
        if 0 in sizes and self.chance(0.3):
            strides = [self.random.choice([0, 1, 2**40, 2**62, 2**63 - 1]) for _ in sizes]
        return self.view(sizes, strides, dtype, self.random.choice([0, 0, 1, 7]))

    def floats(self, sizes: tuple[int, ...]) -> Tensor:
        x = self.contiguous(sizes, self.dtype) if self.chance(0.5) else self.strided(sizes, self.dtype)
        return torch._neg_view(x) if self.chance(0.05) else x

    def words(self, *sizes: int) -> Tensor:
        return self.contiguous((*sizes, -(-self.k // 32)), self.random.choice(WORDS))

    def vector(self) -> Tensor | None:
        dtype = self.random.choice([None, *FLOATS])
        return None if dtype is None else self.strided((self.n,), dtype)

    def limits(self) -> Tensor:
        """Return limits near the counts that random words have, and some far from any count."""
        near = torch.randint(self.k // 2 - 2, self.k // 2 + 3, (self.n,), dtype=torch.int32, generator=self.generator)
        anywhere = self.elements(self.n, torch.int32).view(torch.int32)
        content = torch.where(torch.rand(self.n, generator=self.generator) < 0.8, near, anywhere)
        return guarded(content.view(torch.uint8), misaligned=self.chance(0.1)).view(torch.int32)

    # ---- arguments, by name -------------------------------------------------------------------

    def valid(self, argument: str, so_far: dict[str, Any]) -> Any:
        if argument in ("x", "reals"):
            return self.floats((*self.leading, self.n if argument == "reals" and not self.transpose else self.k))
        if argument in ("words", "x_words"):
            return self.words(*self.leading)
        if argument in ("weight_words", "sign_words"):
            return self.words(self.n)
        if argument == "weight":
            return self.floats((self.n, self.k))
        if argument in ("bias", "scale"):
            return self.vector()
        if argument == "out_limits":
            return self.limits() if self.chance(0.3) else None
        if argument == "out_flips":
            given = so_far["out_limits"] is not None and self.chance(0.7)
            return self.contiguous((-(-self.n // 32),), self.random.choice(WORDS)) if given else None
        if argument == "limits":
            return self.contiguous((self.k,), self.dtype) if self.chance(0.7) else None
        if argument == "flips":
            given = so_far["limits"] is not None and self.chance(0.7)
            return self.contiguous((-(-self.k // 32),), self.random.choice(WORDS)) if given else None
        if argument == "weight_prepared":
            return self.prepared(so_far["weight_words"]) if self.chance(0.6) else None
        pick = self.random.choice
        values = {
            "k": self.k,
            "dtype": pick([*FLOATS, torch.int32, torch.int8, torch.bool]),
            "out_dtype": pick([None, *FLOATS, torch.int32]),
            "strict": self.chance(0.5),
            "strict_weight": self.chance(0.5),
            "transpose": self.transpose,
            "bits": pick([1, 2]),
            "threshold": pick([None, 0.0, -0.0, 0.3, 1, 1e300, math.inf]),
            "layout": pick([None, _kernels.prepared_layout().number]),
        }
        return values[argument]

    def prepared(self, weight_words: Tensor) -> Tensor:
        """Return the words' prepared form, or sometimes one of other words, of another size or for another kernel."""
        words, k, kernel = weight_words.clone(), self.k, None
        if self.chance(0.1):
            words = self.words(self.n)
        if self.chance(0.1):
            k //= 2
            words = words[: self.n // 2, : -(-k // 32)].contiguous()
        if self.chance(0.1):
            kernel = self.random.choice(KERNELS)
        with kernels.forced(kernel):
            made = torch.ops.bitorch_qlinear.prepare_weight(words, k)
        return guarded(made, misaligned=self.chance(0.1))

    def share_memory(self, values: dict[str, Any]) -> None:
        """Let arguments share memory."""
        if "x_words" in values:
            values["x_words"] = values["weight_words"]
        if values.get("bias") is None:
            return
        x = values.get("x")
        if x is not None and x.is_contiguous() and x.numel() >= self.n:
            values["bias"] = x.view(-1)[: self.n]
        values["scale"] = values["bias"]

    # ---- ways to spoil them -------------------------------------------------------------------

    def spoil(self, argument: torch.Argument, value: Any) -> Any:
        if self.chance(0.05):
            return self.random.choice(WRONG_TYPES)
        if argument.name == "weight_prepared" and value is not None and self.chance(0.7):
            return self.random.choice([self.other_bytes, self.other_header, self.other_length])(value)
        if "Tensor" in str(argument.type):
            return self.spoil_tensor(value)
        if argument.name in ("dtype", "out_dtype"):
            return self.random.choice(DTYPES)
        if argument.name == "threshold":
            return self.random.choice([math.nan, -1.0, -5e-324, -math.inf, True, 7, *WRONG_INTEGERS])
        if argument.name == "layout" and self.chance(0.5):
            return self.random.randrange(256)
        if argument.name == "k" and self.chance(0.5):
            return self.k + self.random.choice([-32, -1, 1, 32])
        return self.random.choice(WRONG_INTEGERS)

    def spoil_tensor(self, value: Tensor | None) -> Any:
        value = self.contiguous((self.n, 2), torch.int32) if value is None else value
        ways: list[Callable[[Tensor], Any]] = [
            lambda t: self.strided(tuple(t.shape), t.dtype),
            lambda t: self.strided(tuple(t.shape), self.random.choice(DTYPES)),
            lambda t: self.strided(self.other_sizes(tuple(t.shape)), t.dtype),
            lambda t: self.contiguous(self.other_sizes(tuple(t.shape)), t.dtype),
            self.other_storage,
            lambda t: t.to("meta"),
            lambda t: torch._efficientzerotensor(t.shape, dtype=self.dtype),
            lambda t: torch.zeros(t.shape).to_sparse(),
        ]
        return self.random.choice(ways)(value)

    def other_sizes(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        changed = list(sizes)
        what = self.random.randrange(4)
        at = self.random.randrange(len(changed) + 1)
        if what == 0 or at == len(changed):
            changed.insert(at, self.random.choice([0, 1, 1, 2, 3]))
        elif what == 1:
            del changed[at]
        else:
            changed[at] = max(0, changed[at] + self.random.choice([-1, 1, 31, -changed[at]]))
        return tuple(changed)

    def other_storage(self, tensor: Tensor) -> Tensor:
        """Return a tensor whose storage has been freed, entirely or in part, if it has any."""
        copy = torch.empty(tensor.shape, dtype=tensor.dtype)
        full = copy.untyped_storage().nbytes()
        copy.untyped_storage().resize_(self.random.choice([0, full // 2, max(full - 1, 0), full]))
        return copy if copy.untyped_storage().nbytes() < full else tensor

    def other_bytes(self, prepared: Tensor) -> Tensor:
        """Return a copy with a few bytes changed, in the panels or from the fingerprint or header on."""
        changed = prepared.clone()
        starts = [0, *(start for start in (HEADER_BYTES, PANELS_OFFSET) if start < len(changed))]
        first = self.random.choice(starts)
        for _ in range(self.random.choice([1, 1, 2, 50])):
            changed[self.random.randrange(first, len(changed))] = self.random.randrange(256)
        return guarded(changed)

    def other_header(self, prepared: Tensor) -> Tensor:
        """Return a form with the right magic, often the right layout, n and k, and random bytes after them."""
        changed = self.elements(len(prepared), torch.uint8).clone()
        changed[:16] = prepared[:16]
        if self.chance(0.3):
            changed[8] = self.random.randrange(5)
        for at, size in ((16, self.n), (24, self.k)):
            value = self.random.choice([size, size, size, size + 1, -1, 2**31, 2**62, 2**63 - 1, -(2**63)])
            changed[at : at + 8] = torch.tensor([value]).view(torch.uint8)
        return guarded(changed)

    def other_length(self, prepared: Tensor) -> Tensor:
        length = self.random.choice(
            [0, 1, 63, 64, 65, 191, 192, 193, len(prepared) - 1, len(prepared) + 1, 2 * len(prepared)]
        )
        return guarded(torch.cat([prepared, prepared, prepared.new_zeros(PANELS_OFFSET)])[:length])


def make_case(seed: int) -> Case:
    """Return the case that the seed determines, and make its kernel the active one."""
    maker = Maker(seed)
    operator, kernel = maker.random.choice(OPERATORS), maker.random.choice(KERNELS)
    _kernels.force_kernel(kernel)
    values: dict[str, Any] = {}
    for argument in schema(operator):
        values[argument.name] = maker.valid(argument.name, values)
    if maker.chance(0.15):
        maker.share_memory(values)
    if values.get("out_dtype") is torch.int32 and maker.chance(0.8):
        values |= {"bias": None, "scale": None}
    if values.get("out_limits") is not None and maker.chance(0.9):
        values |= {"bias": None, "scale": None, "out_dtype": None}
    arguments = schema(operator)
    for argument in maker.random.sample(arguments, min(len(arguments), maker.random.choice([0, 1, 1, 2, 3]))):
        values[argument.name] = maker.spoil(argument, values[argument.name])
    return Case(operator, kernel, values)


def describe(case: Case) -> str:
    """Return a description of the call, with a line for each argument."""
    lines = [f"  {name} = {form_of(name, value)}" for name, value in case.values.items()]
    return "\n".join([f"{case.operator} with kernel {case.kernel}", *lines])


def form_of(argument: str, value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    form = f"{tuple(value.shape)} of {value.dtype} on {value.device}, {value.layout}"
    if value.layout is not torch.strided or value.is_meta:
        return form
    if value._is_zerotensor():
        return f"{form}, without memory"
    place = f"strides {value.stride()}, offset {value.storage_offset()}"
    begins = f", begins {value[:32].tolist()}" if argument == "weight_prepared" and is_inside(value) else ""
    return f"{form}, {place}, storage of {value.untyped_storage().nbytes()} bytes{begins}"
