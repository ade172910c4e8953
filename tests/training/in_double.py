"""hessprobe's command line with its decoders in float64.

Processes add sums up in other parts than one does, and in float32 the difference is as large as the processor's rounding
and the steps between make it: what is compared is computed in float64, where it stays far below any promise.
"""

from __future__ import annotations

from typing import Any

from hessprobe.cli import main as command_line
from hessprobe.models.transformer import Decoder
from hessprobe.training import builds as setup


def decoders_in_double() -> None:
    """Makes every run of this process train a decoder in float64, from the initial weights that float32 has."""

    def in_double(*words: Any, **named: Any) -> Decoder:
        return Decoder(*words, **named).double()

    setattr(setup, "Decoder", in_double)  # noqa: B010


if __name__ == "__main__":
    decoders_in_double()
    command_line()
