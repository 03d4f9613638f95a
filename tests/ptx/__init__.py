"""A PTX interpreter: runs what nvcc emits, on machines without a GPU, and stops at what a GPU would let pass."""
