"""Models with a state between calls, loops over their layers and shared parameters, beside a Jacobian by autograd alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import hessprobe as hp

V, D = 7, 4


class Net(nn.Module):
    """Embedding, a body, a head."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(V, D), body, nn.Linear(D, V)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(x)))


class Looped(nn.Module):
    """One block at three places."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.Tanh())
        self.layers = nn.ModuleList([block, block, block])

    def forward(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = h + layer(h)
        return h


class TwoNames(nn.Module):
    """Lightning's habit: the parts, and a sequence of the same parts."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Sequential(nn.Embedding(V, D), nn.Tanh()), nn.Linear(D, V)
        self.net = nn.Sequential(self.backbone, self.head)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(D, D, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        return self.rnn(h)[0]


def jacobian_truth(
    model: nn.Module, batch: tuple[Tensor, Tensor], partition: hp.Partition
) -> tuple[Tensor, Tensor]:
    """Returns G and H of the mean cross-entropy by plain double backward at the model's own parameters."""
    named = dict(model.named_parameters())
    own, (x, y) = [named[name] for name in partition.names], batch

    def flat(grads: Any) -> Tensor:
        return torch.cat(
            [(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(own, grads, strict=True)]
        )

    def pulled(value: Tensor, **more: Any) -> Tensor:
        if not value.requires_grad:
            return flat([None] * len(own))
        return flat(torch.autograd.grad(value, own, retain_graph=True, allow_unused=True, **more))

    with sdpa_kernel(SDPBackend.MATH):
        z = model.eval()(x).flatten(0, -2)
        jacobian = torch.stack([pulled(entry) for entry in z.reshape(-1)]).view(len(z), -1, partition.size)
        p = z.detach().softmax(-1)
        curved = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        g = torch.einsum("ncp,ncd,ndq->pq", jacobian, curved, jacobian) / len(z)
        gradient = pulled(nn.functional.cross_entropy(z, y.flatten()), create_graph=True)
        return g, torch.stack([pulled(entry) for entry in gradient]).detach()


class Stateful(nn.Module):
    """Every forward pass changes whatever `kind` says, and depends on it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(D, D)
        self.state: Any = {
            "tensor": torch.zeros(D), "in place": torch.zeros(D), "tuple": (torch.zeros(D), 0), "list": [torch.zeros(D)],
            "dict": {"mean": torch.zeros(D), "steps": {"n": 0}}, "counter": 0, "generator": torch.Generator(),
            "object": Holder(),
        }[kind]  # fmt: skip

    def forward(self, h: Tensor) -> Tensor:
        found = self._value().to(h)
        out = torch.tanh(self.linear(h) + found)
        self._write(out.detach().mean((0, 1)))
        return out

    def _value(self) -> Tensor:
        s: Any = self.state
        if self.kind in ("counter", "generator"):
            return torch.full((D,), float(s)) if self.kind == "counter" else torch.randn(D, generator=s)
        if self.kind == "object":
            return s.hidden
        if self.kind in ("list", "tuple", "dict"):
            return s[{"list": -1, "tuple": 0, "dict": "mean"}[self.kind]]
        return s

    def _write(self, new: Tensor) -> None:
        if self.kind == "tensor":
            self.state = new
        elif self.kind == "in place":
            self.state.mul_(0.5).add_(new)
        elif self.kind == "tuple":
            self.state = (new, self.state[1] + 1)
        elif self.kind == "list":
            self.state.append(new)
        elif self.kind == "dict":
            self.state["mean"] = new
            self.state["steps"]["n"] += 1
        elif self.kind == "counter":
            self.state += 1
        elif self.kind == "object":
            self.state.hidden = new


class Holder:
    def __init__(self) -> None:
        self.hidden = torch.zeros(D)


STATES = ("tensor", "in place", "tuple", "list", "dict", "counter", "generator", "object")
