"""Where random numbers come from: a generator is a function of a run's seed, of what it is for, and of the step.

A draw then depends on nothing that ran before it, so that a resumed run, another order of instruments or another machine
has the same numbers.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def key_of(*parts: object, size: int = 8) -> int:
    """Returns a number of `size` bytes that depends on the parts' text alone, such as (seed, purpose, step)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:size], "little")


def generator_of(*parts: object, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns a generator on the device that depends on the parts alone."""
    import torch  # which a corpus can be opened without

    return torch.Generator(device).manual_seed(key_of(*parts) >> 1)  # torch takes 63 bits
