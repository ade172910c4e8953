"""What would make the host wait for a GPU, counted on a CPU: numbers read, shapes that depend on data, copies to the host.

A copy to the host cannot be told from none where everything lies there, so calls of `Tensor.cpu` and `.tolist` count. What
torch's own functions do inside one operation (an eigenvalue's check of its success) is not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# `.item()`, `float()`, `bool()` and comparisons in an `if` are the first.
WAITING = {
    "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "bincount",
}  # fmt: skip
BY_MASK = {"index", "index_put", "index_put_"}  # with a boolean index they look for its non-zeros
COPIES = {"cpu", "tolist", "numpy"}


class _Operations(TorchDispatchMode):
    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in BY_MASK and any(i is not None and i.dtype is torch.bool for i in args[1])
        by_counts = func is torch.ops.aten.repeat_interleave.Tensor
        if by_mask or by_counts or name in WAITING:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def _noted(name: str, seen: list[str]) -> Callable[..., Any]:
    own, inside = getattr(torch.Tensor, name), False

    def noting(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if not inside:  # torch hands a call to function modes by its name, and so back to here
            seen.append(name)
        before, inside = inside, True
        try:
            return own(self, *args, **kwargs)
        finally:
            inside = before

    return noting


def waits_of(call: Callable[[], object]) -> list[str]:
    """Returns the names of what would make the host wait, in their order."""
    seen: list[str] = []
    with ExitStack() as stack:
        for name in COPIES:  # not by a function mode: where the package switches these off it would be blind
            stack.enter_context(mock.patch.object(torch.Tensor, name, _noted(name, seen)))
        with _Operations(seen):
            call()
    return seen
