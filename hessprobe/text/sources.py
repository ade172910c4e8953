"""Where tokens come from: text as bytes, or token shards, each cut into a training and a held-out part.

Reads the Python standard library's own sources, a text file, a folder of them, or nanoGPT's flat uint16
shards (memory-mapped). Nothing depends on the clock, the locale or the order of a directory: the same files
give the same tokens on every machine.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hessprobe.errors import UserError

STANDARD_LIBRARY = "stdlib"
SEPARATOR = b"\0"  # between files; text holds no NUL, so byte 0 means nothing else
FIRST_LOOK = 2**20  # bytes from which a binary file is told, before all of it is read
_SKIPPED_FOLDERS = {"__pycache__", "dist-packages", "idlelib", "site-packages", "test", "tests"}
# Written by the build or the administrator of one machine: with them the hash would differ between machines.
_SKIPPED_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")


class Parts(NamedTuple):
    """Training tokens, held-out tokens (uint8 or uint16, 1-D), and JSON-able facts about their origin."""

    train: np.ndarray
    held_out: np.ndarray
    origin: dict[str, Any]


def read_parts(source: str | Path, fraction: float) -> Parts:
    """Returns the tokens of a source, `fraction` of them held out unless it brings a val.bin of its own.

    Raises:
        UserError: nothing there, empty, or not in a format this reads.
        OSError: not readable.
    """
    if source == STANDARD_LIBRARY:  # the word only: Path("stdlib") and "./stdlib" are a folder of that name
        return _standard_library(fraction)
    path = Path(os.path.expanduser(source))
    if not str(source) or not path.exists():
        raise UserError(
            f"no corpus at {str(source)!r}. Valid: stdlib, a text file, a folder of text files, "
            "a .bin file of uint16 tokens, a folder with train.bin and val.bin"
        )
    if path.is_dir():
        if not (path / "train.bin").exists():
            texts, skipped = _texts(path, _visible(path))
            return _tail(_joined(texts), fraction, kind="text", files=len(texts), skipped_files=skipped)
        if (path / "val.bin").exists():
            held_out = {"kind": "tokens", "held_out": "val.bin"}
            return Parts(_mapped(path / "train.bin", "<u2"), _mapped(path / "val.bin", "<u2"), held_out)
        path = path / "train.bin"
    if path.suffix == ".bin":
        return _tail(_mapped(path, "<u2"), fraction, kind="tokens")
    text = _mapped(path, "u1")
    if not text[:FIRST_LOOK].all():
        raise UserError(
            f"{path} holds NUL bytes, so it is not text. "
            "Give a text file, or uint16 tokens in a file whose name ends in .bin"
        )
    return _tail(text, fraction, kind="text")


def _tail(tokens: np.ndarray, fraction: float, **origin: Any) -> Parts:
    cut = tokens.size - int(tokens.size * fraction)
    return Parts(tokens[:cut], tokens[cut:], {**origin, "held_out": f"the last {fraction:.3g} of it"})


def _mapped(path: Path, dtype: str) -> np.ndarray:
    size, width = path.stat().st_size, np.dtype(dtype).itemsize
    if size == 0:
        raise UserError(f"{path} is empty. Give a file with text or tokens in it")
    if size % width:
        raise UserError(
            f"{path} has {size:,} bytes, an odd number; a token shard holds 2 bytes a token (uint16, as "
            "nanoGPT writes). Copy it again if it was cut short; give text another name than .bin"
        )
    return np.memmap(path, dtype=dtype, mode="r")


def _visible(root: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:  # os.walk would pass over a folder it may not read
        raise error

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _texts(root: Path, paths: Iterator[Path]) -> tuple[list[bytes], int]:
    """Returns the UTF-8 texts among regular files, in the order of the paths, and how many were not text."""
    texts, skipped = [], 0
    for path in sorted(paths, key=lambda path: path.relative_to(root).as_posix()):
        if not path.is_file():  # a pipe would block for ever
            continue
        with path.open("rb") as file:
            text = file.read(FIRST_LOOK)
            if b"\0" not in text:  # told before a binary of gigabytes is read
                text += file.read()
        if b"\0" in text or not _is_utf8(text):
            skipped += 1
        elif text:
            texts.append(text)
    if not texts:
        raise UserError(
            f"no text in folder {root} ({skipped} files are not UTF-8 text). "
            "Give a folder of text files, or of token shards named train.bin and val.bin"
        )
    return texts, skipped


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _joined(texts: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(SEPARATOR.join(texts), dtype="u1")


def _standard_library(fraction: float) -> Parts:
    root = Path(sysconfig.get_path("stdlib"))
    sources: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [n for n in folders if n not in _SKIPPED_FOLDERS and not n.startswith((".", "config-"))]
        names = [n for n in names if n.endswith(".py") and not n.startswith(_SKIPPED_FILES)]
        sources += [Path(folder, n) for n in names]
    if not sources:
        raise UserError(f"this Python has no sources of its library in {root}. Give a text file or folder")
    texts, skipped = _texts(root, iter(sources))
    train, held_out = _spread(texts, fraction)
    origin = {"kind": "text", "files": len(texts), "skipped_files": skipped}
    return Parts(_joined(train), _joined(held_out), {**origin, "held_out": f"{len(held_out)} whole files"})


def _spread(texts: Sequence[bytes], fraction: float) -> tuple[list[bytes], list[bytes]]:
    """Returns (train, held out): a text is held out whenever those before it fall short of the fraction.

    No text above an eighth of the held-out part is taken: one long table would make up most of it.
    """
    limit = fraction * sum(map(len, texts)) / 8
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    seen = held = 0
    for text in texts:
        taken = held < fraction * seen and len(text) <= limit
        parts[taken].append(text)
        seen += len(text)
        held += len(text) * taken
    return parts
