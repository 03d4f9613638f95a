"""An interpreter of PTX, which runs CUDA kernels without a GPU and reports what a GPU would let pass in silence."""
