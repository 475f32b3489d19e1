"""The CPU backend: oneDNN matrix products, numba kernels for everything else."""
