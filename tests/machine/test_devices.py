"""Numbers read together are those read one by one, and on a CPU nothing is copied, limited or rounded."""

from __future__ import annotations

import pytest
import torch

from hessprobe.machine.devices import free_memory, put_by, read, sent, uses_tf32, working_memory
from hessprobe.machine.seeds import trial_vectors
from tests.models import seeded

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_numbers_read_together_are_those_read_one_by_one(dtype):
    values = [x.square().sum() for x in torch.randn(5, 7, generator=seeded(0)).to(dtype).unbind()]
    assert read(values) == [float(value) for value in values]
    assert read(iter(())) == []


def test_on_a_cpu_tensors_stay_where_they_are():
    x = torch.ones(3)
    assert sent(x, CPU) is x and put_by(x) is x


def test_on_a_cpu_a_chunk_is_as_large_as_it_was_said_to_be():
    assert working_memory(CPU, 123) == 123 and free_memory(CPU) == float("inf")


def test_tf32_is_a_gpus_and_only_where_it_was_asked_for():
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        settings.fp32_precision = "tf32"
        assert uses_tf32(torch.device("cuda")) and not uses_tf32(CPU)
        settings.fp32_precision = "ieee"
        assert not uses_tf32(torch.device("cuda"))
    finally:
        settings.fp32_precision = before


def test_vectors_to_check_with_are_always_the_same_and_one_after_another():
    like = torch.empty(2, 3)
    first, again = trial_vectors(CPU), trial_vectors(CPU)
    found = first(like)
    assert torch.equal(found, again(like)) and not torch.equal(found, first(like))
    assert torch.equal(found, torch.randn(2, 3, generator=seeded(0), dtype=torch.float64).float())
