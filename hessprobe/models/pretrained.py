"""Models that transformers saved, in a folder or on the Hugging Face Hub: what one is, told before its weights are read.

A causal, a masked and a sequence-classification head are known; what else there is, is refused by name.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hessprobe.errors import UserError, first_line
from hessprobe.text.hub import offline

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
CAUSAL, MASKED, CLASSIFICATION = "causal", "masked", "classification"
_MAKERS = {
    CAUSAL: "AutoModelForCausalLM",
    MASKED: "AutoModelForMaskedLM",
    CLASSIFICATION: "AutoModelForSequenceClassification",
}
_ENDINGS = {
    "ForCausalLM": CAUSAL,
    "LMHeadModel": CAUSAL,
    "ForMaskedLM": MASKED,
    "ForSequenceClassification": CLASSIFICATION,
}
_KNOWN = "a model saved as ...ForCausalLM, ...LMHeadModel, ...ForMaskedLM or ...ForSequenceClassification"
_WITHOUT = "a run's folder, its checkpoint/state.pt, or a folder written by save_pretrained"
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(@[\w./-]+)?")
_STEP = re.compile(r"(?:checkpoint|global_?step|step)[-_]?(\d+)")
# What differs between checkpoints of one model without being another model.
_VOLATILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"}


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """One checkpoint of transformers, its weights not yet read.

    Attributes:
        name: as it was given: a folder, NAME or NAME@REVISION on the Hub.
        kind: "causal", "masked" or "classification".
        config: the library's own.
    """

    name: str
    kind: str
    config: Any
    transformers: Any

    @classmethod
    def find(cls, name: str) -> Pretrained:
        """Returns the checkpoint of that name, from what its configuration says.

        Raises:
            UserError: nothing of that name, no network for the Hub, the library missing, or a kind not known here.
        """
        source, revision = _taken_apart(name)
        if not Path(source).is_dir() and not _HUB_NAME.fullmatch(name):
            raise UserError(f"no model at {name!r}: there is no such file or folder; give {_WITHOUT}")
        transformers = _library(name)
        reason = "" if Path(source).is_dir() else offline()
        with _quiet(transformers):
            try:
                # Without a network, what was downloaded before still serves.
                config = transformers.AutoConfig.from_pretrained(
                    source, revision=revision, local_files_only=bool(reason), trust_remote_code=False
                )
            except (
                Exception
            ) as error:  # from a dozen libraries' types: nothing there, no such model, its own code
                raise _not_found(name, source, reason or first_line(error)) from error
        return cls(name=name, kind=_kind(name, config), config=config, transformers=transformers)

    @property
    def step(self) -> int | None:
        """The training step it was saved at: that of checkpoint-500 or NAME@step500; None where nothing says it."""
        source, revision = _taken_apart(self.name)
        found = _STEP.fullmatch((revision or Path(source).resolve().name).rpartition("/")[2])
        return int(found[1]) if found else None

    @property
    def vocabulary(self) -> int:
        """Token ids are 0 .. vocabulary - 1."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def positions(self) -> int | None:
        """The most tokens a sequence may have; None where the model knows no bound."""
        found = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return int(found) if isinstance(found, int) and found > 0 else None

    @property
    def tokenizer(self) -> str | None:
        """Its tokenizer by the name load_tokenizer takes: of its folder, or the one above; None where neither has one."""
        source, _ = _taken_apart(self.name)
        if not Path(source).is_dir():
            return source
        places = (Path(source) / TOKENIZER, Path(source).resolve().parent / TOKENIZER)
        return next((str(place) for place in places if place.is_file()), None)

    @property
    def origin(self) -> dict[str, Any]:
        """JSON-able facts that tell one checkpoint from another. Cost: its weights' files are read, for their hash."""
        source, revision = _taken_apart(self.name)
        facts: dict[str, Any] = {"path": self.name, "architecture": self.config.architectures[0]}
        if not Path(source).is_dir():
            return facts | {"revision": revision, "commit": getattr(self.config, "_commit_hash", None)}
        files = sorted([*Path(source).glob("*.safetensors"), *Path(source).glob("pytorch_model*.bin")])
        return facts | {"sha256": {file.name: _sha256(file) for file in files}}

    def differs(self, other: Pretrained) -> str:
        """Returns in words where another checkpoint's model is not this one; "" where only weights can differ."""
        if self.kind != other.kind or self.config.model_type != other.config.model_type:
            return f"{self.config.architectures[0]} there and {other.config.architectures[0]} here"
        mine, theirs = (
            {key: value for key, value in c.to_dict().items() if key not in _VOLATILE}
            for c in (self.config, other.config)
        )
        apart = [key for key in {**mine, **theirs} if mine.get(key) != theirs.get(key)]
        return ", ".join(f"{key} is {mine.get(key)} there and {theirs.get(key)} here" for key in apart[:3])

    def load(self) -> nn.Module:
        """Returns the model in float32, on the CPU, all of its weights from the checkpoint.

        Raises:
            UserError: weights that are missing, damaged, or of another model.
        """
        source, revision = _taken_apart(self.name)
        with _quiet(self.transformers):
            try:
                model, found = getattr(self.transformers, _MAKERS[self.kind]).from_pretrained(
                    source,
                    config=self.config,
                    revision=revision,
                    dtype=torch.float32,
                    output_loading_info=True,
                    local_files_only=Path(source).is_dir() or bool(offline()),
                    trust_remote_code=False,
                )
            except Exception as error:  # the library and its formats raise a dozen types
                raise UserError(
                    f"the weights of {self.name} cannot be loaded: {first_line(error)}; copy or download it again"
                ) from error
        if missing := sorted(found["missing_keys"]):  # drawn at random, which would be measured as if trained
            raise UserError(
                f"{self.name} holds no weights for {', '.join(missing[:3])}{' ...' if missing[3:] else ''}: it was not "
                f"saved as {self.config.architectures[0]}; give {_KNOWN}, all of it"
            )
        model.config.use_cache = False  # a cache of keys and values is nothing that derivatives need
        return model


