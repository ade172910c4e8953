"""Running out of memory is told from other failures by type, or by the allocator's words."""

from __future__ import annotations

import pytest
import torch

from hessprobe.machine.memory import is_out_of_memory


def test_the_cpu_allocators_own_error_is_one():
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(failed.value)


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB."), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"), False),
        (ValueError("DefaultCPUAllocator: can't allocate memory"), False),
        (KeyError("memory"), False),
    ],
    ids=lambda x: type(x).__name__,
)
def test_others_are_told_apart(error, wanted):
    assert is_out_of_memory(error) is wanted
