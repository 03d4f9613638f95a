"""The mutators do what they say, and assert_caught says when a mutant gets away."""

import numpy as np
import pytest

from ..machine import Module, Out
from ..mutate import (
    Mutant,
    assert_caught,
    change_swizzles,
    edit,
    loosen_waits,
    off_by_one,
    remove_barriers,
    remove_waits,
    swap_fragments,
)
from .helpers import HEADER

PTX = f"""{HEADER}.visible .entry other() {{ bar.sync 0; ret; }}
.visible .entry k(.param .u64 out)
{{
    .reg .pred %p<3>; .reg .b32 %r<9>; .reg .b64 %rd<3>;
    mov.u32 %r1, %tid.x;
    ld.param.u64 %rd1, [out]; mad.wide.u32 %rd1, %r1, 4, %rd1;
    .loc 1 7 1
    xor.b32 %r2, %r1, 3;
    xor.b32 %r3, %r2, %r1;
    @%p1 bar.sync 0;
    .loc 1 9 1
    setp.lt.s32 %p2, %r1, 20;
    cp.async.wait_group 1;
    ldmatrix.sync.aligned.m8n8.x2.shared.b16 {{%r4, %r5}}, [%r6];
    @%p2 st.global.u32 [%rd1], %r3;
    ret;
}}
.file 1 "/x/a.cu"
"""


def changed(mutants: list[Mutant]) -> list[tuple[str, str]]:
    """Return the line that differs of each mutant, before and after."""
    found = []
    for mutant in mutants:
        lines = zip(PTX.split("\n"), mutant.text.split("\n"), strict=True)
        ((before, after),) = [(a.strip(), b.strip()) for a, b in lines if a != b]
        found.append((before, after))
    return found


def test_mutators():
    assert changed(remove_barriers(PTX, "k")) == [("@%p1 bar.sync 0;", "")]
    assert changed(remove_waits(PTX, "k")) == [("cp.async.wait_group 1;", "")]
    assert changed(loosen_waits(PTX, "k")) == [("cp.async.wait_group 1;", "cp.async.wait_group 2;")]
    assert changed(off_by_one(PTX, "k")) == [("setp.lt.s32 %p2, %r1, 20;", "setp.le.s32 %p2, %r1, 20;")]
    assert changed(change_swizzles(PTX, "k")) == [
        ("xor.b32 %r2, %r1, 3;", "xor.b32 %r2, %r1, 2;"),
        ("xor.b32 %r3, %r2, %r1;", "mov.b32 %r3, %r2;"),
    ]
    assert changed(edit("count", PTX, "k", r"ldmatrix\..*", r"\.x2", ".x4")) == [
        tuple(f"ldmatrix.sync.aligned.m8n8.{n}.shared.b16 {{%r4, %r5}}, [%r6];" for n in ("x2", "x4"))
    ]
    for wait in ("wgmma.wait_group.sync.aligned", "cp.async.bulk.wait_group.read", "cp.async.bulk.wait_group"):
        text = PTX.replace("cp.async.wait_group 1", f"{wait} 1")
        (loosened,) = loosen_waits(text, "k")
        assert loosened.text == text.replace(f"{wait} 1;", f"{wait} 2;")
        (removed,) = remove_waits(text, "k")
        assert removed.text == text.replace(f"{wait} 1;", "")
    ((before, after),) = changed(swap_fragments(PTX, "k"))
    assert "{%r4, %r5}" in before and "{%r5, %r4}" in after
    assert off_by_one(PTX, "k", source="a.cu:7") == [] and len(off_by_one(PTX, "k", source="a.cu:9")) == 1
    assert remove_barriers(PTX, "k")[0].name == "barrier removed: bar.sync at PTX line 13 (a.cu:7)"


RUNNING = "\n".join(line for line in PTX.split("\n") if not any(w in line for w in ("bar.sync", "wait", "ldmatrix")))


def run_and_compare(module: Module, seed: int) -> None:
    out = np.zeros(32, np.int32)
    module.launch("k", 1, 32, [Out(out)], seed=seed)
    # This ignores thread 20, so the mutant that lets it through survives.
    assert (out[:20] == 3).all() and (out[21:] == np.int32(-0x32323233)).all()


def test_survivors_are_named():
    caught = assert_caught(RUNNING, change_swizzles(RUNNING, "k"), run_and_compare)
    assert [how for _, how in caught] == ["wrong result", "wrong result"]
    mutants = off_by_one(RUNNING, "k")
    with pytest.raises(AssertionError, match=r"NOT CAUGHT +off by one"):
        assert_caught(RUNNING, mutants, run_and_compare)
    assert_caught(RUNNING, mutants, run_and_compare, equivalent={"setp.lt": "nobody looks at thread 20"})
    with pytest.raises(AssertionError, match="though called equivalent"):
        mutants = change_swizzles(RUNNING, "k")
        assert_caught(RUNNING, mutants, run_and_compare, equivalent={"xor.b32": "not so"})
    with pytest.raises(AssertionError, match="there is no mutant"):
        assert_caught(RUNNING, [], run_and_compare)
    broken = Mutant("nothing stored", RUNNING.replace("@%p2 st.global", "@!%p2 st.global"))
    assert assert_caught(RUNNING, [broken], run_and_compare)[0][1] == "wrong result"
    with pytest.raises(AssertionError):  # the kernel itself must pass
        assert_caught(broken.text, [broken], run_and_compare)
