"""First-order solvers for Gauss-Newton's inner problem, and the same optimizers as training baselines.

A matrix method takes the matrices inside blocks, AdamW (same learning rate, betas 0.9 / 0.999) embedding, head and
vectors: Muon as in the reference study, SOAP and Shampoo alike. AdamW and Sophia, elementwise, take everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from hessprobe.errors import UserError, unknown_name
from hessprobe.problem.partition import inner_parameters, unwrapped

if TYPE_CHECKING:  # pytorch_optimizer takes as long to import as torch: only who asks for it pays
    from pytorch_optimizer import ScalableShampoo, SophiaH

INNER_SOLVERS = ("muon", "adamw", "soap", "shampoo")  # from gradients alone
SOLVERS = (*INNER_SOLVERS, "sophia")  # sophia wants estimates of diag(G) too
REFRESH = {"soap": 1, "shampoo": 1, "sophia": 10}  # default steps between two preconditioners
LARGEST = (
    10_000  # matrices with a longer side are preconditioned from the other side alone (SOAP) or not (Shampoo)
)
SOPHIA_SCALE = 0.05  # gamma of Liu et al. 2023 for the sampled-label estimate (Sophia-G)
SHAMPOO_MOMENTUM = 0.95
_NEVER = 2**62


def hidden_matrices(model: nn.Module) -> tuple[str, ...]:
    """Returns the names of the 2-D parameters that belong neither to the embedding nor to the head."""
    named = dict(unwrapped(model).named_parameters())
    return tuple(name for name in inner_parameters(model) if named[name].dim() == 2)


def norm_and_scale(gradients: Mapping[str, Tensor], clip: float | None) -> tuple[float, float]:
    """Returns the norm over all gradients together, and the factor at most 1 that brings it down to `clip`."""
    norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients.values()]))
    return float(norm), 1.0 if clip is None else float((clip / (norm + 1e-12)).clamp_max(1.0))


def refresh_of(solver: str, refresh: int | None, defaults: Mapping[str, int]) -> int:
    """Returns every how many steps the solver's preconditioner is computed anew.

    Raises:
        UserError: below 1, or a number for a solver that has no preconditioner.
    """
    if refresh is None:
        return defaults.get(solver, 1)
    if solver not in defaults:
        raise UserError(
            f"refresh {refresh}: {solver} has no preconditioner to refresh; leave it out, or choose one of "
            f"{', '.join(defaults)}"
        )
    if refresh < 1:
        raise UserError(f"refresh must be at least 1 step, got {refresh}")
    return refresh


class FirstOrder:
    """One of SOLVERS over named parameters, with gradients handed in and the learning rate set from outside.

    What they are, and where they depart from their library's defaults:
    - "muon": torch's (momentum 0.95, Nesterov, learning rate times sqrt(max(1, rows / columns))).
    - "adamw": torch's.
    - "soap" (Vyas et al. 2024): betas 0.95 / 0.95, basis refreshed every step. As in the authors' code its FIRST STEP
      ONLY BUILDS THE BASIS: the hidden matrices stand still for one step, the rest moves.
    - "shampoo" (Gupta et al. 2018; Anil et al. 2020): both factors to the power -1/4, means of statistics and of
      updates with decay 0.95, the latter freed of its bias, every matrix's step grafted to the size of sign(gradient):
      entries of root mean square 1 times the learning rate, as AdamW's. A matrix with a side above LARGEST: no factors.
    - "sophia" (Liu et al. 2023): lr * clip(m / (0.05 h), 1), decays 0.96 / 0.99; h averages the estimates of diag(G)
      that `step` is given, one at least at its first step.

    Args:
        solver: one of SOLVERS.
        parameters: by name; updated in place.
        hidden: names of the matrices that a matrix method takes; AdamW takes the rest.
        betas, momentum, weight_decay: of AdamW, of Muon, and of all (decoupled: times the learning rate).
        refresh: steps between two preconditioners (default: 1); sophia's is the caller's affair.

    Raises:
        UserError: an unknown solver; refresh below 1 or for a solver without a preconditioner.
    """

    def __init__(
        self,
        solver: str,
        parameters: Mapping[str, Tensor],
        hidden: Sequence[str],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        refresh: int | None = None,
    ) -> None:
        if solver not in SOLVERS:
            raise unknown_name("inner solver", solver, SOLVERS)
        self.solver = solver
        self.parameters = dict(parameters)
        self.weight_decay = weight_decay
        self.refresh = refresh_of(solver, refresh, REFRESH)
        elementwise = {"adamw": (), "sophia": tuple(parameters)}
        taken = elementwise.get(solver, tuple(n for n in parameters if n in hidden))
        matrices = [p for n, p in parameters.items() if n in taken]
        rest = [p for n, p in parameters.items() if n not in taken]
        self.optimizers: list[torch.optim.Optimizer] = []
        if matrices:
            self.optimizers.append(_build(solver, matrices, momentum, weight_decay, self.refresh))
        if rest:
            self.optimizers.append(torch.optim.AdamW(rest, lr=0.0, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(
        self,
        gradients: Mapping[str, Tensor],
        learning_rate: float,
        clip: float | None,
        *,
        diagonal: Mapping[str, Tensor] | None = None,
    ) -> float:
        """Takes one step along the gradients and returns their norm before clipping.

        Args:
            clip: greatest global norm of the gradients; None leaves them as they are.
            diagonal: a fresh estimate of diag(G) by name, for sophia; None keeps the mean of the last ones.

        Raises:
            UserError: sophia's first step without an estimate.
        """
        norm, scale = norm_and_scale(gradients, clip)
        for name, gradient in gradients.items():
            self.parameters[name].grad = gradient * scale if scale < 1.0 else gradient
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            if self._is_own(optimizer, "shampoo"):
                self._shampoo_step(cast("ScalableShampoo", optimizer), learning_rate)
            elif self._is_own(optimizer, "sophia"):
                self._sophia_step(cast("SophiaH", optimizer), learning_rate, diagonal)
            else:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm

    def _is_own(self, optimizer: torch.optim.Optimizer, solver: str) -> bool:
        return self.solver == solver and not isinstance(optimizer, torch.optim.AdamW)

    def _shampoo_step(self, optimizer: ScalableShampoo, learning_rate: float) -> None:
        (group,) = optimizer.param_groups
        taken = group.get("step", 0)
        # Its mean of updates starts at zero and grows for some 20 steps; its counter would leave the first
        # `refresh` - 1 steps without factors.
        unbiased = 1 - SHAMPOO_MOMENTUM ** (taken + 1)
        group["lr"], group["weight_decay"] = learning_rate / unbiased, self.weight_decay * unbiased
        optimizer.preconditioning_compute_steps = 1 if taken % self.refresh == 0 else _NEVER
        device = next(iter(self.parameters.values())).device
        # The inverse root starts from a draw of torch's global generator: lend it one, and put the user's back.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(taken)  # noqa: TID251
            optimizer.step()

    def _sophia_step(
        self, optimizer: SophiaH, learning_rate: float, diagonal: Mapping[str, Tensor] | None
    ) -> None:
        (group,) = optimizer.param_groups
        if diagonal is None and not group.get("step", 0):
            optimizer.zero_grad(set_to_none=True)
            raise UserError(
                "sophia needs an estimate of diag(G) at its first step, got none: pass diagonal=; as an inner solver "
                f"of Gauss-Newton choose one of {', '.join(INNER_SOLVERS)}"
            )
        # The library clips m / h at p = gamma where the paper clips m / (gamma h) at 1: the same up to the factor
        # gamma, which its learning rate then has to make good, and its decay must not.
        group["lr"] = learning_rate / SOPHIA_SCALE
        optimizer.step(hessian=None if diagonal is None else [diagonal[name] for name in self.parameters])
        for state in optimizer.state.values():
            state.pop("hessian", None)  # the estimate as it came: used up, and as large as the model

    def state_dict(self) -> list[dict[str, Any]]:
        """Returns the optimizers' states as tensors and numbers, for a checkpoint."""
        return [_with_states(optimizer.state_dict(), _as_tensors) for optimizer in self.optimizers]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Puts back what `state_dict` gave."""
        for optimizer, saved in zip(self.optimizers, state, strict=True):
            if self._is_own(optimizer, "shampoo"):
                _load_shampoo(cast("ScalableShampoo", optimizer), saved)
            else:
                optimizer.load_state_dict(saved)


def _build(
    solver: str, parameters: list[Tensor], momentum: float, decay: float, refresh: int
) -> torch.optim.Optimizer:
    if solver == "muon":
        return torch.optim.Muon(parameters, lr=0.0, momentum=momentum, weight_decay=decay)
    from pytorch_optimizer import SOAP, ScalableShampoo, SophiaH
    from pytorch_optimizer.optimizer.utils.graft import LayerWiseGrafting

    if solver == "soap":
        return SOAP(
            parameters,
            lr=0.0,
            betas=(0.95, 0.95),
            weight_decay=decay,
            precondition_frequency=refresh,
            max_precondition_dim=LARGEST,
        )
    if solver == "sophia":
        # It would estimate the Hessian itself, from the global generator, were its period ever over.
        return SophiaH(
            parameters, lr=0.0, betas=(0.96, 0.99), p=SOPHIA_SCALE, weight_decay=decay * SOPHIA_SCALE,
            update_period=_NEVER,
        )  # fmt: skip
    return ScalableShampoo(
        parameters,
        lr=0.0,
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


def _with_states(saved: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    states = {key: {n: change(value) for n, value in state.items()} for key, state in saved["state"].items()}
    return {**saved, "state": states}


def _as_tensors(value: Any) -> Any:
    """Returns the tensors of one of Shampoo's own objects by attribute; anything else as it is."""
    if value is None or isinstance(value, (Tensor, int, float, list)):
        return value
    return {
        name: held
        for name, held in vars(value).items()
        if isinstance(held, Tensor) or (isinstance(held, list) and held and isinstance(held[0], Tensor))
    }


def _load_shampoo(optimizer: ScalableShampoo, saved: dict[str, Any]) -> None:
    """Puts tensors back into Shampoo's own objects, which only a gradient makes it create."""
    (group,), (saved_group,) = optimizer.param_groups, saved["param_groups"]
    group.update({key: value for key, value in saved_group.items() if key != "params"})
    optimizer.state.clear()
    for index, p in enumerate(group["params"]):
        if index not in saved["state"]:
            continue
        p.grad = torch.zeros_like(p)
        optimizer.init_group(group)
        p.grad = None
        for name, value in saved["state"][index].items():
            if isinstance(value, dict):
                vars(optimizer.state[p][name]).update(value)
            else:
                optimizer.state[p][name] = value
