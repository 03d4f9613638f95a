"""Prints the seconds that torch's import takes, and those that the package's import adds.

``benchmarks.targets`` starts ``python -m benchmarks.import_process`` several times, because a process imports once.
"""

import time

start = time.perf_counter()

middle = time.perf_counter()

print(middle - start, time.perf_counter() - middle)
