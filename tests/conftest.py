"""What every test shares: one thread, seeded generators, the zoo beside its truth, why GPU tests skip."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import torch

# Two-threaded torch crawls on a busy machine; these matrices are far too small to gain from threads.
torch.set_num_threads(int(os.environ.get("HESSPROBE_TEST_THREADS", "1")))


def _hide_broken_torchvision() -> None:
    """Makes transformers and backpack see no torchvision where the installed one cannot be imported."""
    if find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except Exception:  # a torchvision built for another torch raises RuntimeError, not ImportError
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # type: ignore[assignment]


_hide_broken_torchvision()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False on this machine")
    for item in items:
        if item.get_closest_marker("gpu"):  # not `in item.keywords`: those hold folders' names too
            item.add_marker(skip)


@pytest.fixture(scope="session")
def generator() -> Callable[[int], torch.Generator]:
    """Returns the function seed -> a fresh CPU generator with that seed."""
    from tests.models import seeded

    return seeded


@pytest.fixture(scope="session")
def zoo_case() -> Callable[[str], Any]:
    """Returns the function zoo name -> its problem beside its dense truth, computed once a session."""
    from tests.cases import Case

    return cache(Case.of)
