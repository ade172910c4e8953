"""Why a row could not be measured, in one line: a mistake in its own words, else with the place in the user's code."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

import torch

from hessprobe.errors import UserError
from hessprobe.machine.processes import PeerFailed

_LONGEST = 600  # characters of a message; torch's internal errors print whole graphs
_OURS = Path(__file__).parents[1]
_TORCH = Path(torch.__file__).parent
_PATHS = sysconfig.get_paths()
_LIBRARIES = [Path(_PATHS[name]) for name in ("purelib", "platlib")]
_PYTHON = [Path(_PATHS[name]) for name in ("stdlib", "platstdlib")]


def reason_of(error: BaseException) -> str:
    """Returns why something failed, in one line.

    A UserError, or what another process has said, is its own words. Of anything else it is the type, the message, and the
    last place in the user's own code that it went through (file:line, function): their model, loss or probe. Where it went
    through none, the last place in another library than torch, such as a model's own; else none.
    """
    if isinstance(error, (UserError, PeerFailed)):
        return _line(str(error))
    where = place_of(error)
    said = _line(f"{type(error).__name__}: {error}")
    return f"{said} ({where})" if where else said


def place_of(error: BaseException) -> str:
    """Returns the last place in the user's code, or in a library that is not torch, as "file:line, in function", or ""."""
    user, library = "", ""
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if frame.filename.startswith("<") or _within(path, [_OURS, _TORCH]):
            continue
        where = f"{_short(path)}:{frame.lineno}, in {frame.name}"
        if _within(path, _LIBRARIES):
            library = where
        elif not _within(path, _PYTHON):
            user = where
    return user or library


def _within(path: Path, folders: list[Path]) -> bool:
    return any(path.is_relative_to(folder) for folder in folders)


def _short(path: Path) -> Path:
    """Returns a path as short as it stays findable: from the working directory, or from the library's own folder."""
    for folder in (Path.cwd(), *_LIBRARIES):
        if path.is_relative_to(folder):
            return path.relative_to(folder)
    return path


def _line(text: str) -> str:
    joined = " ".join(text.split())
    return joined if len(joined) <= _LONGEST else f"{joined[:_LONGEST]} ..."
