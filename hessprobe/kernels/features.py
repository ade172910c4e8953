"""Per-sequence gradients of one module's parameters, in pieces, from its inputs A and its outputs' gradients g.

A linear layer's is sum_t g_t a_t^T; a norm's sum_t g_t * xhat_t; an embedding's the sum of g_t over the places of
each token. A piece holds all sequences at once for a part of one parameter, so that its Gram matrix can be added and
the piece freed. Goodfellow 2015 (arXiv 1510.01799) for the linear case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight

from hessprobe.models.transformer import NORM_EPSILON, RMSNorm

PIECE = 2**23  # entries of a piece of all sketches: 32 MiB in float32


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A part of one parameter's per-sequence gradients.

    Attributes:
        rows: (b, q) per-sequence gradients of q of its entries.
        pick: takes the same q entries, in the same order, from any tensor of the parameter's shape.
    """

    rows: Tensor
    pick: Callable[[Tensor], Tensor]


Pieces = Iterator[Piece]


def _all(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1)


def bias(module: nn.Module, a: Tensor, g: Tensor, shared: object, width: int) -> Pieces:
    """What is added at every position: g (b, s, out)."""
    yield Piece(rows=g.sum(1), pick=_all)


def channel_bias(module: nn.Module, a: Tensor, g: Tensor, shared: object, width: int) -> Pieces:
    """A convolution's bias: g (b, out, *space)."""
    yield Piece(rows=g.flatten(2).sum(2), pick=_all)


