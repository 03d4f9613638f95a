"""Make mutants of a kernel's PTX, one mistake each, and assert that tests and detectors catch every one.

    mutants = [*remove_barriers(ptx, "matmul"), *off_by_one(ptx, "matmul", source="matmul.cu:54")]
    assert_caught(ptx, mutants, run_and_compare)

The caller's `run_and_compare(module, seed)` launches the kernel and asserts that the result is right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from .machine import Module, PtxFault, compile_cached
from .parser import Instruction, parse


@dataclass(frozen=True)
class Mutant:
    name: str
    text: str


def sites(ptx: str, kernel: str, opcode: str, source: str = "") -> Iterator[tuple[Instruction, str]]:
    """Yield a kernel's instructions whose opcode matches, each with its place in the source ("file:line").

    `source` selects the instructions that have this place: their own, or one that they are inlined at.
    """
    module = parse(ptx)
    for i in module.kernels[kernel].instructions:
        places = [f"{Path(module.files.get(file, '?')).name}:{line}" for file, line in i.source]
        if re.fullmatch(opcode, i.opcode) and (not source or source in places):
            yield i, places[0] if places else "?"


def _edited(ptx: str, i: Instruction, old: str, new: str) -> str | None:
    """Return the PTX with the instruction's text changed on its first line, or None if nothing changes."""
    lines = ptx.split("\n")
    at = lines[i.line - 1].find(i.opcode)
    head, tail = lines[i.line - 1][:at], lines[i.line - 1][at:]
    changed = re.sub(old, new, tail, count=1)
    if changed == tail:
        return None
    lines[i.line - 1] = head + changed
    return "\n".join(lines)


def _mutants(what: str, ptx: str, kernel: str, opcode: str, source: str, old: str, new: str) -> list[Mutant]:
    found = []
    for i, place in sites(ptx, kernel, opcode, source):
        text = _edited(ptx, i, old, new)
        if text is not None:
            found.append(Mutant(f"{what}: {i.opcode} at PTX line {i.line} ({place})", text))
    return found


def remove(what: str, ptx: str, kernel: str, opcode: str, source: str = "") -> list[Mutant]:
    """Return one mutant for each matching instruction, without that instruction and its guard."""
    found = []
    for i, place in sites(ptx, kernel, opcode, source):
        lines = ptx.split("\n")
        line = lines[i.line - 1]
        removed = re.sub(r"(@!?%\w+\s+)?" + re.escape(i.opcode) + r"[^;]*;", "", line, count=1)
        assert removed != line, f"{line!r} is not one statement"
        lines[i.line - 1] = removed
        found.append(Mutant(f"{what}: {i.opcode} at PTX line {i.line} ({place})", "\n".join(lines)))
    return found


def remove_barriers(ptx: str, kernel: str, source: str = "") -> list[Mutant]:
    return remove("barrier removed", ptx, kernel, r"(bar|barrier)\..*sync.*", source)


def edit(what: str, ptx: str, kernel: str, opcode: str, old: str, new: str, source: str = "") -> list[Mutant]:
    """Return one mutant for each matching instruction that `re.sub(old, new)` changes, from its opcode on."""
    return _mutants(what, ptx, kernel, opcode, source, old, new)


def remove_waits(ptx: str, kernel: str, source: str = "") -> list[Mutant]:
    return remove("wait removed", ptx, kernel, r"(cp\.async|cp\.async\.bulk|wgmma)\.wait_.*", source)


def loosen_waits(ptx: str, kernel: str, source: str = "") -> list[Mutant]:
    """Return mutants whose waits let one more group stay in flight."""
    found = []
    for i, place in sites(ptx, kernel, r"(cp\.async|cp\.async\.bulk|wgmma)\.wait_group.*", source):
        count = i.operands[0].value  # type: ignore[union-attr]
        text = _edited(ptx, i, rf"(?<=\s){count}(?=;)", str(count + 1))
        assert text is not None
        found.append(Mutant(f"wait loosened: {i.opcode} {count} at PTX line {i.line} ({place})", text))
    return found


