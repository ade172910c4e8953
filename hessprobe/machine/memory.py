"""What running out of memory looks like, on any device: one test for everyone who then tries again with less."""

from __future__ import annotations

import torch

# The CPU's allocator and CUDA's libraries raise a plain RuntimeError, known by its words alone.
_SIGNS = ("can't allocate memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether an exception says that an allocation failed, on a GPU or in main memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
