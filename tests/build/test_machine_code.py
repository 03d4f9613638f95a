"""The CUDA kernels' machine code for each target, and the program that reads it. No GPU is needed.

If the CUDA operators are built, as in CI, cuobjdump disassembles the library. The program itself is tested on samples
of cuobjdump's output, which need no build.
"""

import os
import re
from collections import Counter
from pathlib import Path

import pytest

import bitorch_qlinear
from bitorch_qlinear import _library
from tools import gpu_model, machine_code
from tools.machine_code import CHIPS, Bounds, Instruction, Kernel, Resources

LIBRARY = Path(bitorch_qlinear.__file__).with_name("_ops_cuda.so")
HEURISTICS = Path(__file__).parents[2] / "csrc" / "cuda" / "heuristics.h"
TARGETS = list(CHIPS)
# The targets for which the kernels with tensor cores have code (kKernels in records.h). All targets have the others.
TENSOR_CORES = {
    "gemm_mma_sm75": ("sm_75", "sm_80", "sm_86", "sm_89"),
    "gemm_mma_sm80": ("sm_80", "sm_86", "sm_89", "sm_90a"),
    "gemm_skinny_mma_sm80": ("sm_80", "sm_86", "sm_89", "sm_90a"),
    "gemm_fused_skinny_mma_sm80": ("sm_80", "sm_86", "sm_89", "sm_90a"),
    "gemm_mma_int8_sm80": ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"),
    "gemm_fused_cluster_sm90": ("sm_90a",),
    "gemm_wgmma_sm90a": ("sm_90a",),
}
# These kernels use mma_tiles.cuh.
TILED = ("gemm_mma_sm80", "gemm_mma_int8_sm80")
BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int32": 4}


def reason_against_reading() -> str:
    if not _library.has_cuda:
        return _library.no_cuda_reason
    if not (built := _library.build_info["cuda_targets"]).startswith("sm_"):
        return f"the CUDA operators are built for {built} alone"
    try:
        machine_code.find_cuobjdump()
    except FileNotFoundError as error:
        return "" if os.environ.get("CI") == "true" else str(error)
    return ""


reads_library = pytest.mark.skipif(bool(reason_against_reading()), reason=reason_against_reading())


# ---- the library -----------------------------------------------------------------------------------------------------


def left_empty(kernel: Kernel, target: str) -> bool:
    return target not in TENSOR_CORES.get(kernel.source, TARGETS)


def work_of(kernel: Kernel) -> gpu_model.Work:
    return gpu_model.WORKS[kernel.source][""](kernel)


def resident_blocks(kernel: Kernel, target: str, takes: Resources, bounds: Bounds) -> int:
    return machine_code.resident_blocks(CHIPS[target], takes, bounds.threads, work_of(kernel).dynamic)


@reads_library
def test_targets():
    assert {*re.findall(r"sm_\w+", _library.build_info["cuda_targets"])} == {*TARGETS}
    used, bounds = machine_code.resources(LIBRARY), machine_code.launch_bounds(LIBRARY)
    assert used.keys() == {*TARGETS}
    # A device without machine code in the library compiles this PTX, which has all kernels of capability 8.0.
    assert machine_code.ptx_targets(LIBRARY) == {"sm_80"}
    assert all(kernels.keys() == bounds.keys() for kernels in used.values())
    assert {kernel.source for kernel in bounds} == gpu_model.WORKS.keys()
    assert any(
        "mma.sync.aligned.m16n8k256" in line and "and.popc" in line for line in machine_code.lines(LIBRARY, "-ptx")
    )


@reads_library
def test_nothing_is_spilled():
    for target, kernels in machine_code.resources(LIBRARY).items():
        spilling = {str(kernel): takes for kernel, takes in kernels.items() if takes.stack or takes.local}
        assert not spilling, target


