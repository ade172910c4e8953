"""What is asked of each architecture, one line a check: "ok", "refused: ..." or what went wrong.

The oracle is the model's own loss and torch.autograd alone, double backward in float64: H v differentiates <gradient, v>,
and G v = J^T (d2 loss / d logits2) J v with J v by differentiating J^T u in u. Nothing of the package is in it.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import hessprobe as hp
from hessprobe.errors import UserError
from tests.architectures.building import Architecture, built

CHECKS = ("built", "partition", "loss", "gauss_newton", "hessian", "kernels", "unchanged")
TOLERANCE = 1e-8


class _Doubled(TorchFunctionMode):
    """Takes float32 for float64: norms, routers and losses cast to it, and that rounding is above the tolerance."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        more = {key: torch.float64 if x is torch.float32 else x for key, x in (kwargs or {}).items()}
        return func(*args, **more)


class _PlainWeightNorm(TorchFunctionMode):
    """Writes weight norm in plain operations: double backward through torch 2.13's fused one is wrong (1e-3 of H v)."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch._weight_norm:
            v, g, dim = args
            others = [d for d in range(v.dim()) if d != dim % v.dim()]
            return v * (g / v.square().sum(others, keepdim=True).sqrt())
        return func(*args, **(kwargs or {}))


def double_throughout(model: nn.Module) -> None:
    """Keeps the model's values in float64 where its own forward pass casts them to float32; nothing outside of it."""
    entered: list[_Doubled] = []

    def enter(*_: Any) -> None:
        torch.set_default_dtype(torch.float64)
        entered.append(_Doubled())
        entered[-1].__enter__()

    def leave(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)
        torch.set_default_dtype(torch.float32)

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)


def checked(architecture: Architecture, *, curvature: bool = True) -> dict[str, str]:
    """Returns each check's outcome; a model that cannot be built, or gives no loss of its own, has the first alone."""
    # Two towers' own loss contrasts the batch's examples: no sum over sequences, so nothing to measure layer by layer.
    curvature = curvature and architecture.kind != "two towers"
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    try:
        model, batch = built(architecture, generator)
        if curvature:
            double_throughout(model)
            _shaken(model, generator)
            own, logits = _own(model, batch)
            if not bool(torch.isfinite(own)):
                return {"built": f"its own loss is {float(own)}"}
    except Exception as failure:
        return {"built": _said(failure)}
    found = {"built": "ok"}
    before = [id(p) for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found["partition"] = _tried(lambda: recognised(model))
        if curvature:
            partition = hp.Partition.of(model)
            objective = hp.Objective(model)
            v = torch.randn(partition.size, generator=generator, dtype=torch.float64)
            found["loss"] = _tried(lambda: _close(objective.loss(batch).detach(), own.detach()))
            try:
                truth = _products(own, logits, model, partition, v)
            except Exception as failure:
                return {"built": f"no double backward: {_said(failure)}"}
            for name, operator in (("gauss_newton", hp.GaussNewton), ("hessian", hp.Hessian)):
                wanted = truth[name]
                found[name] = _tried(
                    lambda operator=operator, wanted=wanted: _close(
                        operator(objective, batch, partition).apply(v[None])[0], wanted
                    )
                )
            found["kernels"] = _tried(lambda: _kernels(objective, batch, partition))
    same = before == [id(p) for p in model.parameters()]
    return {**found, "unchanged": "ok" if same else "the model's parameters are other objects than before"}


def recognised(model: nn.Module) -> str:
    """Returns "ok" where embedding, blocks and head are there and nothing had to be said, else what is missing."""
    partition = hp.Partition.of(model)
    if partition.notes:
        return partition.notes[0]
    names = set(partition.blocks)
    if not any("block." in name for name in names):
        return f"no blocks among {', '.join(names)}"
    # Some image models' stages begin with patch embeddings of their own (CvT, Segformer).
    embeds = "embedding" in names or any("embed" in name for name in partition.names)
    if "embedding+head" not in names and not (embeds and "head" in names):
        return f"no embedding or no head among {', '.join(names)}"
    return "ok"


def _own(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Returns the model's own mean loss on a batch and the logits it depends on, with their graph."""
    batch = {**batch, "labels": batch["labels"].clone()} if isinstance(batch, Mapping) else batch
    model.train().eval()  # drops what some keep between passes in evaluation (LeViT's attention biases, with their graph)
    with sdpa_kernel(SDPBackend.MATH), _PlainWeightNorm():
        if not isinstance(batch, Mapping):
            logits = model(batch[0])
            return nn.functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten()), logits
        more = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
        out = model(**batch, **more)
    model.train().eval()
    return out.loss, out.logits


def _shaken(model: nn.Module, generator: torch.Generator) -> None:
    """Moves every parameter a little: weights that start at zero would hide whole paths."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def _products(
    loss: Tensor, logits: Tensor, model: nn.Module, partition: hp.Partition, v: Tensor
) -> dict[str, Tensor]:
    """Returns G v and H v (p,), by double backward through the model's own loss."""
    named = dict(model.named_parameters())
    leaves = [named[name] for name in partition.names]
    pieces = [x.view_as(p) for x, p in zip(v.split([p.numel() for p in leaves]), leaves, strict=True)]

    def flat(grads: tuple[Tensor | None, ...]) -> Tensor:
        return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1)
                          for g, p in zip(grads, leaves, strict=True)])  # fmt: skip

    def pulled(outputs: Tensor, inputs: Any, cotangent: Tensor | None = None, again: bool = True) -> Any:
        return torch.autograd.grad(
            outputs, inputs, cotangent, create_graph=again, retain_graph=True, allow_unused=True
        )

    def along(grads: tuple[Tensor | None, ...]) -> Tensor:
        return sum((g * x).sum() for g, x in zip(grads, pieces, strict=True) if g is not None)  # type: ignore[return-value]

    hessian = flat(pulled(along(pulled(loss, leaves)), leaves, again=False))
    dual = torch.zeros_like(logits, requires_grad=True)
    moved = pulled(along(pulled(logits, leaves, dual)), dual, again=False)[0]  # J v
    slope = pulled(loss, logits)[0]
    if slope is None:  # the loss is none of these logits: G of what is measured in its place would be another
        return {"gauss_newton": torch.full_like(hessian, torch.nan), "hessian": hessian}
    curved = pulled(slope, logits, moved, again=False)[0]
    return {"gauss_newton": flat(pulled(logits, leaves, curved, again=False)), "hessian": hessian}


