"""What one finding holds: a sentence, the number it states with its error, and what that rests on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence with its number.

    Attributes:
        name: what it is about, the same in every run, so that runs can be compared.
        sentence: the finding in words, with value and error.
        value: the number stated; `stderr` its standard error, None where it is exact on its batch.
        basis: batch, damping, number of measured steps.
        steps: the training steps it rests on.
        headline: the number as written, for a short overview, with `label` saying what it is; empty for none.
        resolved: False where the number lies within two of its errors, and the sentence says so.
    """

    name: str
    sentence: str
    value: float
    stderr: float | None
    basis: str
    steps: tuple[int, ...]
    headline: str = ""
    label: str = ""
    resolved: bool = True