@reads_library
def test_occupancy():
    """As many blocks fit a multiprocessor as the launch bounds promise and, for mma_sm80, as heuristics.h assumes."""
    used, bounds = machine_code.resources(LIBRARY), machine_code.launch_bounds(LIBRARY)
    for target, kernels in used.items():
        for kernel, takes in kernels.items():
            blocks = resident_blocks(kernel, target, takes, bounds[kernel])
            if left_empty(kernel, target):
                continue
            if kernel.source in TILED:
                small = target in ("sm_86", "sm_89", "sm_120")
                tiles = {(128, 256): 1, (128, 128): 1 if small else 2, (64, 64): 3 if small else 4}
                assert blocks == tiles[kernel.sizes[:2]], (target, str(kernel))
            else:
                assert blocks >= bounds[kernel].blocks, (target, str(kernel))
            if kernel.source.startswith("gemm_fused"):
                assert (bounds[kernel].threads, bounds[kernel].blocks) == (512, 1)
            if kernel.source == "gemm_fused_cluster_sm90":
                assert blocks == 1, "its launcher takes the number of clusters to be the same for all kernels"
            if kernel.source.startswith("gemm_skinny"):
                assert (bounds[kernel].threads, bounds[kernel].blocks) == (32 * kernel.sizes[-2], kernel.sizes[-1])


def check_tensor_cores(kernel: Kernel, names: Counter[str]) -> None:
    """The code has exactly the tensor core instructions of the source; an inner loop counts with all its passes."""
    kinds = {"gemm_mma_sm75": "BMMA.88128.XOR.POPC", "gemm_mma_int8_sm80": "IMMA.16832.U8.U8"}
    kind = kinds.get(kernel.source, "BMMA.168256.AND.POPC")
    if kernel.source == "gemm_wgmma_sm90a":
        kind = f"BGMMA.64x{kernel.sizes[0]}x256.AND.POPC"
    expected = {kind: work_of(kernel).count} if kernel.source in TENSOR_CORES else {}
    if kernel.source == "gemm_wgmma_sm90a":
        # A last stage that holds fewer than four steps has a first step of two products, and a loop over the others.
        expected[kind] += 4
    assert {name: count for name, count in names.items() if gpu_model.TENSOR.match(name)} == expected


