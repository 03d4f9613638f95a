"""What the interpreter's own tests share: a kernel round a few instructions, and the textbook kernels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from ..machine import In, Module, Out, PtxFault, Report
from ..regenerate import KERNELS

HEADER = ".version 8.6\n.target sm_90a\n.address_size 64\n"
REGISTERS = """
    .reg .pred %p<8>, %q;
    .reg .b16 %h<8>;
    .reg .b32 %r<32>;
    .reg .b64 %rd<32>, %out, %in<4>, %at;
    .reg .f32 %f<8>;
    .reg .f64 %fd<8>;
    .reg .b32 %tid;
"""
PTX_TYPE = {"u1": "u8", "u2": "u16", "u4": "u32", "u8": "u64", "i1": "s8", "i2": "s16", "i4": "s32", "i8": "s64"}


def ptx_type(dtype: np.dtype) -> str:
    """The type of a register that holds a NumPy value; bytes lie in 16-bit registers."""
    dtype = np.dtype(dtype)
    return {"f2": "b16", "f4": "f32", "f8": "f64"}.get(dtype.str[1:]) or PTX_TYPE[dtype.str[1:]]


def module(body: str, params: str = ".param .u64 out", before: str = "") -> Module:
    """A kernel `k` of these statements; %tid holds the linear thread index of the block, %out the first parameter."""
    text = f"""{HEADER}{before}
.visible .entry k({params})
{{
{REGISTERS}
    mov.u32 %tid, %tid.x;
    ld.param.u64 %out, [out];
{body}
    ret;
}}
"""
    return Module.from_ptx(text)


def lanes(body: str, *inputs: Sequence | np.ndarray, out: type | str = np.uint32, threads: int = 0) -> np.ndarray:
    """Runs `body` once a value: %a, %b, %c hold the inputs' values, and %d is the result."""
    arrays = [np.ascontiguousarray(x) for x in inputs]
    count = threads or (arrays[0].size if arrays else 32)
    result = np.zeros(count, out)
    declarations, loads = "", ""
    for name, array, index in zip("abc", arrays, range(3), strict=False):
        kind = ptx_type(array.dtype)
        register = kind if kind[1:] != "8" else "b16"
        declarations += f".reg .{register} %{name};\n"
        loads += f"""
    ld.param.u64 %at, [in{index}];
    mad.wide.u32 %at, %tid, {array.itemsize}, %at;
    ld.global.{kind} %{name}, [%at];"""
    kind = ptx_type(result.dtype)
    register = kind if kind[1:] != "8" else "b16"
    params = ", ".join([".param .u64 out", *(f".param .u64 in{k}" for k in range(len(arrays)))])
    text = f"""{declarations}.reg .{register} %d;{loads}
{body}
    mad.wide.u32 %at, %tid, {result.itemsize}, %out;
    st.global.{kind} [%at], %d;"""
    module(text, params).launch("k", 1, count, [Out(result), *map(In, arrays)])
    return result


def textbook(name: str) -> str:
    return (KERNELS / f"{name}.ptx").read_text()


def run(
    body: str, args: Sequence = (), threads: int = 32, *, params: str = "", before: str = "", grid: int = 1, **options
) -> Report:
    """Launches statements over `threads` threads; without args the output is one buffer of a word a thread."""
    args = args or [Out(np.zeros(threads * grid, np.uint32))]
    return module(body, params or ".param .u64 out", before).launch("k", grid, threads, args, **options)


def assert_fault(kind: str, message: str, body: str, *args, seeds: Sequence[int] = range(3), **kwargs) -> PtxFault:
    """The statements stop with this fault, whatever the schedule."""
    for seed in seeds:
        with pytest.raises(PtxFault, match=message or None) as caught:
            run(body, *args, seed=seed, **kwargs)
        assert caught.value.kind == kind, caught.value
    return caught.value
