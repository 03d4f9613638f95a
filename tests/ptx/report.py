"""Print what each kernel's PTX does with memory, as the interpreter counts it: ``make ptx-report``.

Each kernel is launched once, for sm_80 or the target that it is meant for. The table has the instructions of warps, the
wavefronts of shared memory beyond those that the accesses need (bank conflicts), the 32-byte sectors of global memory
that were touched, and those that the accessed bytes would fill; the difference is due to uncoalesced accesses.
"""

from collections.abc import Callable

import torch
from tabulate import tabulate

from tools.ptx.machine import Module, Report

from . import test_ptx_fused_cluster_sm90 as fused_cluster_sm90
from . import test_ptx_fused_skinny as fused_skinny
from . import test_ptx_fused_skinny_mma_sm80 as fused_skinny_mma_sm80
from . import test_ptx_mma_sm75 as mma_sm75
from . import test_ptx_mma_sm80 as mma_sm80
from . import test_ptx_skinny as skinny
from . import test_ptx_skinny_mma_sm80 as skinny_mma_sm80
from .product import module
from .test_ptx_align import check_align
from .test_ptx_pack import check_pack
from .test_ptx_popc import check_popc
from .test_ptx_unpack import check_unpack

HALF, BITS = torch.bfloat16, torch.bool
ROWS: list[tuple[str, str, str, Callable[[Module], Report]]] = [
    ("pack", "sm_80", "16 × 4096 bfloat16", lambda m: check_pack(m, HALF, 16, 4096)),
    ("unpack", "sm_80", "16 × 4096 bfloat16", lambda m: check_unpack(m, HALF, 16, 4096)),
    ("align", "sm_80", "16 × 4000", lambda m: check_align(m, 16, 4000)),
    ("gemm_popc", "sm_80", "64 × 2048 → 64", lambda m: check_popc(m, 64, 64, 2048, HALF)),
    ("gemm_skinny", "sm_80", "1 × 8192 → 64", lambda m: skinny.check_skinny(m, 1, 64, 8192, HALF)),
    ("gemm_skinny", "sm_80", "16 × 8192 → 64", lambda m: skinny.check_skinny(m, 16, 64, 8192, HALF)),
    ("gemm_skinny_mma_sm80", "sm_80", "16 × 8192 → 64", lambda m: skinny_mma_sm80.check_skinny(m, 16, 64, 8192, HALF)),
    ("gemm_skinny_mma_sm80", "sm_80", "64 × 8192 → 64", lambda m: skinny_mma_sm80.check_skinny(m, 64, 64, 8192, HALF)),
    (
        *("gemm_fused_skinny", "sm_80", "1 × 8192 → 64"),
        lambda m: fused_skinny.check_fused(m, 1, 64, 8192, HALF, dtype=HALF, parts=1),
    ),
    (
        *("gemm_fused_skinny_mma_sm80", "sm_80", "16 × 8192 → 64"),
        lambda m: fused_skinny_mma_sm80.check_fused(m, 16, 64, 8192, HALF, dtype=HALF, parts=2),
    ),
    (
        *("gemm_fused_cluster_sm90", "sm_90a", "16 × 8192 → 512"),
        lambda m: fused_cluster_sm90.check_fused(m, 16, 512, 8192, HALF, dtype=HALF, parts=2),
    ),
    ("gemm_mma_sm75", "sm_75", "64 × 2048 → 64", lambda m: mma_sm75.check_mma(m, 64, 64, 2048, HALF)),
    *(
        ("gemm_mma_sm80", "sm_80", f"{r} × 4096 → {c}", lambda m, t=(r, c): mma_sm80.check_mma(m, *t, 4096, HALF, t))
        for r, c in mma_sm80.THREADS
    ),
    ("gemm_mma_int8_sm80", "sm_120", "64 × 2048 → 64", lambda m: mma_sm80.check_mma(m, 64, 64, 2048, HALF, (64, 64))),
    ("gemm_popc", "sm_80", "64 × 2048 → 64 bits", lambda m: check_popc(m, 64, 64, 2048, BITS)),
    ("gemm_skinny", "sm_80", "1 × 8192 → 64 bits", lambda m: skinny.check_skinny(m, 1, 64, 8192, BITS)),
    ("gemm_skinny", "sm_80", "16 × 8192 → 64 bits", lambda m: skinny.check_skinny(m, 16, 64, 8192, BITS)),
    (
        *("gemm_skinny_mma_sm80", "sm_80", "16 × 8192 → 64 bits"),
        lambda m: skinny_mma_sm80.check_skinny(m, 16, 64, 8192, BITS),
    ),
    ("gemm_mma_sm75", "sm_75", "64 × 2048 → 64 bits", lambda m: mma_sm75.check_mma(m, 64, 64, 2048, BITS)),
    (
        *("gemm_mma_sm80", "sm_80", "128 × 4096 → 128 bits"),
        lambda m: mma_sm80.check_mma(m, 128, 128, 4096, BITS, (128, 128)),
    ),
]


def row(name: str, target: str, what: str, check: Callable[[Module], Report]) -> list[object]:
    """Return a line of the table; the launch also checks the result."""
    report = check(module(f"{name}.cu", target))
    excess = ", ".join(f"{source}: {count}" for source, count in report.excess_sectors_by_source().items())
    counts = report.warp_instructions, report.bank_conflicts, report.sectors, report.sectors_needed
    return [name, target, what, *counts, excess]


if __name__ == "__main__":
    headers = ["kernel", "target", "work", "instructions", "bank conflicts", "sectors", "needed", "where"]
    print(tabulate([row(*each) for each in ROWS], headers=headers))