def change_swizzles(ptx: str, kernel: str, source: str = "", bit: int = 1) -> list[Mutant]:
    """Return mutants in which an XOR ignores its second register, or has one bit of its constant flipped."""
    found = []
    for i, place in sites(ptx, kernel, r"xor\.b(16|32|64)", source):
        text = _edited(ptx, i, r"^\S+\s+(\S+),\s*(\S+),\s*%\w+", r"mov" + i.opcode[3:] + r" \1, \2")
        if text is None:
            number = re.search(r"(-?\d+);", ptx.split("\n")[i.line - 1])
            assert number
            text = _edited(ptx, i, re.escape(number[0]), f"{int(number[1]) ^ bit};")
        assert text is not None
        found.append(Mutant(f"swizzle changed: {i.opcode} at PTX line {i.line} ({place})", text))
    return found


_NEIGHBOURS = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "lo": "ls", "ls": "lo", "hi": "hs", "hs": "hi"}


def off_by_one(ptx: str, kernel: str, source: str = "") -> list[Mutant]:
    """Return mutants of comparisons: < becomes <=, >= becomes >, and so on."""
    found = []
    for old, new in _NEIGHBOURS.items():
        opcode = rf"setp\.{old}(\.(and|or|xor))?\.[su](16|32|64)"
        found += _mutants("off by one", ptx, kernel, opcode, source, rf"setp\.{old}\b", f"setp.{new}")
    return found


def swap_fragments(ptx: str, kernel: str, opcode: str = r"(mma|ldmatrix)\..*", source: str = "") -> list[Mutant]:
    """Return mutants in which two registers of one fragment, an operand of a load or a product, are exchanged."""
    found = []
    for i, place in sites(ptx, kernel, opcode, source):
        lines = ptx.split("\n")
        line = lines[i.line - 1]
        start = line.index(i.opcode)
        for operand, match in enumerate(re.finditer(r"\{([^{}]*)\}", line[start:])):
            registers = [r.strip() for r in match[1].split(",")]
            if "mma" in i.opcode and operand == 3:
                continue  # the incoming accumulator has the registers of the outgoing one
            for a, b in combinations(range(len(registers)), 2):
                swapped = list(registers)
                swapped[a], swapped[b] = swapped[b], swapped[a]
                changed = line[: start + match.start()] + "{" + ", ".join(swapped) + "}" + line[start + match.end() :]
                text = "\n".join([*lines[: i.line - 1], changed, *lines[i.line :]])
                name = f"fragments {a} and {b} of operand {operand} swapped: {i.opcode} at PTX line {i.line} ({place})"
                found.append(Mutant(name, text))
    return found


def change_source(cuda: str, arch: str, edits: Iterable[tuple[str, str, str]]) -> list[Mutant]:
    """Return a mutant of the CUDA text for each edit (name, old, new), compiled by nvcc; `old` must occur once."""
    found = []
    for name, old, new in edits:
        assert cuda.count(old) == 1, f"{name}: {old!r} occurs {cuda.count(old)} times"
        found.append(Mutant(name, compile_cached(cuda.replace(old, new), arch)))
    return found


def assert_caught(
    ptx: str,
    mutants: Iterable[Mutant],
    run_and_compare: Callable[[Module, int], None],
    seeds: Iterable[int] = range(3),
    equivalent: Mapping[str, str] | None = None,
) -> list[tuple[str, str]]:
    """Assert that the kernel passes with every seed and each mutant fails with one; return how each was caught.

    `equivalent` names mutants that compute the same and must survive: it maps a part of the name to the reason.
    """
    seeds = list(seeds)
    for seed in seeds:
        run_and_compare(Module.from_ptx(ptx), seed)
    caught, survivors = [], []
    for mutant in mutants:
        how = ""
        for seed in seeds:
            try:
                run_and_compare(Module.from_ptx(mutant.text), seed)
            except PtxFault as fault:
                how = fault.kind
            except AssertionError:
                how = "wrong result"
            if how:
                break
        reason = next((why for part, why in (equivalent or {}).items() if part in mutant.name), None)
        if reason is not None:
            how = f"CAUGHT ({how}), though called equivalent" if how else f"equivalent: {reason}"
            if how.startswith("CAUGHT"):
                survivors.append(mutant.name)
        elif not how:
            how = "NOT CAUGHT"
            survivors.append(mutant.name)
        caught.append((mutant.name, how))
    assert caught, "there is no mutant"
    print("\n".join(f"{how:<28} {name}" for name, how in caught))
    assert not survivors, "not as expected:\n" + "\n".join(
        f"{how:<28} {name}" for name, how in caught if name in survivors
    )
    return caught
