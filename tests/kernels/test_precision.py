"""Models in half precision: fast paths stand up to their verification, and kernels lie within a stated error."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from hessprobe.kernels.layer_kernels import LayerKernels, layer_kernels
from hessprobe.kernels.plan import ONE_SEQUENCE
from hessprobe.kernels.verification import verified_plan
from hessprobe.models.transformer import Decoder, DecoderConfig
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from tests.kernels.stream_settings import Outside, text
from tests.models import redraw, seeded

# Of the kernels' norm by parameter, of the trace, and of the coupling itself, as `layer_kernels` states them.
ERRORS = {torch.bfloat16: (0.02, 0.005, 0.02), torch.float16: (0.003, 0.001, 0.003)}


@cache
def decoder(tied: bool) -> Decoder:
    """Returns a decoder wide and long enough for sums in half precision to matter."""
    config = DecoderConfig(
        layers=2, width=64, feedforward=128, heads=4, vocabulary=128, context=64, tied=tied
    )
    return Decoder(config, generator=seeded(0))


def batch() -> tuple[Tensor, Tensor]:
    x = torch.randint(128, (8, 65), generator=seeded(2))
    return x[:, :-1].contiguous(), x[:, 1:].contiguous()


def measured(model: nn.Module) -> LayerKernels:
    # Signs: a sampled label may fall on another class where the logits are a little different.
    return layer_kernels(
        Objective(model),
        batch(),
        Partition.of(model, "parameter"),
        rounds=2,
        generator=seeded(1),
        cotangent="sign",
    )


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model_in_half_precision_keeps_its_fast_paths_and_its_kernels(tied, dtype):
    """Beside the same rounded weights in float32: the embedding alone, shared with the head, goes by sequence."""
    model = copy.deepcopy(decoder(tied)).to(dtype)
    coarse, fine = measured(model), measured(copy.deepcopy(model).float())
    assert coarse.kernel.dtype == torch.float64
    slow = {name for name, way in coarse.routes.items() if way == ONE_SEQUENCE}
    assert slow == ({"embedding.weight"} if tied else set()) and coarse.routes == fine.routes
    gap = (coarse.kernel - fine.kernel).flatten(1).norm(dim=1) / fine.kernel.flatten(1).norm(dim=1)
    trace = (coarse.trace().mean - fine.trace().mean).abs() / fine.trace().mean
    coupling = (coarse.coupling().mean - fine.coupling().mean).abs()
    found = (float(gap.max()), float(trace.max()), float(coupling.max()))
    assert all(error < allowed for error, allowed in zip(found, ERRORS[dtype], strict=True)), found
    assert found[0] > torch.finfo(dtype).eps / 30, "so small that nothing was rounded"


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
def test_a_path_that_is_wrong_is_found_out_in_half_precision_too(dtype):
    model = redraw(Outside(), seeded(1)).to(dtype)
    partition = Partition.of(model, "parameter")
    plan = verified_plan(Objective(model), text((3, 4))[0], partition)
    assert set(plan.fallback) == {"body.weight", "body.bias"} and plan.how == ONE_SEQUENCE
