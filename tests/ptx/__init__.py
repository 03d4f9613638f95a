"""The CUDA kernels of csrc/cuda, run by the PTX interpreter of tools/ptx and compared with a reference."""
