"""Compile the textbook kernels again: `python -m tools.ptx.regenerate`.

Their PTX is kept beside them, so that the tests run without nvcc.
"""

from __future__ import annotations

import re
from pathlib import Path

from .machine import compile_ptx

KERNELS = Path(__file__).parent / "kernels"
ARCHS = {"pipeline": "sm_90a", "cluster_sum": "sm_90a"}  # the others are for sm_80


def normalised(ptx: str) -> str:
    """Return PTX without what depends on the directory or nvcc's build: header comments, directories, debug strings."""
    ptx = re.sub(r"\t\.section\t\.debug_str\n\t\{.*?\n\t\}\n?", "", ptx, flags=re.DOTALL)
    ptx = re.sub(r'(\.file\t\d+ ")[^"]*/', r"\1", ptx)
    return "\n".join(line.rstrip() for line in ptx.splitlines() if not line.startswith("//")).strip() + "\n"


def generate(source: Path) -> str:
    return normalised(compile_ptx(source, ARCHS.get(source.stem, "sm_80")))


if __name__ == "__main__":
    for source in sorted(KERNELS.glob("*.cu")):
        source.with_suffix(".ptx").write_text(generate(source))
        print(source.with_suffix(".ptx"))
