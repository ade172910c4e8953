"""tr G and its blocks' traces, row after row, from layer kernels: better known than from the probes that R shares with it.

The kernels' sketches are independent from sequence to sequence, where a probe meets the whole batch at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hessprobe.curvature.cost import layer_kernels as layer_kernels_cost
from hessprobe.errors import RunFailed
from hessprobe.estimation.sampling import Estimate
from hessprobe.instruments.gn_hessian.table import ROUNDS
from hessprobe.instruments.snapshot import Snapshot
from hessprobe.kernels.layer_kernels import LayerKernels, layer_kernels
from hessprobe.kernels.plan import Plan
from hessprobe.kernels.verification import verified_plan
from hessprobe.machine.processes import together

COST = layer_kernels_cost(ROUNDS)
# Traces need no pairs of sequences, so only as many tokens go together as fill the device (however many processes share
# them: the signs must not depend on that): nothing is held for long, and Gram matrices stay small.
TOKENS_TOGETHER = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True, kw_only=True)
class KernelTraces:
    """What the batch's own G has on its diagonal, errors over sampled cotangents.

    Attributes:
        whole: tr G ().
        blocks: tr G_ii (l,).
        gradients: what it cost, in gradients of the batch.
    """

    whole: Estimate
    blocks: Estimate
    gradients: float

    def of_block(self, i: int) -> Estimate:
        """Returns tr G_ii () of the i-th block."""
        return Estimate(mean=self.blocks.mean[i], stderr=self.blocks.stderr[i], samples=self.blocks.samples)


class TraceKernels:
    """Measures traces of G; the plan of one model is verified once and kept.

    Args:
        memory: bytes, as for `layer_kernels`.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self._plan: Plan | None = None
        self._division = 1
        self._refused = False

    def measure(self, snapshot: Snapshot, generator: torch.Generator) -> KernelTraces | None:
        """Returns the traces, or None where kernels refuse: a loss without a known root, a model that breaks in them.

        They are not asked again then. Cost: COST, and about 2 gradients for the plan, once.
        """
        if self._refused:
            return None
        try:
            return self._measured(snapshot, generator)
        except RunFailed:  # another process is gone: nothing can go on
            raise
        except (ValueError, RuntimeError, NotImplementedError, LookupError, TypeError, MemoryError):
            self._refused = True
            return None

    @together(lambda _, snapshot, __: snapshot.objective.processes)
    def _measured(self, snapshot: Snapshot, generator: torch.Generator) -> KernelTraces:
        objective, batches, found = snapshot.objective, snapshot.micro_batches, []
        if self._plan is None:
            self._plan = verified_plan(objective, batches, snapshot.partition, snapshot.parameters)
        together = TOKENS_TOGETHER.get(snapshot.parameters.device.type, TOKENS_TOGETHER["cuda"])
        for batch, (count, positions) in zip(batches, batches.shapes, strict=True):
            pieces = batches.parted(objective.split(batch, math.ceil(count / max(1, together // positions))))
            read = [i for i, tokens in enumerate(pieces.sequence_weights) if tokens.any()]
            for piece in (pieces[i : i + 1] for i in read):
                kernels = layer_kernels(
                    objective,
                    piece,
                    snapshot.partition,
                    rounds=ROUNDS,
                    generator=generator,
                    # Bounded, where labels drawn from confident predictions are now and then far out.
                    cotangent="sign",
                    parameters=snapshot.parameters,
                    plan=self._plan,
                    memory=self.memory,
                    division=self._division,
                )
                self._division = kernels.division
                found.append(kernels)
        sequences = sum(len(kernels.tokens) for kernels in found)
        return KernelTraces(
            whole=_joined(found, whole=True),
            blocks=_joined(found, whole=False),
            gradients=sum(kernels.gradients * len(kernels.tokens) / sequences for kernels in found),
        )


def _joined(found: list[LayerKernels], *, whole: bool) -> Estimate:
    """Returns the traces of all pieces of a batch, weighted by their tokens."""
    each = [kernels.trace("batch", whole=whole) for kernels in found]
    tokens = torch.stack([kernels.tokens.double().sum() for kernels in found])
    share = tokens / tokens.sum()
    means, errors = (torch.stack([getattr(e, name) for e in each]) for name in ("mean", "stderr"))
    return Estimate(
        mean=torch.tensordot(share, means, 1),
        stderr=torch.tensordot(share.square(), errors.square(), 1).sqrt(),
        samples=sum(e.samples for e in each),
    )
