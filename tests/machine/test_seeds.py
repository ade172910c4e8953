"""A generator depends on its parts alone, and gives the numbers that runs recorded before were drawn with."""

from __future__ import annotations

import hashlib

import torch

from hessprobe.machine.seeds import generator_of, key_of


def test_the_key_is_sha256_of_the_parts_joined_by_strokes():
    digest = hashlib.sha256(b"7/cross_layer/30").digest()
    assert key_of(7, "cross_layer", 30) == int.from_bytes(digest[:8], "little")
    assert key_of(7, "cross_layer", 30, size=16) == int.from_bytes(digest[:16], "little")


def test_a_generator_draws_the_same_whatever_was_drawn_before():
    first = torch.rand(4, generator=generator_of(0, "labels", 3))
    torch.rand(9)
    assert torch.equal(first, torch.rand(4, generator=generator_of(0, "labels", 3)))
    for other in (generator_of(1, "labels", 3), generator_of(0, "signs", 3), generator_of(0, "labels", 4)):
        assert not torch.equal(first, torch.rand(4, generator=other))
    # The seed of logs that exist: another would not reproduce their numbers.
    assert generator_of(0, "labels", 3).initial_seed() == key_of(0, "labels", 3) >> 1