def _kernels(objective: hp.Objective, batch: Any, partition: hp.Partition) -> str:
    """Compares every diagonal entry's sum with the squared norms of the sequences' own gradients, block by block."""
    kernels = hp.layer_kernels(
        objective,
        batch,
        partition,
        rounds=1,
        cotangent="empirical",
        generator=torch.Generator().manual_seed(1),
    )
    own = torch.diagonal(kernels.kernel, dim1=-2, dim2=-1)
    wanted = torch.zeros_like(own)
    named = dict(objective.model.named_parameters())
    for column, sequence in enumerate(kernels.sequence.tolist()):
        loss = _own(objective.model, _only(batch, sequence))[0]
        grads = torch.autograd.grad(loss, [named[name] for name in partition.names], allow_unused=True)
        squares = [0.0 if g is None else float(g.square().sum()) for g in grads]
        by_name = dict(zip(partition.names, squares, strict=True))
        for row, block in enumerate(partition.blocks):
            total = sum(by_name[name] for name in partition.parameters_of(block))
            wanted[row, column] = total * float(kernels.tokens[sequence])
    return _close(own, wanted)


def _only(batch: Any, sequence: int) -> Any:
    """Returns the batch with targets in one sequence alone: its mean loss, by the model itself."""
    labels = batch["labels"] if isinstance(batch, Mapping) else batch[1]
    kept = torch.full_like(labels, -100)
    kept[sequence] = labels[sequence]
    return {**batch, "labels": kept} if isinstance(batch, Mapping) else (batch[0], kept)


def _close(got: Tensor, wanted: Tensor) -> str:
    scale = float(wanted.abs().max())
    gap = float((got.double() - wanted).abs().max()) / (scale or 1.0)
    return "ok" if gap <= TOLERANCE else f"off by {gap:.1e} of the largest entry ({scale:.1e})"


def _tried(check: Callable[[], str]) -> str:
    try:
        return check()
    except UserError as refusal:
        return f"refused: {refusal}"
    except Exception as failure:
        return _said(failure)


def _said(failure: Exception) -> str:
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
