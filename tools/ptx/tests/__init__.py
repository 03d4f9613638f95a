"""The interpreter's own tests: instructions, memory, detectors, mutants and textbook kernels."""
