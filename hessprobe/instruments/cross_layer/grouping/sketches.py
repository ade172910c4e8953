"""One row of the stored layer kernels as plain arrays: all that damped solves of any grouping of blocks need."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from hessprobe.errors import UserError


@dataclass(frozen=True, kw_only=True, eq=False)
class Sketches:
    """What the layer kernels of one batch know: l blocks, m sketches of b sequences, and the gradient g.

    Attributes:
        blocks: names (l,).
        kernel: <w^m_i, w^m'_i> (l, m, m).
        alignment: <w^m_i, g_i> (l, m).
        norm2: |g_i|^2 (l,).
        sequence, round: (m,) which sequence and which round a sketch belongs to.
        tokens: (b,) tokens with a target; sequences weigh by them.

    Raises:
        UserError: shapes that do not belong together, numbers that are not finite, fewer than 4 sequences, fewer than
            2 rounds, or sequences with different rounds.
    """

    blocks: tuple[str, ...]
    kernel: np.ndarray
    alignment: np.ndarray
    norm2: np.ndarray
    sequence: np.ndarray
    round: np.ndarray
    tokens: np.ndarray

    def __post_init__(self) -> None:
        layers, m, count = len(self.blocks), len(self.sequence), len(self.tokens)
        wanted = {"kernel": (layers, m, m), "alignment": (layers, m), "norm2": (layers,), "round": (m,)}
        for name, shape in wanted.items():
            got = getattr(self, name).shape
            if got != shape:
                raise UserError(
                    f"Sketches: wanted {name} {shape} for {layers} blocks and {m} sketches, got {got}"
                )
        if not all(np.isfinite(each).all() for each in (self.kernel, self.alignment, self.norm2)):
            raise UserError(
                "the layer kernels of this row are not finite; measure at a step whose gradients are"
            )
        if count < 4:
            raise UserError(
                f"{count} sequences: cross-fitting with an error needs two in each half; measure with 4 or more"
            )
        rounds = len(np.unique(self.round))
        cells = np.unique(np.stack([self.sequence, self.round]), axis=1).shape[1]
        if m != count * rounds or cells != m:
            raise UserError(
                f"Sketches: wanted each of {count} sequences in each of {rounds} rounds, got {m} sketches"
            )
        if rounds < 2:
            raise UserError(
                "rounds 1: a grouping needs two independent solves, so at least 2 rounds, better 4; "
                "record with --set cross_layer.rounds=4"
            )

    @property
    def rounds(self) -> int:
        """Sketches per sequence."""
        return len(self.sequence) // len(self.tokens)


def sketches_of(row: xr.Dataset) -> Sketches:
    """Returns what one row of the `cross_layer` table (no step dimension) knows, with the batch gradient as g.

    Sketches that the row did not take (it may take more rounds than another) are NaN in the table, and left out.

    Raises:
        UserError: as `Sketches`, or the stored kernels cannot be read.
    """
    taken = np.flatnonzero(np.isfinite(row["sequence_tokens"].values))
    sequence = np.asarray(row.attrs["sketch_sequence"])[taken]
    tokens = np.zeros(sequence.max(initial=-1) + 1)
    tokens[sequence] = row["sequence_tokens"].values[taken]
    try:
        kernel = row["kernel"].values[:, taken][:, :, taken].astype(np.float64)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"the layer kernels of this row are damaged ({error}); copy the run again from where it was recorded"
        ) from error
    return Sketches(
        blocks=tuple(str(name) for name in row["block"].values),
        kernel=(kernel + kernel.swapaxes(1, 2)) / 2,
        alignment=-row["alignment"].sel(direction="negative_gradient").values[:, taken],
        norm2=row["gradient_norm2"].values,
        sequence=sequence,
        round=np.asarray(row.attrs["sketch_round"])[taken],
        tokens=tokens,
    )
