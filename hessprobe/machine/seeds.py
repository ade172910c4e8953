"""Where random numbers come from: a generator is a function of a run's seed, of what it is for, and of the step.

A draw then depends on nothing that ran before it, so that a resumed run, another order of instruments or another machine
has the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def key_of(*parts: object, size: int = 8) -> int:
    """Returns a number of `size` bytes that depends on the parts' text alone, such as (seed, purpose, step)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:size], "little")


def generator_of(*parts: object, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns a generator on the device that depends on the parts alone."""
    import torch  # which a corpus can be opened without

    return torch.Generator(device).manual_seed(key_of(*parts) >> 1)  # torch takes 63 bits


def trial_vectors(device: torch.device) -> Callable[[Tensor], Tensor]:
    """Returns what makes standard normal numbers like a tensor, always the same: for checks, whose draws nobody keeps.

    They are drawn on a GPU where the device is one, and differ from a CPU's.
    """
    import torch

    place = device if device.type == "cuda" else torch.device("cpu")
    generator = torch.Generator(place).manual_seed(0)

    def drawn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64, device=place).to(like)

    return drawn
