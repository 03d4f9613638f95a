"""Times the CUDA kernels on this machine's GPU against what torch has: ``python -m benchmarks gpu``.

First the parts that bound the kernels are measured alone: the tensor cores' instructions for bits, and bytes from L2.

Times are medians over many replays of CUDA graphs, between two CUDA events. Each contestant is timed in up to three
modes, all of them in one process:

cold   A replay is one call, after a flush of the L2 cache. The time includes the start of the graph, not the flush.
warm   A replay is many calls on the same data.
chain  A replay is a series of calls whose weights all differ and together exceed the L2 cache, like layers in a model.

The exact results of all kernels and tiles are compared with each other, and a sample of them with NumPy's, before a
product is timed. From 256 rows on, each tile of a kernel is a contestant. No contestant has a bias, and results are
bf16 unless a name says int32. PackedQLinear passes no prepared weights to the operators on CUDA; our other
contestants do. Missing peers are listed; failures are reported at the end and make the exit code 1.
"""
