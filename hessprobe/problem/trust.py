"""Which ways to differentiate a model have been found right, so that each is tried once."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Trust:
    """What was found, once for a model, of the ways to differentiate it; None where not tried yet.

    Attributes:
        forward_mode: whether tangents are the transpose of backward passes.
        second: whether second derivatives by forward mode are symmetric.
    """

    forward_mode: bool | None = None
    second: bool | None = None
