"""What can be measured where a process holds shards of the parameters, and what is said of the rest."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from hessprobe.errors import UserError
from hessprobe.instruments.snapshot import Probe

_ELSE = "record under DistributedDataParallel, or measure a checkpoint (hessprobe probe)"


def check_whole(model: nn.Module, probes: Iterable[Probe]) -> None:
    """Raises where a parameter is a shard and a probe needs more than backward passes of the model as it is wrapped.

    Raises:
        UserError: FSDP2's parameters, which have placements, and a probe other than cross_layer by layer kernels; or
            FSDP1's, which are flattened into one, whatever the probe.
    """
    flat = [name for name, _ in model.named_parameters() if name.endswith("_flat_param")]
    if flat:
        raise UserError(
            f"FullyShardedDataParallel has flattened the parameters ({flat[0]!r}), so layers cannot be told apart: "
            f"shard with fully_shard instead, {_ELSE}"
        )
    shards = [name for name, p in model.named_parameters() if hasattr(p, "placements")]
    refused = [probe.name for probe in probes if not probe.works_sharded]
    if not shards or not refused:
        return
    sharded = f"parameters are sharded over devices ({len(shards):,} of them, such as {shards[0]!r})"
    raise UserError(
        f"{sharded}, which have neither a forward mode nor second derivatives, and {_and(refused)} cannot do without: "
        f"record cross_layer from layer kernels alone, whose backward passes can, or {_ELSE}"
    )


def _and(names: list[str]) -> str:
    return " and ".join(names)
