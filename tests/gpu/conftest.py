"""Each test here runs on the CPU, and once more, marked gpu, on CUDA: one promise on both."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Returns the device that the test is to run on."""
    return torch.device(request.param)
