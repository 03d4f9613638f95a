"""The products that a process captures in its first calls; test_heuristics.py sees that they cover 9.0's kernels."""

PRODUCTS = [
    (1, 70, 300, "float32"),
    (9, 70, 300, "float32"),
    (40, 70, 300, "float32"),
    (9, 70, 4096, "bfloat16"),  # on 9.0 a cluster packs it
    (200, 8600, 300, "float32"),  # mma_sm80 by a tile of more than 48 KiB, on 8.0 to 9.0
    (300, 8600, 300, "float32"),  # wgmma_sm90a
]
"""m, n, k and x's dtype. Each is computed from real x, with weights that have a form, and from words, without."""
