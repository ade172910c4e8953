"""What a loop was seen to do, the loop without the lines that measuring adds, and its dense truth."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tests.oracles import Dense, dense

ADDED = "# added"
Logits = Callable[[nn.Module, Any], Tensor]
Targets = Callable[[Any], Tensor]


class Trained(NamedTuple):
    """What a loop leaves."""

    model: nn.Module
    optimizers: list[Any]


class Pass(NamedTuple):
    """One forward pass of a loop: theta by the parameters' names, the micro-batch and its loss."""

    theta: dict[str, Tensor]
    batch: Any
    loss: Tensor


@dataclass
class Watch:
    """Keeps every forward pass of a loop, and which tensors its parameters were."""

    passes: list[Pass] = field(default_factory=list)
    identities: list[list[int]] = field(default_factory=list)

    def __call__(self, model: nn.Module, batch: Any, loss: Tensor) -> None:
        theta = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.passes.append(Pass(theta, batch, loss.detach().clone()))
        self.identities.append([id(p) for p in model.parameters()])

    @property
    def losses(self) -> Tensor:
        """The losses of all passes."""
        return torch.stack([one.loss for one in self.passes])


class Bare(NamedTuple):
    """A module's loop without what measuring adds to it, and how many statements that is."""

    train: Callable[..., Trained]
    added: int


def without_added(module: ModuleType) -> Bare:
    """Returns the module's `train` after every statement marked as added has been left out of its source."""
    source = inspect.getsource(module)
    lines = source.splitlines()
    strip = _Strip({i for i, line in enumerate(lines, 1) if line.rstrip().endswith(ADDED)})
    tree = ast.fix_missing_locations(strip.visit(ast.parse(source)))
    namespace: dict[str, Any] = {"__name__": f"{module.__name__}_without"}
    exec(compile(tree, f"{module.__file__} without added lines", "exec"), namespace)
    assert strip.found == strip.marked, "a mark stands on no statement of its own"
    return Bare(namespace["train"], len(strip.marked))


class _Strip(ast.NodeTransformer):
    """Leaves out the statements that begin on a marked line."""

    def __init__(self, marked: set[int]) -> None:
        self.marked, self.found = marked, set()

    def generic_visit(self, node: ast.AST) -> ast.AST | None:  # type: ignore[override]
        if isinstance(node, ast.stmt) and node.lineno in self.marked:
            self.found.add(node.lineno)
            return None
        return super().generic_visit(node)


class _LogitsOf(nn.Module):
    """A model as the dense oracle wants it: inputs to outputs.

    Its copy is itself: a function kept as an attribute of a model (minGPT's `mlpf`) would still run the first one's parts.
    """

    def __init__(self, model: nn.Module, logits: Logits) -> None:
        super().__init__()
        self.model = model
        self.logits = logits

    def __deepcopy__(self, memo: dict) -> _LogitsOf:
        return self

    def forward(self, batch: Any) -> Tensor:
        return self.logits(self.model, batch)


def truth(
    model: nn.Module,
    passes: list[Pass],
    logits: Logits,
    targets: Targets,
    *,
    ignore_index: int = -100,
) -> Dense:
    """Returns the dense truth of the mean cross-entropy over the passes' union, in float64, at the theta of the first.

    Names are those of the model's own parameters.
    """
    modes = {module: module.training for module in model.modules()}
    plain = _LogitsOf(model, logits)
    theta = {f"model.{name}": value.double() for name, value in passes[0].theta.items()}
    found = dense(
        plain,
        [(one.batch, targets(one.batch)) for one in passes],
        "cross_entropy",
        theta=theta,
        ignore_index=ignore_index,
    )
    for module, mode in modes.items():
        module.training = mode
    bare = [name.removeprefix("model.") for name in found.names]
    shapes = {name.removeprefix("model."): shape for name, shape in found.shapes.items()}
    return Dense(**{**vars(found), "names": tuple(bare), "shapes": shapes})


def in_order(found: Dense, model: nn.Module, measured: nn.Module, names: tuple[str, ...]) -> Dense:
    """Returns the truth in the order of the measured module's names, matched by the parameters themselves."""
    own = {id(p): name for name, p in model.named_parameters()}
    theirs: Mapping[str, Tensor] = dict(measured.named_parameters(remove_duplicate=False))
    return found.in_order([own[id(theirs[name])] for name in names])
