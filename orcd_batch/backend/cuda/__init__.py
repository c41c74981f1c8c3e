"""The CUDA backend: our own kernels compiled at run time, matrix products through cuBLASLt.

Nothing here is imported before a GPU is asked for: `from orcd_batch.backend.cuda.ops import
CudaOps`.
"""
