"""Torch's operations while a model is measured: the derivatives that a backward pass gives, in forward mode too.

Autograd stops where forward mode goes on: at an embedding's padding row, under `no_grad()`, at `.data`. Inside `exact_rules`
forward mode stops there as well, embeddings have dense gradients and are not renormalised in place, autocast that the
model switches on itself stays off, and gelu and silu differentiate twice in closed form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hessprobe.problem.activations import GELU, SILU

Rule = Callable[..., Any]
_autocast_is_on = torch.is_autocast_enabled
# Within it no rule looks on: for what is not the model's, since a mode sees every attribute of a tensor that is read.
without_rules = torch._C.DisableTorchFunction


class exact_rules(TorchFunctionMode):
    """Within it, torch's operations are as described above.

    Args:
        device: type of the model's device.
        forward_mode: whether tangents are to stop where gradients do.
        autocast: whether autocast is wanted; else it is switched off wherever the model switches it on.
    """

    def __init__(self, device: str, *, forward_mode: bool = True, autocast: bool = False) -> None:
        super().__init__()
        self.device, self.autocast = device, autocast
        self.rules = _BOTH_MODES if forward_mode else _REVERSE

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not self.autocast and _autocast_is_on(self.device):
            # The caller's autocast puts back, when it ends, what was before it began.
            torch.set_autocast_enabled(self.device, False)
        rule = self.rules.get(func, func)
        return rule(*args, **kwargs) if kwargs else rule(*args)


def _gelu(input: Tensor, *, approximate: str = "none") -> Any:
    return GELU[approximate].apply(input)


def _silu(input: Tensor, inplace: bool = False) -> Any:
    return F.silu(input, inplace=True) if inplace else SILU.apply(input)


def _set_grad_enabled(mode: bool) -> None:
    """Forward mode stops where the model switches gradients off."""
    torch._C._set_grad_enabled(mode)
    torch._C._set_fwd_grad_enabled(mode)


def _data(tensor: Tensor) -> Tensor:
    return tensor.detach().data


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """F.embedding as its own backward pass has it; `sparse` says only how a gradient is stored."""
    if max_norm is not None:
        weight = _renormalised(weight, max_norm, norm_type)
    found = F.embedding(input, weight)
    if scale_grad_by_freq:
        flat = input.reshape(-1)
        counts = torch.bincount(flat, minlength=weight.shape[0])[flat].view(*input.shape, 1)
        found = found.detach() + (found - found.detach()) / counts
    if padding_idx is not None:
        padding_idx %= weight.shape[0]
        found = torch.where((input == padding_idx).unsqueeze(-1), found.detach(), found)
    return found


def _renormalised(weight: Tensor, max_norm: float, norm_type: float) -> Tensor:
    """Returns the table with its rows' norms bounded as F.embedding would write it, for which gradients are taken."""
    rows = weight.detach()
    norms = torch.linalg.vector_norm(rows, norm_type, dim=1, keepdim=True)
    scale = torch.where(norms > max_norm, max_norm / (norms + 1e-7), torch.ones_like(norms))
    return weight + rows * (scale - 1)


def _reverse_embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if max_norm is not None:
        weight = _renormalised(weight, max_norm, norm_type)
    return F.embedding(input, weight, padding_idx, None, norm_type, scale_grad_by_freq, False)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """F.embedding_bag by plain lookups and sums, which have a forward mode."""
    if input.dim() == 2:
        bags, count = (
            torch.arange(len(input), device=input.device).repeat_interleave(input.shape[1]),
            len(input),
        )
    else:
        assert offsets is not None
        starts = offsets[:-1] if include_last_offset else offsets
        places, count = torch.arange(len(input), device=input.device), len(starts)
        bags = torch.searchsorted(starts.contiguous(), places.to(starts.dtype), right=True) - 1
    flat = input.reshape(-1)
    rows = _embedding(flat, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1, 1)
    kept = torch.ones_like(flat, dtype=torch.bool)
    if padding_idx is not None:
        kept = flat != padding_idx % weight.shape[0]
    rows, bags = rows[kept], bags[kept]
    if mode == "max":
        parts = [rows[bags == bag] for bag in range(count)]
        return torch.stack([
            part.max(0).values if len(part) else weight.new_zeros(weight.shape[1]) for part in parts
        ])  # fmt: skip
    sums = rows.new_zeros(count, weight.shape[1]).index_add(0, bags, rows)
    if mode == "sum":
        return sums
    sizes = torch.bincount(bags, minlength=count).clamp(min=1)
    return sums / sizes[:, None]


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """torch._weight_norm, whose kernel has no forward mode, by plain operations."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


# What backward passes need too: gradients as dense tensors, tables that are not written to.
_REVERSE: dict[Any, Rule] = {F.embedding: _reverse_embedding, F.embedding_bag: _embedding_bag}
_BOTH_MODES: dict[Any, Rule] = {
    F.gelu: _gelu,
    F.silu: _silu,
    torch._weight_norm: _weight_norm,  # pyright: ignore[reportPrivateImportUsage]
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
    torch._C._set_grad_enabled: _set_grad_enabled,
    Tensor.data.__get__: _data,  # pyright: ignore[reportAttributeAccessIssue]
}