def promised_accesses(kernel: Kernel) -> dict[str, int]:
    """Return how many accesses of 16 bytes per lane a warp makes in a pass of the main loop, by instruction pattern."""
    match kernel:
        case Kernel("gemm_mma_sm80" | "gemm_mma_int8_sm80", sizes=(rows, columns, side, _)):
            threads = 32 * rows * columns // side**2
            return {r"LDGSTS\..*BYPASS\..*128B\.128": (rows + columns) * 4 // threads, r"LDS.*\.128": side // 4}
        case Kernel("gemm_mma_sm75"):
            return {r"LDG\.E\.128": 4, r"STS\.128": 4, r"LDS.*\.128": 8}
        # NA means "no allocation in L1" and is for weights.
        case Kernel("gemm_skinny", sizes=(rows, each, lines, *_)):
            x = lines * (rows // 4 if rows >= 4 else rows)
            return {r"LDG\.E\.NA\.128": each * lines, r"LDG\.E\.128": x}
        case Kernel("gemm_skinny_mma_sm80", sizes=(fragments, tiles, slices, *_)):
            return {r"LDG\.E\.NA\.128": tiles * slices, r"LDG\.E\.128": 2 * fragments * slices}
        case Kernel("gemm_fused_skinny", sizes=(rows,)):
            return {r"LDG\.E\.NA\.128": 4, r"LDS.*\.128": 4 * rows}
        case Kernel("gemm_fused_skinny_mma_sm80" | "gemm_fused_cluster_sm90"):
            return {r"LDG\.E\.NA\.128": 4, r"LDS.*\.128": 8}
        case Kernel("pack", vectors=True):
            return {r"LDG\.E\.128": 4}
        case Kernel("unpack", flags=(True,)):
            return {r"STG\.E\.128": 4}
    return {}


def check_warpgroups(kernel: Kernel, instructions: list[Instruction], passed: Counter[str]) -> None:
    """The machine code of wgmma_sm90a keeps what its file promises.

    The products of a stage are one group and are waited for once in a pass, with one in flight. Each warpgroup stays
    within the registers that setmaxnreg gives it. Descriptors do not pass through registers of lanes; only the address
    that they are made of may. Outputs are stored as vectors.
    """
    columns, _, halves = kernel.sizes
    names = Counter(i.name for i in instructions)
    assert passed["WARPGROUP.ARRIVE"] == passed["WARPGROUP.DEPBAR.LE"] == 1
    # Beside the loop, those of a last stage with fewer steps (two groups, a wait for the stage before) and of the end.
    assert names["WARPGROUP.ARRIVE"] == names["WARPGROUP.DEPBAR.LE"] == 3
    assert machine_code.count(passed, "R2UR") <= 1 and passed.total() <= 80
    (released,) = [i.address for i in instructions if i.name.startswith("USETMAXREG.DEALLOC")]
    # Behind the producer's end lie only the repetitions of both sides' waits.
    end = max(i.address for i in instructions if i.name == "EXIT")
    assert released < end
    for first, last, most in ((released, end, 24), (0, instructions[-1].address, 240)):
        code = (i.operands for i in instructions if first <= i.address <= last)
        assert max(int(number) for operands in code for number in re.findall(r"\bR(\d+)\b", operands)) < most
    # Boxes are copied in the loop, and before it those of the first stages: weight before x is there, and x.
    assert machine_code.count(names, "UTMALDG") == 2 * (1 + halves)
    assert names["ACQBULK"] == 3, "the producer, the consumers and a block without results wait for the kernel before"
    if kernel.type == "bits":
        assert names["STG.E"] == columns // 32 + 1, "words of 32 bits, and one without a result"
        return
    vectors = sum(
        count for name, count in names.items() if re.match(rf"STG.*\.{2 * halves * 8 * BYTES[kernel.type]}$", name)
    )
    assert vectors == columns // (2 * halves), "results are not stored as whole vectors"
    if kernel.type in ("float16", "bfloat16"):
        assert machine_code.count(names, "F2FP") == columns, "pairs are not narrowed together, in both ways to store"


def check_early_copies(kernel: Kernel, instructions: list[Instruction]) -> None:
    """Before the wait lie the copies of weights of one stage, or of all four of the smallest tile, and no load."""
    rows, columns, side, _ = kernel.sizes
    names = Counter(i.name for i in instructions[: [i.name for i in instructions].index("ACQBULK")])
    of_stage = columns * 4 // (32 * rows * columns // side**2)
    assert machine_code.count(names, "LDGSTS") == of_stage * (4 if side == 32 else 1)
    assert machine_code.count(names, "LDG", "LD") == 0


def check_clusters(instructions: list[Instruction]) -> None:
    """The blocks meet twice, and words go to other blocks 16 bytes at a time, before the second arrival."""
    names = [i.name for i in instructions]
    meetings = [name for name in names if name.startswith("UCGABAR")]
    assert meetings == ["UCGABAR_ARV", "UCGABAR_WAIT"] * 2
    assert [name for name in names if name.startswith("ST.")] == ["ST.E.128"]
    fences = [at for at, name in enumerate(names) if name.startswith("MEMBAR") and ".GPU" in name]
    (fence,), arrivals = fences, [at for at, name in enumerate(names) if name == "UCGABAR_ARV"]
    assert names.index("ST.E.128") < fence < arrivals[1]


def check_early_loads(instructions: list[Instruction]) -> None:
    """Weights are loaded before the wait for the kernel that makes x, and x after it."""
    names = [i.name for i in instructions]
    before = [name for name in names[: names.index("ACQBULK")] if re.match(r"LDG.*\.128", name)]
    assert before and all(".NA" in name for name in before), "x is loaded by instructions without NA"


def check_memory(kernel: Kernel, names: Counter[str], passed: Counter[str]) -> None:
    """Accesses are as wide as the sources promise, and exactly the kernels with tiles copy asynchronously."""
    promised = promised_accesses(kernel)
    accesses = {
        pattern: sum(count for name, count in passed.items() if re.match(pattern, name)) for pattern in promised
    }
    assert accesses == promised
    for kind in {re.match("[A-Z]+", pattern)[0] for pattern in promised}:
        of_kind = sum(count for pattern, count in promised.items() if re.match(rf"{kind}\b", pattern))
        assert machine_code.count(passed, kind) == of_kind, f"some {kind} are narrower"
    assert (machine_code.count(names, "LDGSTS") > 0) == (kernel.source in TILED)
    if side := (32,) if kernel.source == "gemm_mma_sm75" else kernel.sizes[2:3] if kernel.source in TILED else ():
        vectors = sum(count for name, count in names.items() if name.startswith("STG.E.128"))
        if kernel.type == "bits":
            words = side[0] ** 2 // (32 * 32)  # of 32 bits
            # Beside them are the loop that fills y if a prepared form is wrong, and the report of it to the host.
            stores = sum(n for name, n in names.items() if name.startswith("STG") and not name.endswith("STRONG.SYS"))
            assert vectors == 0 and stores == words + 1
            return
        assert vectors == side[0] ** 2 * BYTES[kernel.type] // (32 * 16), "results are not stored as whole vectors"


@reads_library
@pytest.mark.parametrize("target", TARGETS)
def test_instructions(target):
    """One test checks all of a target's code, because its disassembly takes seconds."""
    kernels = 0
    for kernel, instructions in machine_code.disassemble(LIBRARY, target):
        kernels += 1
        names = Counter(i.name for i in instructions)
        try:
            assert machine_code.count(names, "LDL", "STL") == 0
            if left_empty(kernel, target):
                # They only fill y with what no product gives.
                assert not [name for name in names if gpu_model.TENSOR.match(name)]
                assert machine_code.count(names, "BPT", "LDG", "LDGSTS", "LDS") == 0
                continue
            passed = gpu_model.main_pass(instructions, work_of(kernel))
            assert passed and machine_code.count(passed, work_of(kernel).kind) == work_of(kernel).count
            check_tensor_cores(kernel, names if kernel.source != "gemm_mma_int8_sm80" else passed)
            check_memory(kernel, names, passed)
            if kernel.source in TILED and target == "sm_90a":
                check_early_copies(kernel, instructions)
            if kernel.source == "gemm_wgmma_sm90a":
                check_warpgroups(kernel, instructions, passed)
            if kernel.source == "gemm_fused_cluster_sm90":
                check_clusters(instructions)
            if target == "sm_90a" and kernel.source.startswith("gemm_skinny"):
                check_early_loads(instructions)
        except AssertionError as error:
            error.add_note(f"{kernel} for {target}")
            raise
    assert kernels == len(machine_code.launch_bounds(LIBRARY))


# ---- the program that reads it, on samples ---------------------------------------------------------------------------

SPACE = "_ZN15bitorch_qlinear4cuda"
POPC = f"{SPACE}45_GLOBAL__N__339fd175_12_gemm_popc_cu_54fd179714multiply_tilesINS0_2AsIiiEEEEvNS0_7ProductEl"
BITS = f"{SPACE}45_GLOBAL__N__339fd175_12_gemm_popc_cu_54fd179714multiply_tilesINS0_2AsINS0_3BitEiEEEEvNS0_7ProductEl"
MMA = (
    f"{SPACE}49_GLOBAL__N__c48535e4_16_gemm_mma_sm80_cu_06e1712014multiply_tilesI"
    "NS0_2AsI13__nv_bfloat16fEENS1_5ShapeILi128ELi256ELi64ELi1EEEEEvNS0_7ProductEllb"
)
PACK = f"{SPACE}39_GLOBAL__N__550750d5_7_pack_cu_daa0b8f29pack_rowsI6__halfLb1ENS1_7VectorsIS3_EEEEvNS0_4PackE"
ALIGN = f"{SPACE}40_GLOBAL__N__4ee2265e_8_align_cu_e480637f10align_rowsENS0_5AlignElNS_14PreparedHeaderE"


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        (POPC, "gemm_popc<int32>"),
        (BITS, "gemm_popc<bits>"),
        (MMA, "gemm_mma_sm80<bfloat16, 128, 256, 64, 1>"),
        (PACK, "pack<float16, true, Vectors>"),
        (ALIGN, "align<>"),
    ],
)
def test_symbols(symbol, name):
    assert str(machine_code.parse_symbol(symbol)) == name


