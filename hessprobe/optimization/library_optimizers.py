"""SOAP, Shampoo and Sophia as pytorch-optimizer has them, set to their papers; the library is slow to import."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pytorch_optimizer import SOAP, ScalableShampoo, SophiaH
from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting
from torch import Tensor

from hessprobe.schema.optimizers import LARGEST

SOPHIA_SCALE = 0.05  # gamma of Liu et al. 2023 for the sampled-label estimate (Sophia-G)
SHAMPOO_MOMENTUM = 0.95
_NEVER = 2**62


def soap(parameters: list[Tensor], *, lr: float, weight_decay: float, refresh: int) -> SOAP:
    """Returns SOAP of Vyas et al. 2024."""
    return SOAP(
        parameters,
        lr=lr,
        betas=(0.95, 0.95),
        weight_decay=weight_decay,
        precondition_frequency=refresh,
        max_precondition_dim=LARGEST,
    )


class Shampoo(ScalableShampoo):
    """Shampoo of Gupta et al. 2018 and Anil et al. 2020, its mean of updates freed of its bias."""

    def __init__(self, parameters: list[Tensor], *, lr: float, weight_decay: float, refresh: int) -> None:
        super().__init__(
            parameters,
            lr=lr,
            betas=(SHAMPOO_MOMENTUM, 0.95),
            moving_average_for_momentum=True,
            nesterov=False,
            decoupled_weight_decay=True,
            start_preconditioning_step=1,
            block_size=LARGEST,
            no_preconditioning_for_layers_with_dim_gt=LARGEST,
            shape_interpretation=False,  # it would flatten a small matrix to a vector, and not precondition it
            graft_type=LayerWiseGrafting.SQRTN,
        )
        self.weight_decay, self.refresh = weight_decay, refresh

    def step(self, closure: Callable | None = None) -> Any:
        """Takes one step at the group's learning rate."""
        (group,) = self.param_groups
        taken = group.get("step", 0)
        # Its mean of updates starts at zero and grows for some 20 steps; its counter would leave the first
        # `refresh` - 1 steps without factors.
        unbiased = 1 - SHAMPOO_MOMENTUM ** (taken + 1)
        group["lr"], group["weight_decay"] = group["lr"] / unbiased, self.weight_decay * unbiased
        self.preconditioning_compute_steps = 1 if taken % self.refresh == 0 else _NEVER
        device = group["params"][0].device
        # The inverse root starts from a draw of torch's global generator: lend it one, and put the user's back.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(taken)  # noqa: TID251
            return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as tensors and numbers, for a checkpoint."""
        saved = super().state_dict()
        states = {
            key: {name: _as_tensors(value) for name, value in state.items()}
            for key, state in saved["state"].items()
        }
        return {**saved, "state": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Puts tensors back into the library's own objects, which only a gradient makes it create."""
        (group,), (saved_group,) = self.param_groups, state_dict["param_groups"]
        group.update({key: value for key, value in saved_group.items() if key != "params"})
        self.state.clear()
        for index, p in enumerate(group["params"]):
            if index not in state_dict["state"]:
                continue
            p.grad = torch.zeros_like(p)
            self.init_group(group)
            p.grad = None
            for name, value in state_dict["state"][index].items():
                if isinstance(value, dict):
                    vars(self.state[p][name]).update(value)
                else:
                    self.state[p][name] = value


class Sophia(SophiaH):
    """Sophia of Liu et al. 2023, with estimates of the curvature from outside."""

    def __init__(self, parameters: list[Tensor], *, lr: float, weight_decay: float) -> None:
        # It would estimate the Hessian itself, from the global generator, were its period ever over.
        super().__init__(
            parameters,
            lr=lr,
            betas=(0.96, 0.99),
            p=SOPHIA_SCALE,
            weight_decay=weight_decay * SOPHIA_SCALE,
            update_period=_NEVER,
        )

    def step(self, closure: Callable | None = None, hessian: list[Tensor] | None = None) -> Any:
        """Takes one step at the group's learning rate; `hessian` is a fresh estimate of diag(G), None keeps the mean."""
        (group,) = self.param_groups
        # The library clips m / h at p = gamma where the paper clips m / (gamma h) at 1: the same up to the factor
        # gamma, which its learning rate then has to make good, and its decay must not.
        group["lr"] = group["lr"] / SOPHIA_SCALE
        loss = super().step(closure, hessian=hessian)
        for state in self.state.values():
            state.pop("hessian", None)  # the estimate as it came: used up, and as large as the model
        return loss


def _as_tensors(value: Any) -> Any:
    """Returns the tensors of one of Shampoo's own objects by attribute; anything else as it is."""
    if value is None or isinstance(value, (Tensor, int, float, list)):
        return value
    return {
        name: held
        for name, held in vars(value).items()
        if isinstance(held, Tensor) or (isinstance(held, list) and held and isinstance(held[0], Tensor))
    }
