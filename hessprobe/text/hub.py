"""What everything from the Hugging Face Hub needs: its libraries, a network, and clear words where they are missing."""

from __future__ import annotations

import os
import socket
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from hessprobe.errors import UserError

OFFLINE_SOURCES = "stdlib, a text file or folder, or uint16 token shards"


def require_hub(library: str, sought: str) -> Any:
    """Returns an optional library.

    Raises:
        UserError: it is not installed; says what wanted it, how to install it, and what works without.
    """
    try:
        return import_module(library)
    except ImportError as error:
        raise UserError(
            f"{sought} needs the library {library!r}, which is not installed here: pip install 'hessprobe[hf]'. "
            f"Without it: data.source = {OFFLINE_SOURCES}, read as bytes or tokens"
        ) from error


def offline() -> str:
    """Returns why the Hub cannot be reached, or "": the client itself would try for half a minute first."""
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname or ""
    if getproxies():  # then names are the proxy's business
        return ""
    try:
        socket.getaddrinfo(host, 443)
    except OSError as error:
        return f"{host}: {error.strerror or error}"
    return ""
