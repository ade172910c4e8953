"""What a reader finds in a page: its facts, findings, the numbers of its charts and the data of its scripts."""

from __future__ import annotations

import base64
import json
import re
from html import unescape

import numpy as np


def script_json(text: str, name: str):
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def numbers(packed) -> np.ndarray:
    """Returns the numbers of a plotly array, packed or plain."""
    if isinstance(packed, dict):
        return np.frombuffer(base64.b64decode(packed["bdata"]), dtype=packed["dtype"])
    return np.array(packed, dtype=float)


def facts(text: str) -> dict[str, str]:
    """Returns the page's label -> value pairs as a reader sees them."""
    pairs = re.findall(r"<dt>([^<]*)</dt><dd[^>]*>([^<]*)</dd>", text)
    return {unescape(label): unescape(value) for label, value in pairs}


def finding(text: str, name: str) -> tuple[float, float | None, str]:
    found = re.search(rf'data-name="{name}" value="(.*?)" data-stderr="(.*?)">(.*?)</data>', text, re.DOTALL)
    assert found, name
    return float(found[1]), float(found[2]) if found[2] else None, unescape(found[3])


def lines(text: str, chart: str) -> dict[str, dict]:
    return {
        unescape(each["name"]): each
        for each in script_json(text, "chart-data")[chart]["data"]
        if "name" in each
    }
