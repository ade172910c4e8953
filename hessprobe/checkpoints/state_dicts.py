"""Checkpoints of anybody's model: Lightning's .ckpt and plain state_dicts, put into the model that a function makes.

Tensors only: files are read with torch's weights_only=True, and what that refuses is refused here and never unpickled.
"""

from __future__ import annotations

import glob
import os
import pickle
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hessprobe.checkpoints.series import Reader, check_probes, recipe_of
from hessprobe.errors import UserError
from hessprobe.measuring.failures import reason_of
from hessprobe.problem.micro_batches import MicroBatches
from hessprobe.problem.objective import Batch, Objective
from hessprobe.recipe import ModelRecipe
from hessprobe.training.builds import open_corpus

SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
CONTEXT = 128  # tokens, where text is read and nothing else is asked for
# Where training codes keep the weights in a file that holds more, and what wrappers put before every name.
_PLACES = ("state_dict", "model_state_dict", "model_state", "model", "module", "weights", "params")
_PREFIXES = ("model.", "module.", "_orig_mod.")
_LISTED = 4


def weight_files(given: Sequence[str]) -> list[str]:
    """Returns the files of weights that files, folders of them and patterns (*) stand for, in the order of their numbers.

    Raises:
        UserError: none there, or a file of another kind.
    """
    found: list[str] = []
    for name in given:
        path = os.path.expanduser(name)
        if os.path.isdir(path):
            inside = [str(f) for f in Path(path).iterdir() if f.is_file() and f.suffix in SUFFIXES]
        else:
            inside = [path] if os.path.isfile(path) else glob.glob(path)
        if not inside:
            raise UserError(
                f"{name}: no weights there; --model measures files ({', '.join(SUFFIXES)}), a folder of them, or a pattern "
                "such as 'checkpoints/*.pt'"
            )
        found += sorted(inside, key=lambda file: (step_of(file) is None, step_of(file) or 0, file))
    for file in found:
        if Path(file).suffix not in SUFFIXES:
            raise UserError(f"{file}: with --model, wanted a file that ends in {', '.join(SUFFIXES)}")
    return list(dict.fromkeys(found))


def step_of(file: str) -> int | None:
    """Returns the training step that a file's name says: Lightning's step=N, or its last whole number."""
    stem = Path(file).name.removesuffix(Path(file).suffix)
    named = re.findall(r"step[=_-]?(\d+)", stem) or re.findall(r"\d+", stem)
    return int(named[-1]) if named else None


def function_named(name: str, flag: str) -> Any:
    """Returns what "module:function" names; modules of the working directory are found too.

    Raises:
        UserError: no such module or function, or a module that cannot be imported.
    """
    module, colon, function = name.partition(":")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)  # a console script has its own folder there
    try:
        if not (module and colon and function):
            raise ImportError("wanted module:function")
        found = getattr(import_module(module), function)
    except Exception as error:  # whatever the user's module raises
        raise UserError(
            f"{flag} {name}: {reason_of(error)}; wanted module:function, importable from where you are"
        ) from error
    if not callable(found):
        raise UserError(f"{flag} {name} is a {type(found).__name__}; wanted a function")
    return found


def read_weights(file: str) -> dict[str, Tensor]:
    """Returns a file's tensors by name, on the CPU.

    Raises:
        UserError: a file that holds more than tensors and plain values, that is damaged, or that holds no weights.
    """
    try:
        if file.endswith(".safetensors"):
            return dict(_safetensors(file).load_file(file))
        held = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = re.search(
            r"GLOBAL ([\w.]+)|(?:Unsupported (?:class|global|operand)[^\w]*)([\w.]+)", str(error)
        )
        named = f" ({what[1] or what[2]})" if what else ""
        raise UserError(
            f"{file} holds more than tensors{named}, and nothing is unpickled here, since that could run its code: save "
            "the weights alone, torch.save(model.state_dict(), FILE), or safetensors"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{file} cannot be read as weights, it may be damaged ({reason_of(error)})"
        ) from error
    weights = _weights_in(held)
    if weights is None:
        inside = ", ".join(map(str, held)) if isinstance(held, Mapping) else type(held).__name__
        raise UserError(
            f"{file} holds no state_dict (there is {inside[:200]}): wanted tensors by name, or these under "
            f"{', '.join(_PLACES[:3])}"
        )
    return weights


