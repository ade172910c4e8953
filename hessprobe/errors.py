"""Mistakes a user can act on: every message says what was wanted, what was given, and the way out."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

_PACKAGE = str(Path(__file__).parent)


class UserError(ValueError):
    """A mistake in a call or its data. The command line prints its one line and exits with 2."""


class RunFailed(RuntimeError):
    """A run that had to stop (a loss that is not finite). The command line exits with 1; what was logged stays."""


def unknown_name(kind: str, given: str, valid: Iterable[str]) -> UserError:
    """Returns the error for a name that does not exist, listing those that do and the nearest one."""
    names = list(valid)
    nearest = get_close_matches(given, names, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return UserError(f"no {kind} named {given!r}.{hint} Valid: {', '.join(names)}")


def warn(message: str) -> None:
    """Warns with the caller's line, never one of this package's; with no line where nobody else's code called."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back
    if frame is None:
        warnings.warn_explicit(message, UserWarning, "hessprobe", 0, registry={})
        return
    name = frame.f_globals.get("__name__", "__main__")
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    warnings.warn_explicit(message, UserWarning, frame.f_code.co_filename, frame.f_lineno, name, registry)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, without its full stop; its type where it says nothing."""
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
