"""CUDA kernels: a .cu file each, and a launcher of the same name beside it.

They know nothing of files, checkpoints or models. The arithmetic is defined in `qtool.formats`.
"""

OLDEST_COMPUTE_CAPABILITY = (7, 5)  # Turing