def test_instructions_of_a_sample():
    sample = f"""
Fatbin elf code:
arch = sm_80
		Function : {POPC}
	.headerflags	@"EF_CUDA_SM80 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM80)"
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;  /* 0x00000a00ff017624 */
                                                                            /* 0x000fe400078e00ff */
        /*0010*/              @!P0 BRA 0x1970 ;                             /* 0x00005d00ff047624 */
                                                                            /* 0x000fca00008e06ff */
        /*0020*/                   BRA.DIV ~URZ, 0x1f30 ;                   /* 0x0 */
        /*0030*/              @!PT LDS RZ, [RZ] ;                           /* 0x0 */
        /*0040*/             @!UP0 UIADD3 UR4, UR4, 0x1, URZ ;              /* 0x0 */
        /*0050*/                   NOP;                                     /* 0x0 */
		..........
		Function : {ALIGN}
        /*0000*/                   EXIT ;                                   /* 0x0 */
"""
    (popc, instructions), (align, last) = machine_code.parse_sass(sample.splitlines())
    assert (popc.source, align.source) == ("gemm_popc", "align")
    assert instructions == [
        Instruction(0, "", "IMAD.MOV.U32", "R1, RZ, RZ, c[0x0][0x28]"),
        Instruction(0x10, "@!P0", "BRA", "0x1970"),
        Instruction(0x20, "", "BRA.DIV", "~URZ, 0x1f30"),
        Instruction(0x30, "@!PT", "LDS", "RZ, [RZ]"),
        Instruction(0x40, "@!UP0", "UIADD3", "UR4, UR4, 0x1, URZ"),
        Instruction(0x50, "", "NOP", ""),
    ]
    assert [i.target for i in instructions] == [None, 0x1970, 0x1F30, None, None, None]
    assert [i.name for i in last] == ["EXIT"]


