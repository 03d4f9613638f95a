"""Prints the seconds that torch's import takes, and those that the package's import adds.

``benchmarks.targets`` starts ``python -m benchmarks.import_process`` several times, because a process imports once.
"""

import importlib
import time

start = time.perf_counter()
importlib.import_module("torch")
middle = time.perf_counter()
importlib.import_module("bitorch_qlinear")
print(middle - start, time.perf_counter() - middle)
