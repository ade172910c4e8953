"""What a batch is: a tree of tensors that share a dimension of sequences; how to read one, cut one, and tell several apart.

A tree is a mapping, tuple, list, named tuple or dataclass of trees, or a tensor. Of its tensors those are the sequences'
whose first dimension (second, where sequences do not come first) has as many entries as the targets have sequences; all
others (scalars, masks over positions) belong to every sequence alike and stay whole.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from hessprobe.errors import UserError

Batch = Any  # (inputs, targets), a Hugging Face mapping with "labels", or whatever forward= and targets= take


def mapped(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    """Returns a tree of the same kind with function(tensor) in every tensor's place; anything else in it stays."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        parts = {key: mapped(value, function) for key, value in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return parts
        found = copy.copy(batch)  # a tokenizer's BatchEncoding, a defaultdict: its own kind may be asked for
        for key, value in parts.items():
            found[key] = value
        return found
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(mapped(value, function) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(mapped(value, function) for value in batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        found = copy.copy(batch)
        for field in fields(batch):
            if hasattr(batch, field.name):  # past a frozen dataclass's own refusal: the copy is ours
                object.__setattr__(found, field.name, mapped(getattr(batch, field.name), function))
        return found
    return batch


def tensors_of(batch: Batch) -> Iterator[Tensor]:
    """Yields the tensors of a tree; none of an object that is no tree."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_of(value)
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            yield from tensors_of(value)
    elif is_dataclass(batch) and not isinstance(batch, type):
        for field in fields(batch):
            yield from tensors_of(getattr(batch, field.name, None))


def count_of(tensor: Tensor, *, batch_first: bool = True) -> int:
    """Returns how many sequences a tensor of theirs holds; a tensor of one dimension has nothing but sequences."""
    if tensor.dim() == 0:
        raise UserError(
            "targets of no dimension: wanted a first dimension of sequences, as in (sequences,) or (sequences, positions)"
        )
    return tensor.shape[0 if batch_first or tensor.dim() == 1 else 1]


def sequences_first(targets: object, *, batch_first: bool) -> Tensor:
    """Returns what `targets` took out of a batch, with its sequences first.

    Raises:
        UserError: it is no tensor, or one of no dimension.
    """
    if not isinstance(targets, Tensor):
        raise UserError(
            f"targets are a {type(targets).__name__}: wanted a tensor, one target for every token; pass forward= and "
            "targets= to take the batch apart"
        )
    count_of(targets)
    return targets if batch_first or targets.dim() < 2 else targets.transpose(0, 1)


def outputs_first(outputs: object, *, batch_first: bool) -> Tensor:
    """Returns what a model or forward= returned for a batch, with its sequences first.

    Raises:
        UserError: it is no tensor.
    """
    if not isinstance(outputs, Tensor):
        raise UserError(
            f"forward= returned {said(outputs)}: wanted a tensor of outputs, class dimension last; pick it out, as in "
            "forward=lambda model, batch: model(batch[0])[0] (.logits of an object that has them)"
        )
    return outputs if batch_first or outputs.dim() < 2 else outputs.transpose(0, 1)


def pieces_of(
    batch: Batch, pieces: int, count: int | None = None, *, batch_first: bool = True
) -> list[Batch]:
    """Returns the batch as that many batches of its sequences, or whole where it holds fewer than two.

    Args:
        count: its sequences; default: the length that all of its tensors share, and whole where they share none.
    """
    if count is None:
        counts = {count_of(x, batch_first=batch_first) for x in tensors_of(batch) if x.dim()}
        count = counts.pop() if len(counts) == 1 else None
    if count is None or count < 2 or next(tensors_of(batch), None) is None:
        return [batch]
    size = -(-count // pieces)
    ends = [(start, min(start + size, count)) for start in range(0, count, size)]
    return [cut(batch, *end, count, batch_first=batch_first) for end in ends]


def cut(batch: Batch, start: int, stop: int, count: int, *, batch_first: bool = True) -> Batch:
    """Returns sequences start to stop of a batch of `count`: of every tensor of its tree that counts them.

    Raises:
        UserError: a batch that is no tree of tensors.
    """

    def part(x: Tensor) -> Tensor:
        if not x.dim() or count_of(x, batch_first=batch_first) != count:
            return x
        return x[start:stop] if batch_first or x.dim() == 1 else x[:, start:stop]

    if next(tensors_of(batch), None) is None:
        raise UserError(f"cannot take single sequences from a batch of type {type(batch).__name__}")
    return mapped(batch, part)


def rearranged(batch: Batch, order: Tensor, count: int, *, batch_first: bool = True) -> Batch | None:
    """Returns a batch of as many sequences with sequence order[i] in place i; None where none of its tensors counts them."""
    moved = False

    def part(x: Tensor) -> Tensor:
        nonlocal moved
        if not x.dim() or count_of(x, batch_first=batch_first) != count:
            return x
        moved = True
        return x.index_select(0 if batch_first or x.dim() == 1 else 1, order.to(x.device))

    found = mapped(batch, part)
    return found if moved else None


def listed(
    batches: Batch | list[Batch], targets: Callable[[Batch], Tensor], *, batch_first: bool = True
) -> list[Batch]:
    """Returns micro-batches as they are, or one batch as a list of one.

    A list is micro-batches only if its entries are batches, from which `targets` can be taken; a DataLoader's list of
    tensors is one batch, and comes back as a tuple.

    Raises:
        UserError: a list that is both.
    """
    if not isinstance(batches, list):
        return [batches]
    if not batches:
        return []
    whole = _read(batches, targets, batch_first)
    if whole is None:
        if all(isinstance(one, Tensor) and _read(one, targets, batch_first) is None for one in batches):
            targets(tuple(batches))  # neither: its own words on what a batch is
        return [tuple(one) if isinstance(one, list) else one for one in batches]
    picked = any(whole is x or whole.data_ptr() == x.data_ptr() for x in batches if isinstance(x, Tensor))
    if not picked and all(_read(one, targets, batch_first) is not None for one in batches):
        raise UserError(
            f"a list of {len(batches)}: targets= can read it both as one batch and as micro-batches; give one batch as a "
            "tuple, tuple(batch), and micro-batches as a list of tuples"
        )
    return [tuple(batches)]


def _read(batch: Batch, targets: Callable[[Batch], Tensor], batch_first: bool) -> Tensor | None:
    """Returns a batch's targets where they can be taken from it and count the sequences of one of its tensors."""
    try:
        found = targets(batch)
    except Exception:  # anything may be wrong with what is no batch
        return None
    if not isinstance(found, Tensor) or not found.dim():
        return None
    counts = [count_of(x, batch_first=batch_first) for x in tensors_of(batch) if x.dim()]
    return found if not counts or count_of(found, batch_first=batch_first) in counts else None


# How a mapping is handed to the model: without its labels, with decoder inputs made of them, or with them.
INPUTS, DECODER_INPUTS, LABELS = "inputs", "decoder inputs", "labels"


def default_forward(model: nn.Module, batch: Batch, feed: str = INPUTS) -> Tensor:
    """Returns the model's outputs for a mapping, or for the first entry of a pair (which may be nested).

    Args:
        feed: INPUTS, DECODER_INPUTS or LABELS: what a mapping's labels are for besides being targets.
    """
    found = called(model, batch, feed) if isinstance(batch, Mapping) else _of_pair(model, batch)
    z = logits_of(found)
    if z is None:
        inputs = (
            "**batch" if isinstance(batch, Mapping) else "batch" if isinstance(batch, Tensor) else "batch[0]"
        )
        raise UserError(
            f"{type(model).__name__} returned {said(found)}: wanted a tensor of outputs or an object with "
            f".logits; pass forward= that picks it out, as in forward=lambda model, batch: model({inputs})[0]"
        )
    return z


def called(model: nn.Module, batch: Mapping[str, Any], feed: str) -> Any:
    """Returns whatever the model returns for a mapping."""
    inputs = {key: value for key, value in batch.items() if feed == LABELS or key != "labels"}
    if feed != INPUTS and isinstance(batch.get("labels"), Tensor):
        # Some models write into labels (FSMT puts padding in place of -100): the batch is the caller's.
        batch = {**batch, "labels": batch["labels"].clone()}
        if feed == LABELS:
            inputs["labels"] = batch["labels"]
    if feed == DECODER_INPUTS and not {"decoder_input_ids", "decoder_inputs_embeds"} & set(batch):
        made: Any = (
            model.prepare_decoder_input_ids_from_labels
        )  # a method, as Hugging Face's encoder-decoders have it
        inputs["decoder_input_ids"] = made(labels=batch["labels"])
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return model(**inputs)


def logits_of(found: Any) -> Tensor | None:
    """Returns the tensor of outputs in what a model returned, None where it is not clear."""
    if isinstance(found, Tensor):
        return found
    if isinstance(found, Mapping) or hasattr(found, "logits"):
        z = found.get("logits") if isinstance(found, Mapping) else found.logits
        return z if isinstance(z, Tensor) else None
    if isinstance(found, tuple) and all(x is None or isinstance(x, Tensor) for x in found):
        tensors = [x for x in found if x is not None and x.dim()]  # (outputs, None), (loss, outputs)
        return tensors[0] if len(tensors) == 1 and len(found) > 1 else None
    return None


def _of_pair(model: nn.Module, batch: Batch) -> Any:
    """Returns whatever the model returns for the first entry: taken apart where its forward takes that many inputs."""
    if isinstance(batch, Tensor):
        return model(batch)  # targets= takes the targets out of it
    if not isinstance(batch, (tuple, list)) or not batch:
        raise UserError(
            f"wanted a batch (inputs, targets) or a mapping, got {said(batch)}: pass forward=lambda model, batch: ... to "
            "say how the model is called with it"
        )
    inputs = batch[0]
    if isinstance(inputs, Tensor) or not isinstance(inputs, (Mapping, Sequence)):
        return model(inputs)
    parameters = list(inspect.signature(model.forward).parameters.values())
    takes = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if isinstance(inputs, Mapping):
        names = {p.name for p in parameters}
        apart = set(inputs) <= names or any(p.kind is p.VAR_KEYWORD for p in parameters)
        return model(**inputs) if apart else model(inputs)
    needed = sum(p.default is p.empty for p in takes)
    several = any(p.kind is p.VAR_POSITIONAL for p in parameters) or needed > 1
    return model(*inputs) if several else model(inputs)


def default_targets(batch: Batch) -> Tensor:
    """Returns a batch's labels, or the second of a pair."""
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise UserError(
                f"the batch has keys {', '.join(batch)} but no 'labels'; pass targets= to say where they are"
            )
        return batch["labels"]
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        how = (
            ": for token ids, forward=lambda model, ids: model(ids[:, :-1]), targets=lambda ids: ids[:, 1:]"
            if isinstance(batch, Tensor)
            else ""
        )
        raise UserError(
            f"wanted a batch (inputs, targets) or a mapping with 'labels', got {said(batch)}; pass forward= "
            f"and targets= to take it apart{how}"
        )
    return batch[1]


def said(thing: object) -> str:
    """Returns what a batch, or what a model returned, is in words."""
    if isinstance(thing, Tensor):
        return f"Tensor of shape {tuple(thing.shape)}"
    if isinstance(thing, (tuple, list)):
        return f"{type(thing).__name__} of {len(thing)}"
    return type(thing).__name__