def test_resources_of_a_sample():
    sample = f"""
arch = sm_80
Resource usage:
 Common:
  GLOBAL:0
 Function {MMA}:
  REG:246 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:505 TEXTURE:0 SURFACE:0 SAMPLER:0
arch = sm_90a
 Function {MMA}:
  REG:238 STACK:8 SHARED:1024 LOCAL:4 CONSTANT[0]:681 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    kernel = machine_code.parse_symbol(MMA)
    assert machine_code.parse_resources(sample.splitlines()) == {
        "sm_80": {kernel: Resources(246, 0, 0, 0)},
        "sm_90a": {kernel: Resources(238, 1024, 8, 4)},
    }


def test_launch_bounds_of_a_sample():
    kernel = machine_code.parse_symbol(MMA)
    ptx = [f".visible .entry {MMA}(", ".param .u64 p", ")", ".maxntid 256, 1, 1", ".minnctapersm 2", "{"]
    bounds = machine_code.parse_bounds([*ptx, f".entry {ALIGN}(", ".maxntid 64"])
    assert bounds == {kernel: Bounds(256, 2), machine_code.parse_symbol(ALIGN): Bounds(64, 1)}


@pytest.mark.parametrize(
    ("target", "registers", "shared", "threads", "dynamic", "blocks"),
    [
        ("sm_80", 32, 0, 256, 0, 8),  # 64 warps
        ("sm_75", 32, 0, 1024, 0, 1),
        ("sm_86", 16, 0, 32, 0, 16),
        ("sm_80", 128, 0, 128, 0, 4),
        ("sm_80", 129, 0, 128, 0, 3),  # 136 registers
        ("sm_80", 246, 0, 256, 98304, 1),
        ("sm_80", 168, 0, 128, 0, 3),  # three warps in each quarter of a multiprocessor
        ("sm_86", 111, 0, 128, 32768, 3),  # limited by shared memory, including the reserved part
        ("sm_90a", 111, 1024, 128, 32768, 4),
        ("sm_90a", 32, 1024, 64, 0, 32),
    ],
)
def test_resident_blocks(target, registers, shared, threads, dynamic, blocks):
    assert machine_code.resident_blocks(CHIPS[target], Resources(registers, shared, 0, 0), threads, dynamic) == blocks


def kernel_of(text: str) -> list[Instruction]:
    """Parse instructions, one per line and 16 bytes each, with an optional predicate before the name."""
    found = []
    for number, line in enumerate(text.strip().splitlines()):
        predicate, name, operands = re.fullmatch(r"\s*(?:(@\S+) )?(\S+) ?(.*)", line).groups()
        found.append(Instruction(16 * number, predicate or "", name, operands))
    return found


NESTED = kernel_of("""
    S2R
    IADD3
    @P0 BRA 0x60
    LDG.E
    @P1 BRA 0x30
    BRA 0xb0
    LDG.E
    LOP3.LUT
    @!P2 BRA 0xb0
    NOP
    BRA 0x60
    @!PT LDS RZ, [RZ]
    POPC
    BRA.DIV 0x120
    POPC
    @P3 BRA 0xc0
    @P4 BRA 0x10
    EXIT
    POPC
    BRA 0xe0
