"""Programs for developing this package, except the benchmarks."""
