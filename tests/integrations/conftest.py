"""Lightning needs torchmetrics, which imports any torchvision that is installed, a broken one too: it is hidden here."""

from __future__ import annotations

import sys
import warnings
from importlib.metadata import PackageNotFoundError, version

from lightning_utilities.core import imports


def _without_torchvision(name: str) -> str:
    if name == "torchvision":
        raise PackageNotFoundError(name)
    return version(name)


if (
    sys.modules.get("torchvision", "sound") is None
):  # hidden by the conftest above, where it cannot be imported
    imports._version = _without_torchvision
    imports.module_available.cache_clear()

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Lightning's own, while it is loaded
    import lightning.pytorch  # noqa: F401
