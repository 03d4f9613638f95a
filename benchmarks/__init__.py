"""Speed of the layers, as ratios inside one process run: ``python -m benchmarks``."""
