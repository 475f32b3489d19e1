"""CUDA kernels of the GPU executor: sources in CUDA C++ and their Python launchers.

Sources are text (sources/*.cu), compiled by NVRTC for the GPU at hand and cached on disk; CuPy
loads and launches them. Device memory belongs to the caller: launchers take torch tensors, or
anything with the same few attributes, and the caller's stream. Needs no torch, and without a GPU
everything but loading and launching works.

    python -m cupy_kernels.prebuild    compile what a model needs, GPU or not
"""
