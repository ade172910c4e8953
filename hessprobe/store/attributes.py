"""Attributes of the types that every format of labelled arrays has, netCDF among them: text, numbers, lists of numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from numbers import Number
from typing import Any

import numpy as np


def portable(attributes: Mapping[str, object]) -> dict[str, Any]:
    """Returns attributes that can be stored in zarr and in netCDF alike.

    Text, numbers and lists of numbers stay as they are; a truth value becomes 1 or 0, None is left out (there is no such
    attribute), and what only JSON can hold (mappings, lists of text, empty lists) becomes JSON text.
    """
    return {name: _portable(value) for name, value in attributes.items() if value is not None}


def _portable(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, str | Number):
        return value
    if isinstance(value, list | tuple) and value and all(_is_number(entry) for entry in value):
        return list(value)
    return json.dumps(value)


def _is_number(value: object) -> bool:
    return isinstance(value, Number) and not isinstance(value, bool)


def decoded(value: Any) -> dict[str, Any]:
    """Returns a JSON attribute as a dict; text that is no JSON object stands as it is, under its own name."""
    if isinstance(value, Mapping):
        return dict(value)
    try:
        decoded = json.loads(value) if value else {}
    except (TypeError, ValueError):
        return {"text": str(value)}
    return decoded if isinstance(decoded, dict) else {"text": decoded}