def fitting(model: nn.Module, weights: Mapping[str, Tensor], file: str) -> tuple[dict[str, Tensor], str]:
    """Returns a file's tensors under the model's names, and the prefix that was taken from theirs ("" for none).

    Raises:
        UserError: names or shapes that are not the model's; some are listed.
    """
    own = model.state_dict()
    tied = _tied(own)
    best: tuple[int, dict[str, Tensor], str] | None = None
    for prefix, renamed in _renamings(weights):
        present = {alias for name in renamed for alias in tied.get(name, ())}
        apart = len(set(renamed) - set(own)) + len(set(own) - set(renamed) - present)
        if best is None or apart < best[0]:
            best = apart, renamed, prefix
    assert best is not None
    _, renamed, prefix = best
    for name in [name for name in renamed if name in own]:  # a tied tensor may be saved once
        for alias in tied[name]:
            renamed.setdefault(alias, renamed[name])
    missing, unexpected = set(own) - set(renamed), set(renamed) - set(own)
    shapes = {
        f"{name} {tuple(renamed[name].shape)}, the model's {tuple(own[name].shape)}"
        for name in set(own) & set(renamed)
        if own[name].shape != renamed[name].shape
    }
    said = [
        f"{len(names)} {what} ({', '.join(sorted(names)[:_LISTED])}{', ...' if len(names) > _LISTED else ''})"
        for what, names in (
            ("missing", missing), ("that the model does not have", unexpected), ("of another shape", shapes),
        ) if names
    ]  # fmt: skip
    if said:
        raise UserError(
            f"{file} does not fit the model of --model: {'; '.join(said)}. Give a function that makes the model these "
            "weights were saved from"
        )
    return renamed, prefix


class StateDicts:
    """A series of files of weights.

    Args:
        given: files, folders, patterns; see `weight_files`.
        model: "module:function", a function without arguments that returns the nn.Module, or an hp.Objective of it.
        settings, sequences: see `recipe_of`.
        data: a source of text, as of other checkpoints, or "module:function": a function that returns a batch, or an
            iterable of them such as a DataLoader, whose first sequences are measured.
        context: tokens in a sequence of a text.
    """

    def __init__(
        self,
        given: Sequence[str],
        settings: Sequence[str],
        *,
        model: str,
        data: str | None,
        sequences: int | None,
        context: int | None,
    ) -> None:
        self.names = weight_files(given)
        self.known = [step_of(name) for name in self.names]
        self.reads = [0] * len(self.names)
        self._function = model
        self._data = data if data is not None and _names_function(data) else None
        source = None if self._data else data
        stem = (
            Path(self.names[0]).stem if len(self.names) == 1 else Path(self.names[0]).absolute().parent.name
        )
        self.recipe = recipe_of({"name": f"{stem}-probe"}, settings, data=source, sequences=sequences)
        check_probes(self.recipe)
        made = _made(function_named(model, "--model"), model)
        self._objective = made if isinstance(made, Objective) else Objective(made)
        self.notes: list[str] = []
        self.vocabulary = _vocabulary(self._objective.model)
        self.context = context or CONTEXT
        self.place(0, self._objective.model)  # whether they fit is told before anything is written

    def reader(self) -> Reader:
        if self._data is not None:
            found = _made(function_named(self._data, "--data"), self._data, "--data")
            return _Given(found, self._data, self._objective)
        if not self.vocabulary:
            raise UserError(
                f"--model {self._function}: this model has no nn.Embedding that would read a text's tokens: give its "
                "batches, --data module:function"
            )
        model = ModelRecipe(context=self.context, vocabulary=self.vocabulary)
        return open_corpus(self.recipe.model_copy(update={"model": model}))

    def model(self) -> nn.Module:
        return self._objective.model

    def objective(self, model: nn.Module) -> Objective:
        return self._objective

    def place(self, number: int, model: nn.Module) -> None:
        name = self.names[number]
        weights, prefix = fitting(model, read_weights(name), name)
        if prefix and not self.notes:
            self.notes.append(
                f"the names in {name} begin with {prefix!r}, which is left out to fit the model"
            )
        model.load_state_dict(weights)

    def origin(self, number: int) -> dict[str, Any]:
        return {"file": str(Path(self.names[number]).absolute())}

    def described(self) -> dict[str, Any]:
        return {
            "function": self._function,
            "class": type(self._objective.model).__name__,
            "data": self._data or "",
        }


