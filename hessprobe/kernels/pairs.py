"""||G_ij||_F^2 from pairs of sketches, and from those that remain when one sequence or one round is left out.

For independent sketches m and m', E[K_i[m, m'] K_j[m, m']] = <G_b,ij , G_b',ij>: sums over pairs m != m' are unbiased,
and no pair of a sketch with itself is ever used. The jackknife: Quenouille 1956, Tukey 1958.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hessprobe.errors import UserError, unknown_name
from hessprobe.estimation.sampling import Estimate

QUANTITIES = ("population", "batch")


def pair_norms(
    quantity: str, kernel: Tensor, sequence: Tensor, of_round: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns fro2 (l, l) of all sketches, and with each unit left out (strata, units, l, l).

    What is random is what is left out: sequences for the population (one stratum), the rounds of each sequence
    for the batch (a stratum a sequence). With 2 rounds, leaving one out leaves no pair of a sequence with itself: such
    pairs are taken to change in proportion to those with other sequences, block by block. One sequence has no others: its
    only pair of 2 rounds is an estimate, and NaN is what is known of its error.

    Args:
        kernel: (l, m, m).
        sequence, of_round: (m,), every sequence in every round.
        tokens: (b,) by which sequences weigh.
    """
    if quantity not in QUANTITIES:
        raise unknown_name("quantity", quantity, QUANTITIES)
    count, rounds = len(tokens), int(of_round.max()) + 1
    if quantity == "population" and count < 2:
        raise UserError(
            f"{count} sequence: the population quantity needs pairs of different sequences, so at least 2; "
            "measure with a batch of more sequences, or take quantity='batch' with 3 rounds or more"
        )
    if quantity == "batch" and rounds < 2:
        raise UserError(
            "rounds 1: the batch quantity needs pairs of rounds of one sequence, so at least 2 rounds; use "
            "quantity='population', or more rounds"
        )
    order = torch.argsort(sequence * rounds + of_round)
    kernel, sequence = kernel[:, order][:, :, order], sequence[order]
    weights = sketch_weights(tokens, sequence)
    weights = weights[:, None] * weights
    same = sequence[:, None] == sequence

    def rows(pairs: Tensor) -> Tensor:  # (b, r, l, l): what each sketch's weighted pairs add
        found = torch.bmm((kernel * pairs).transpose(0, 1), kernel.permute(1, 2, 0))
        return found.view(count, rounds, *found.shape[1:])

    across = rows(weights.masked_fill(same, 0))
    if quantity == "population":
        share = tokens.double() / tokens.sum()
        scale = 1 - share.square().sum()
        scales = scale - 2 * share * (1 - share)
        if count == 2:
            raise UserError(
                "2 sequences: leaving one out leaves no pair, so there is no standard error; use 3 or more"
            )
        total = across.sum((0, 1))
        return total / scale, ((total - 2 * across.sum(1)) / scales[:, None, None])[None]
    within = rows((weights * (rounds / (rounds - 1))).masked_fill(~same, 0).fill_diagonal_(0))
    total = (across + within).sum((0, 1))
    # Without a round, the others' pairs count in its place.
    left_out = total - 2 * across + 2 * (across.sum(1, keepdim=True) - across) / (rounds - 1)
    if rounds > 2:
        own = within.sum(1, keepdim=True)
        left_out += (own - 2 * within) * (rounds / (rounds - 2)) - own
    elif count == 1:
        left_out = torch.full_like(left_out, torch.nan)
    else:
        # A sketch that is large in a pair with others is so in its own. Sums of squares, so neither is negative.
        others = across.sum((0, 1)).diagonal()
        growth = torch.where(others > 0, total.diagonal() / others, 1.0).sqrt()
        left_out = total + (left_out - total) * growth[:, None] * growth
    return total, left_out


def sketch_weights(tokens: Tensor, sequence: Tensor) -> Tensor:
    """Returns the weight of each of these sketches (m,) in G = sum_m weight_m w_m w_m^T."""
    own = tokens.double()[sequence]
    return own / own.sum()


def jackknife(whole: Tensor, left_out: Tensor) -> Estimate:
    """Returns value less its bias of order 1/units, and standard error, from leave-one-out values (strata, units, ...).

    Strata are independent, so their corrections and variances add. Where nothing is known without a unit (all NaN), the
    value stands as it is, and its error is NaN.
    """
    units = left_out.shape[1]
    mean = left_out.mean(1, keepdim=True)
    bias = (units - 1) * (mean[:, 0] - whole).sum(0)
    if left_out.isnan().all():
        bias = torch.zeros_like(whole)
    variance = (left_out - mean).square().sum((0, 1)) * (units - 1) / units
    samples = left_out.shape[0] * units
    return Estimate(mean=whole - bias, stderr=variance.sqrt(), samples=samples)


def freedom_of(left_out: Tensor) -> Tensor:
    """Returns Student's degrees of freedom of a jackknife's error, from its leave-one-out values (strata, units, ...).

    A variance of n values of kurtosis k has a relative variance of (k - 1) / n, as chi-square's with 2 n / (k - 1)
    degrees of freedom has (Welch, Satterthwaite). Half of that is returned: the kurtosis of few heavy-tailed values is
    far too small, and intervals made with all of it hold the truth less often than they say.
    """
    apart = left_out - left_out.mean(1, keepdim=True)
    n = left_out.shape[0] * left_out.shape[1]
    kurtosis = n * apart.pow(4).sum((0, 1)) / apart.square().sum((0, 1)).square()
    return (n / (kurtosis - 1)).nan_to_num(nan=n, posinf=n).clamp(1.5, n)
