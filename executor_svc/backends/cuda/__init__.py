"""The executor on an NVIDIA GPU: torch for matrix products, cupy_kernels for everything else."""
