"""Benchmarks of the layers against nn.Linear and other libraries: ``python -m benchmarks``."""