def _taken_apart(name: str) -> tuple[str, str | None]:
    """Returns (folder or Hub name, revision); a folder's name may hold an @."""
    path = Path(os.path.expanduser(name))
    if path.exists():
        return str(path), None
    source, at, revision = name.partition("@")
    return source, revision if at else None


def _kind(name: str, config: Any) -> str:
    saved = (getattr(config, "architectures", None) or ["no architecture named in its config.json"])[0]
    kind = next((kind for ending, kind in _ENDINGS.items() if saved.endswith(ending)), None)
    if kind is None or getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{name} is a {config.model_type} model ({saved}): wanted {_KNOWN}")
    problem = getattr(config, "problem_type", None)
    if kind == CLASSIFICATION and (
        config.num_labels < 2 or problem not in (None, "single_label_classification")
    ):
        raise UserError(
            f"{name} is no classifier with one label per text ({config.num_labels} label(s), problem_type {problem}), "
            "so its loss is not cross-entropy; measure it in your own loop with hp.Recorder and a loss of yours"
        )
    return kind


def _not_found(name: str, source: str, reason: str) -> UserError:
    if Path(source).is_dir():
        return UserError(f"the model in {name} is not one that transformers can read: {reason}")
    return UserError(
        f"no model {name!r}: no such folder here, and not to be had from the Hugging Face Hub ({reason}). "
        f"Offline give {_WITHOUT}"
    )


def _library(name: str) -> Any:
    """Returns transformers.

    Raises:
        UserError: it is not installed, or cannot be imported.
    """
    _hide_broken_torchvision()
    try:
        return import_module("transformers")
    except ImportError as error:
        raise UserError(
            f"{name} is no run of hessprobe, and for models of others the library 'transformers' is needed, which cannot "
            f"be imported here ({first_line(error)}): pip install 'hessprobe[hf]'. Without it: a run's folder, or its "
            "checkpoint/state.pt"
        ) from error


def _hide_broken_torchvision() -> None:
    """Lets transformers see no torchvision where the installed one cannot be imported, or its text models cannot either.

    backpack's requirements bring one that does not fit a CPU build of torch. Nobody in this process could use it.
    """
    if "torchvision" in sys.modules or find_spec("torchvision") is None:
        return
    try:
        import_module("torchvision")
    except Exception:  # built for another torch, it raises RuntimeError, not ImportError
        for module in [module for module in sys.modules if module.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
        sys.modules["torchvision"] = None  # type: ignore[assignment]


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silences the library's bars and reports; what matters of them is raised here in a line."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