""")


def test_loops():
    """The sample has two ways to load, of which one is left in its middle, and a loop of two popcounts."""
    found = machine_code.loops(NESTED)
    assert [(loop.first, loop.last) for loop in found] == [(0x30, 0x40), (0xC0, 0xF0), (0x60, 0xA0), (0x10, 0x100)]
    (outer,) = machine_code.main_loops(NESTED, "POPC")
    assert outer == found[-1]
    assert machine_code.main_loops(NESTED, "BMMA") == []
    passed = machine_code.one_pass(NESTED, outer, ["POPC", "LDG"], {"POPC": 8, "LDG": 3})
    # The shorter way to load runs three times and the popcounts four times; LDS to RZ does not count as a load.
    assert passed == {"IADD3": 1, "BRA": 1 + 3 + 1 + 4 + 1, "LDG.E": 3, "NOP": 1, "POPC": 8, "BRA.DIV": 4}
    with pytest.raises(AssertionError, match="does not make 7"):
        machine_code.one_pass(NESTED, outer, ["POPC"], {"POPC": 7, "LDG": 3})
    with pytest.raises(AssertionError, match="unknown passes"):
        machine_code.one_pass(NESTED, outer, ["POPC"], {"POPC": 8})


def test_model_on_a_sample():
    """The expected numbers are computed by hand for 4 tensor core instructions and 3 others."""
    instructions = kernel_of("LDS.128\nLOP3.LUT\nBMMA.168256.AND.POPC\n" * 2 + "IMAD.IADD\n@P0 BRA 0x0")
    work = gpu_model.Work("BMMA", 2, "tensor", multiplies=2 * 16 * 8 * 256, l2=470, memory=1339)
    passed = gpu_model.main_pass(instructions, work)
    clocks = gpu_model.estimate(passed, work, gpu_model.RATES["sm_80"])
    assert clocks.pop("memory") == pytest.approx(100, rel=1e-2)
    expected = {"issue": 2, "tensor": 4, "POPC": 0, "ALU": 1, "FMA": 0.5, "shared": 8, "L2": 10}
    assert clocks == expected
    line = gpu_model.row("sm_80", "made up", work._replace(memory=0), passed, Resources(32, 0, 0, 0), 256)
    assert line[:6] == ["made up", "sm_80", 32, 0, "8 x 256", 8] and line[-2:] == ["L2", "40% of tensor"]
    assert gpu_model.main_pass(kernel_of("BPT.TRAP 0x1\nBRA 0x10"), work) is None


def test_epilogues():
    """The bytes are counted by hand for a tile of 128 x 256, and for 4 rows of one word."""

    def end(source, kind, *sizes):
        return gpu_model.epilogue(Kernel(source, kind, sizes, (), False, ""))

    counts, outputs = 4 * (128 + 256), 128 * 256
    tile = end("gemm_mma_sm80", "bfloat16", 128, 256, 64, 1)
    assert tile == (128, 256, 8 * 256 + counts, 2 * outputs, 2 * outputs // 32, 4 * outputs + outputs // 8)
    tile = end("gemm_mma_sm80", "bits", 128, 256, 64, 1)
    assert tile == (128, 256, 4 * 256 + 8 * 4 + counts, 128 * 8 * 4, 128 * 8, 128 * 8 * 4)
    assert end("gemm_skinny", "bits", 4, 2, 2, 8, 3) == (4, 32, 4 * 32 + 4, 16, 4, 16)
    assert end("gemm_skinny", "int32", 4, 2, 2, 8, 3) == (4, 8, 0, 128, 4, 260)
    assert end("pack", "bits") is None
    kernels = [machine_code.parse_symbol(symbol) for symbol in (POPC, BITS, MMA, PACK)]
    lines = gpu_model.epilogue_table(kernels, {"gemm_popc<bits>", str(kernels[2]), str(kernels[3])})
    assert [line[:2] for line in lines] == [["gemm_popc<bits>", "64 x 64"], [str(kernels[2]), "128 x 256"]]
    assert [line[-1] for line in lines] == [1 / 8, 4 + 1 / 8]


def test_bounds_of_products_by_warpgroups():
    """8192³ by 128 x 192: 43 x 64 tiles are 21 rounds of 8 stages, of 768 clocks on tensor cores and 1024 from L2."""
    bound = gpu_model.warpgroup_bound(8192, 8192, 8192, 192)
    assert (bound.tensor, bound.shared, bound.l2) == (21 * 8 * 768, 21 * 8 * 832, 21 * 8 * 1024)
    assert (bound.rounds, bound.slowest()) == (21, "L2")
    assert bound.l2_bytes == 43 * 64 * 8 * 320 * 128 and bound.shared_bytes == 128 * bound.shared
    assert bound.output(2) == pytest.approx(8192**2 * 2 / 4.8e6)
    assert bound.time() == bound.time(1 / 8) == pytest.approx((21 * 8 * 1024 + 28 * 192) / 1665)
    lines = {line[0]: line for line in gpu_model.product_table()}
    assert lines["8192³"][1] == "128 x 192" and lines["4096³"][1] == "128 x 128"
    assert lines["ViT-B, 256 images, 768 → 3072"][8] == "output" and lines["1024³"][8] == "epilogue"
    for name, measured in gpu_model.PROTOTYPE.items():
        # The estimate leaves out a launch and the first copies, and has one clock for all sizes.
        assert lines[name][9] - 2 < measured + 0.03 * measured and lines[name][9] > measured - 2, name
    work = {line[0]: line for line in gpu_model.work_table()}
    assert work["8192³"][1:5] == [129024, 139776, 172032, 5376]
    assert work["8192³"][6:] == pytest.approx([901.8, 16.78, 134.2, 8.389], rel=1e-3)


def test_few_rows():
    """A block packs 49 bytes in a nanosecond, so 16 rows of 4096 take 2.67 us alone, and 0.33 + 0.3 us in a cluster."""
    lines = {line[0]: line for line in gpu_model.few_rows_table()}
    assert lines["16 × 4096"][2:4] == pytest.approx([2.67, 0.634], abs=0.01)
    chosen = [lines[x][5] for x in ("16 × 1024", "16 × 4096", "16 × 8192", "1 × 16384")]
    assert chosen == ["block", "cluster", "launch", "block"]
    text, figures = HEURISTICS.read_text(), gpu_model.FEW_ROWS
    named = ("MicrosOfPack", "MicrosHidden", "PackedBytesAMicro", "MicrosOfCluster")
    values = [float(re.search(rf"\bk{name} = ([\d.e]+)", text)[1]) for name in named]
    assert values == [figures.launch, figures.hidden, figures.packed_bytes, figures.cluster]
    assert f"kClusterBlocks = {figures.blocks};" in (HEURISTICS.parent / "records.h").read_text()


def test_few_rows_in_all():
    """The time in all is that of the way that is chosen and of the product. The targets name 4096 and 8192 squared."""
    lines = {line[0]: line[6:] for line in gpu_model.few_rows_table()}
    assert lines["1 × 4096"] == [2.36, pytest.approx(2.36 + 8.192 / 49), 3.2, "met"]
    assert lines["16 × 4096"] == [pytest.approx(3.92), pytest.approx(3.92 + 0.634, abs=0.001), 3.2, "missed by 1.4"]
    assert lines["16 × 8192"][1:] == [pytest.approx(5.49 + 0.8), 5.3, "missed by 1.0"]
    assert lines["1 × 11008"] == []
    assert {name for name, line in lines.items() if line} == {
        *(f"{m} × {k}" for m in (1, 2, 4, 8, 16) for k in (4096, 8192)),
        "256 × 1024",
    }


def test_rates_are_those_of_the_heuristics():
    rates = {int(case): None for case in re.findall(r"case (\d+):", HEURISTICS.read_text())}
    lines = re.findall(
        r"(?:case (\d+):\s*(?:case \d+: )?|default: )return \{(\d+), (\d+), (\d+) \* 1024\}", HEURISTICS.read_text()
    )
    assert len(lines) == 3 and rates.keys() == {80, 87, 90}
    for case, multiplies, l2, shared in lines:
        for target in [f"sm_{case}".replace("90", "90a")] if case else ["sm_86", "sm_89"]:
            assert gpu_model.RATES[target][1:] == (int(multiplies), int(l2)), target
            assert CHIPS[target].shared == int(shared) * 1024


def test_without_a_library(tmp_path):
    with pytest.raises(SystemExit, match=r"none\.so does not exist: the CUDA operators are not built"):
        gpu_model.main(["--library", str(tmp_path / "none.so")])


def test_a_library_without_ptx(monkeypatch, tmp_path):
    """A build for a single GPU has no PTX."""
    (tmp_path / "operators.so").touch()
    monkeypatch.setattr(machine_code, "lines", lambda *_: ["cuobjdump info    : No PTX file found to extract"])
    with pytest.raises(SystemExit, match=r"operators\.so has no PTX.*: build for all targets"):
        gpu_model.main(["--library", str(tmp_path / "operators.so")])


def test_without_cuobjdump(monkeypatch):
    monkeypatch.setattr(machine_code, "_folders", lambda: iter([Path("/nowhere")]))
    with pytest.raises(FileNotFoundError, match="pip install nvidia-cuda-cuobjdump"):
        machine_code.find_cuobjdump()


def test_the_model_without_cuobjdump(monkeypatch, capsys, tmp_path):
    """The tables of products need no library and are printed. A sentence follows instead of a traceback."""
    (tmp_path / "operators.so").touch()
    monkeypatch.setattr(machine_code, "_folders", lambda: iter([Path("/nowhere")]))
    with pytest.raises(SystemExit, match="pip install nvidia-cuda-cuobjdump"):
        gpu_model.main(["--library", str(tmp_path / "operators.so")])
    said = capsys.readouterr().out
    assert re.search(r"4096³ +128 x 128 +8 ", said) and re.search(r"16 × 4096 +131.07 .* missed by 1.4", said)


def test_command(monkeypatch, capsys, tmp_path):
    align, library = machine_code.parse_symbol(ALIGN), tmp_path / "operators.so"
    library.touch()
    code = {
        align: kernel_of("LDG.E\nSTG.E\n" * 8 + "@P0 BRA 0x0"),
        machine_code.parse_symbol(MMA): kernel_of("BPT.TRAP"),
    }
    takes = {"sm_90a": dict.fromkeys(code, Resources(48, 1056, 0, 0)), "sm_120": {}}
    monkeypatch.setattr(machine_code, "ptx_targets", lambda _: {"sm_80"})
    monkeypatch.setattr(machine_code, "resources", lambda _: takes)
    monkeypatch.setattr(machine_code, "launch_bounds", lambda _: dict.fromkeys(code, Bounds(256, 1)))
    monkeypatch.setattr(machine_code, "disassemble", lambda _, target: iter(code.items() if takes[target] else ()))
    gpu_model.main(["--library", str(library)])
    said = capsys.readouterr().out
    assert "An estimate from machine code and data sheets: no hardware was used." in said
    # A multiprocessor issues 4 of the 17 instructions per clock, and reads 2 KiB at 20.8 bytes per clock.
    assert re.search(r"align<> +sm_90a +48 +1056 +5 x 256 +17 +4 +16 +99 +memory +100% of memory", said)
    assert "gemm" not in said