class _Given:
    """Batches of a user's own, the same for every checkpoint."""

    def __init__(self, found: Any, name: str, objective: Objective) -> None:
        self._found, self._objective = found, objective
        self.fingerprint: Mapping[str, Any] = {"source": name}
        self._batches: list[Batch] = []
        if isinstance(found, list):
            found = objective.listed(found)
        one = isinstance(found, (Tensor, Mapping, tuple)) or not isinstance(found, Iterable)
        self._left = iter([found]) if one else iter(found)

    def batch(self, *, seed: int, step: int, sequences: int, stream: str) -> list[Batch]:
        """Returns the first batches that hold so many sequences between them, the last one cut; fewer where they end."""
        from hessprobe.measuring.probe_batches import first_sequences

        while sum(self._objective.sequences(batch) for batch in self._batches) < sequences:
            try:
                self._batches.append(next(self._left))
            except StopIteration:
                break
        return list(first_sequences(MicroBatches(self._objective, self._batches), sequences))


def _made(function: Any, name: str, flag: str = "--model") -> Any:
    try:
        found = function()
    except Exception as error:  # whatever the user's function raises
        raise UserError(f"{flag} {name}: {reason_of(error)}; it is called without arguments") from error
    if flag == "--model" and not isinstance(found, (nn.Module, Objective)):
        raise UserError(
            f"{flag} {name} returned {type(found).__name__}; wanted an nn.Module or an hp.Objective"
        )
    return found


def _names_function(data: str) -> bool:
    return re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", data) is not None and not data.startswith("hub:")


def _vocabulary(model: nn.Module) -> int:
    """Returns how many tokens the model's first embedding knows; 0 where it has none."""
    return next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), 0)


def _safetensors(file: str) -> Any:
    try:
        return import_module("safetensors.torch")
    except ImportError as error:
        raise UserError(
            f"{file} needs the library 'safetensors', which is not installed here: pip install safetensors"
        ) from error


def _weights_in(held: Any) -> dict[str, Tensor] | None:
    """Returns the tensors by name in what a file holds, or None."""
    if not isinstance(held, Mapping):
        return None
    if held and all(isinstance(value, Tensor) for value in held.values()):
        return {str(name): value for name, value in held.items()}
    for place in _PLACES:
        if (found := _weights_in(held.get(place))) is not None:
            return found
    return None


def _renamings(weights: Mapping[str, Tensor]) -> Iterable[tuple[str, dict[str, Tensor]]]:
    """Yields the names as they are, and with what wrappers have put before all of them taken off, one after the other."""
    taken, current = "", dict(weights)
    yield taken, dict(current)
    while prefix := next((p for p in _PREFIXES if current and all(n.startswith(p) for n in current)), ""):
        taken, current = taken + prefix, {name.removeprefix(prefix): x for name, x in current.items()}
        yield taken, dict(current)
    inside = {name.replace("_orig_mod.", ""): x for name, x in weights.items()}  # of a part that was compiled
    if inside.keys() != weights.keys():
        yield "_orig_mod.", inside
        for prefix, renamed in _renamings(inside):
            yield f"_orig_mod. and {prefix}", renamed


def _tied(own: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Returns, by name, the other names of the same tensor."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, x in own.items():
        groups.setdefault((x.data_ptr(), x.shape, x.stride()) if x.numel() else (name,), []).append(name)
    return {name: [other for other in group if other != name] for group in groups.values() for name in group}
