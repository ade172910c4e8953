"""What the recorder asks of a distributed run: that one process writes, and that it holds whole parameters."""

from __future__ import annotations

import torch
from torch import nn

from hessprobe.errors import UserError


def is_follower() -> bool:
    """Tells whether another process of a distributed run does the writing."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_rank() > 0


def check_whole(model: nn.Module) -> None:
    """Raises where a parameter is a shard.

    Raises:
        UserError: FSDP2's parameters, which have placements, or FSDP1's, which are flattened into one.
    """
    names = [n for n, p in model.named_parameters() if hasattr(p, "placements") or n.endswith("_flat_param")]
    if names:
        raise UserError(
            f"parameters are sharded over devices ({len(names):,} of them, such as {names[0]!r}), and the recorder reads "
            "them as one vector: record under DistributedDataParallel, or from a checkpoint"
        )
