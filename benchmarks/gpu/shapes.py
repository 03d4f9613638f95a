"""The products that are timed on a GPU."""

from __future__ import annotations

from ..measuring import Shape

LARGE, MEDIUM = Shape(m=8192, k=8192, n=8192), Shape(m=4096, k=4096, n=4096)
ROW, ROWS = Shape(m=1, k=8192, n=8192), Shape(m=16, k=8192, n=8192)
NARROW = Shape(m=256, k=1024, n=1024)
BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 512]
# (k, n). The kernels split the third one over k, and no row of the last one is aligned.
WEIGHTS = [(8192, 8192), (4096, 4096), (65536, 256), (4097, 4096)]
FEW = [Shape(m, k, n) for k, n in WEIGHTS[:2] for m in BATCHES if m <= 16]
"""The products of few rows whose latency has a target."""

# The shapes of the targets come first, because those at the end are left out if the time runs out.
SHAPES = list(dict.fromkeys([LARGE, MEDIUM, ROW, NARROW, *FEW, *(Shape(m, k, n) for k, n in WEIGHTS for m in BATCHES)]))