def linear(module: nn.Module, a: Tensor, g: Tensor, shared: object, width: int) -> Pieces:
    """nn.Linear: a (b, s, in), g (b, s, out); weight rows in slices of at most `width` entries."""
    rows_at_once = max(1, width // a.shape[-1])
    for start in range(0, g.shape[-1], rows_at_once):
        part = slice(start, start + rows_at_once)
        rows = torch.bmm(g[..., part].mT, a).flatten(1)
        yield Piece(rows=rows, pick=lambda w, part=part: w[part].reshape(-1))


def transposed_linear(module: nn.Module, a: Tensor, g: Tensor, shared: object, width: int) -> Pieces:
    """Transformers' Conv1D, a linear layer with its weight (in, out)."""
    yield from linear(module, g, a, shared, width)


def embedding(module: nn.Embedding, a: Tensor, g: Tensor, shared: object, width: int) -> Pieces:
    """nn.Embedding by index: only rows of tokens that occur in the batch exist, `shared` lists them."""
    tokens = shared
    assert isinstance(tokens, Tensor)
    places = torch.searchsorted(tokens, a.squeeze(-1).contiguous())  # (b, s) into the tokens that occur
    if module.padding_idx is not None:
        g = g * (a != module.padding_idx)
    columns = max(1, width // len(tokens))
    for start in range(0, g.shape[-1], columns):
        part = g[..., start : start + columns]
        rows = part.new_zeros(part.shape[0], len(tokens), part.shape[-1])
        rows.scatter_add_(1, places[..., None].expand_as(part), part)
        stop = start + part.shape[-1]
        yield Piece(
            rows=rows.flatten(1),
            pick=lambda w, start=start, stop=stop: w[tokens.to(w.device), start:stop].reshape(-1),
        )


def layer_norm(module: nn.LayerNorm, a: Tensor, g: Tensor, shared: object, width: int) -> Pieces:
    """nn.LayerNorm over its last dimension."""
    normed = F.layer_norm(a, module.normalized_shape, eps=module.eps)
    yield Piece(rows=(g * normed).sum(1), pick=_all)


def rms_norm(module: nn.RMSNorm, a: Tensor, g: Tensor, shared: object, width: int) -> Pieces:
    """nn.RMSNorm over its last dimension."""
    eps = torch.finfo(a.dtype).eps if module.eps is None else module.eps
    yield Piece(rows=(g * _rms_normed(a, eps)).sum(1), pick=_all)


def own_rms_norm(module: RMSNorm, a: Tensor, g: Tensor, shared: object, width: int) -> Pieces:
    """The RMSNorm of hessprobe's decoder."""
    yield Piece(rows=(g * _rms_normed(a, NORM_EPSILON)).sum(1), pick=_all)


def foreign_rms_norm(module: nn.Module, a: Tensor, g: Tensor, shared: object, width: int) -> Pieces:
    """Another library's RMSNorm, scaled by w (Llama, Qwen) or 1 + w (Gemma): the same gradient."""
    yield Piece(rows=(g * _rms_normed(a, _foreign_epsilon(module) or 0.0)).sum(1), pick=_all)


def _foreign_epsilon(module: nn.Module) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found if isinstance(found, float) else None


def _rms_normed(a: Tensor, eps: float) -> Tensor:
    return a * torch.rsqrt(a.square().mean(-1, keepdim=True) + eps)


def convolution(module: nn.Conv1d | nn.Conv2d, a: Tensor, g: Tensor, shared: object, width: int) -> Pieces:
    """nn.Conv1d and nn.Conv2d: a (b, c, *space), g (b, out, *space'), through the weight's gradient per group."""
    b = a.shape[0]
    spread: Callable[..., Tensor] = conv1d_weight if isinstance(module, nn.Conv1d) else conv2d_weight
    # Sequences as channel groups of one convolution: its weight gradient holds theirs side by side.
    size = (b * module.out_channels, module.in_channels // module.groups, *module.kernel_size)
    weight = spread(
        a.reshape(1, -1, *a.shape[2:]),
        size,
        grad_output=g.reshape(1, -1, *g.shape[2:]),
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=b * module.groups,
    )
    yield Piece(rows=weight.reshape(b, -1), pick=_all)


@dataclass(frozen=True, kw_only=True)
class FastPath:
    """How one type of module gives its per-sequence gradients.

    Attributes:
        name: what a summary calls it.
        parameters: for each parameter of the module the function that gives its pieces: (module, inputs (b, ...),
            output gradients (b, ...), the tokens that occur where it is an embedding, entries of a piece) -> pieces.
        flat: whether positions between the sequence and the last dimension may be flattened into one.
        accepts: whether this module's settings are covered.
    """

    name: str
    parameters: Mapping[str, Callable[..., Pieces]]
    flat: bool = True
    accepts: Callable[[nn.Module], bool] = lambda module: True


def _one_dimension(module: nn.Module) -> bool:
    return len(module.normalized_shape) == 1  # pyright: ignore[reportArgumentType, reportCallIssue]


def _plain_embedding(module: nn.Module) -> bool:
    assert isinstance(module, nn.Embedding)
    return module.max_norm is None and not module.scale_grad_by_freq and not module.sparse


def _plain_convolution(module: nn.Module) -> bool:
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    return module.padding_mode == "zeros" and not isinstance(module.padding, str)


LINEAR = FastPath(name="linear", parameters={"weight": linear, "bias": bias})
FOREIGN_RMS_NORM = FastPath(name="rms norm", parameters={"weight": foreign_rms_norm})
TRANSPOSED_LINEAR = FastPath(name="linear", parameters={"weight": transposed_linear, "bias": bias})
CONVOLUTION = FastPath(
    name="convolution",
    parameters={"weight": convolution, "bias": channel_bias},
    flat=False,
    accepts=_plain_convolution,
)
FAST_PATHS: dict[type[nn.Module], FastPath] = {
    nn.Linear: LINEAR,
    nn.Embedding: FastPath(name="embedding", parameters={"weight": embedding}, accepts=_plain_embedding),
    nn.LayerNorm: FastPath(
        name="layer norm", parameters={"weight": layer_norm, "bias": bias}, accepts=_one_dimension
    ),
    nn.RMSNorm: FastPath(name="rms norm", parameters={"weight": rms_norm}, accepts=_one_dimension),
    RMSNorm: FastPath(name="rms norm", parameters={"weight": own_rms_norm}),
    nn.Conv1d: CONVOLUTION,
    nn.Conv2d: CONVOLUTION,
}


def fast_path_of(module: nn.Module) -> FastPath | None:
    """Returns the fast path of exactly this type of module (a subclass may compute anything), or None.

    None too where the module holds parameters that the path does not know (a weight norm's, say).
    """
    kind = type(module)
    if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        path = TRANSPOSED_LINEAR
    elif kind not in FAST_PATHS and kind.__name__.endswith("RMSNorm") and _foreign_epsilon(module):
        path = FOREIGN_RMS_NORM  # by its name, since every library has one; a plan's verification has the last word
    else:
        path = FAST_PATHS.get(kind)
    if path is None or not path.accepts(module):
        return None
    return path if all(n in path.parameters for n, _ in module.named_parameters(recurse=False)) else None


def token_gram(a: Sequence[Tensor], g: Sequence[Tensor]) -> Tensor:
    """Returns <g_m a_m^T, g_m' a_m'^T> (m, m) of a linear layer through tokens: sum_tt' (a_t . a_t')(g_t . g_t').

    Args:
        a, g: for each pass its inputs (b, s, in) and output gradients (b, s, out).
    """
    rows = []
    for a_left, g_left in zip(a, g, strict=True):
        row = []
        for a_right, g_right in zip(a, g, strict=True):
            similar = a_left.flatten(0, 1) @ a_right.flatten(0, 1).mT
            similar *= g_left.flatten(0, 1) @ g_right.flatten(0, 1).mT
            shape = (g_left.shape[0], g_left.shape[1], g_right.shape[0], g_right.shape[1])
            row.append(similar.view(shape).sum((1, 3)))
        rows.append(torch.cat(row, 1))
    return torch.cat(rows)


def prefers_tokens(sketches: int, positions: int, inputs: int, outputs: int) -> bool:
    """Tells whether the token form takes fewer multiply-adds than per-sequence gradients and their Gram matrix."""
    direct = sketches * positions * inputs * outputs + sketches**2 * inputs * outputs
    tokens = (sketches * positions) ** 2 * (inputs + outputs + 1)
    return tokens < direct
