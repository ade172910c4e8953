"""From a recipe to the things a run needs: device, corpus, model, and a log that says where its numbers come from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from hessprobe.errors import UserError
from hessprobe.machine.processes import ALONE, Processes
from hessprobe.measuring.provenance import machine_attributes
from hessprobe.models.transformer import SIZES, Decoder, DecoderConfig
from hessprobe.problem.partition import Partition
from hessprobe.recipe import Recipe
from hessprobe.store.writer import RunWriter
from hessprobe.text.corpus import Corpus
from hessprobe.text.hub_corpus import HUB, HubCorpus
from hessprobe.training.checkpoint import Start

RECIPE_FILE = "recipe.toml"


def decoder_config(recipe: Recipe) -> DecoderConfig:
    """Returns the decoder's shape: the named size with the recipe's own numbers in place.

    Raises:
        UserError: numbers that make no decoder.
    """
    own = recipe.model.model_dump(exclude={"size"}, exclude_none=True)
    return replace(SIZES[recipe.model.size], **own)


def open_corpus(recipe: Recipe) -> Corpus | HubCorpus:
    """Returns the recipe's corpus, its windows as long as the model's context."""
    config, data = decoder_config(recipe), recipe.data
    if data.source.startswith(HUB):
        return HubCorpus.open(
            data.source,
            context=config.context,
            vocabulary=config.vocabulary,
            tokenizer=data.tokenizer,
            end_of_text=data.end_of_text,
        )
    return Corpus.open(
        data.source,
        context=config.context,
        held_out_fraction=data.held_out_fraction,
        vocabulary=config.vocabulary,
        tokenizer=data.tokenizer,
        end_of_text=data.end_of_text,
    )


def check_shares(recipe: Recipe, processes: Processes) -> None:
    """Raises where a batch is too small to be shared.

    Raises:
        UserError: fewer sequences than processes; each setting is named.
    """
    own = {"gn_hessian.sequences": recipe.gn_hessian.sequences}
    own["cross_layer.sequences"] = recipe.cross_layer.sequences
    own["preconditioner.curvature_sequences"] = recipe.preconditioner.curvature_sequences[0]
    own["preconditioner.held_out_sequences"] = recipe.preconditioner.held_out_sequences
    read = {
        "optimizer.sequences": recipe.optimizer.sequences,
        "data.held_out_sequences": recipe.data.held_out_sequences,
        **{setting: count for setting, count in own.items() if setting.partition(".")[0] in recipe.probes},
    }
    if few := [f"{setting} = {count}" for setting, count in read.items() if count < processes.count]:
        raise UserError(
            f"{', '.join(few)}: wanted at least {processes.count}, a sequence for each of the {processes.count} processes. "
            f"Give more with --set, or start at most {min(read.values())} with --nproc-per-node"
        )


def check_same_text(corpus: Corpus | HubCorpus, processes: Processes) -> None:
    """Raises where processes, as on several machines, read different texts.

    Raises:
        UserError: names the first of them.
    """
    found = processes.gathered(str(corpus.fingerprint["sha256"]))
    if others := [rank for rank, sha256 in enumerate(found) if sha256 != found[0]]:
        raise UserError(
            f"data.source: process {others[0]} of {processes.count} reads another text than the first (sha256 "
            f"{found[others[0]]} and {found[0]}); put the same files at the same place on every machine"
        )


def build_model(recipe: Recipe, device: torch.device) -> Decoder:
    """Returns the decoder with its initial weights, drawn on the CPU so that a seed means the same everywhere."""
    generator = torch.Generator().manual_seed(recipe.seed)
    return Decoder(decoder_config(recipe), generator=generator).to(device)


def start_log(
    recipe: Recipe,
    folder: Path,
    device: torch.device,
    corpus: Corpus | HubCorpus,
    partition: Partition,
    *,
    resume: bool,
    start: Start | None = None,
    processes: Processes = ALONE,
) -> RunWriter:
    """Returns the writer of a new run's log, with its recipe beside it, or of the one to resume.

    Args:
        start: the other run's weights that this one starts from; in a resumed one only if it must load them again.

    Raises:
        UserError: a folder that cannot be written, that holds a run already, or that was begun from other weights
            or on another text.
    """
    if resume:
        writer = RunWriter.reopen(folder)
        began = json.loads(writer.attributes.get("start_from", "{}"))
        if start and began.get("parameters_sha256") != start.origin["parameters_sha256"]:
            writer.close()
            raise UserError(
                f"--resume: {folder} has taken no step yet, and {recipe.training.start_from!r} no longer holds the "
                "weights it was started from: put them back, or start a new run with another --out"
            )
        before, now = json.loads(writer.attributes["data"]).get("sha256"), corpus.fingerprint["sha256"]
        if before != now:
            writer.close()
            raise UserError(
                f"--resume: the text at {recipe.data.source!r} is not what {folder} was trained on (sha256 {before} "
                f"then, {now} now): put it back, or start a new run with another --out"
            )
    else:
        writer = RunWriter.create(
            folder, run_attributes(recipe, folder, device, corpus, partition, start, processes)
        )
    try:
        # For people; what --resume compares with is the log's own copy, which no kill can cut off.
        (folder / RECIPE_FILE).write_text(recipe.to_toml(), encoding="utf-8")
    except OSError as error:
        writer.close()
        raise UserError(
            f"cannot write {folder / RECIPE_FILE} ({error.strerror}): no step was taken. Free some space there and "
            "go on with --resume, or give another folder"
        ) from error
    return writer


def run_attributes(
    recipe: Recipe,
    folder: Path,
    device: torch.device,
    corpus: Corpus | HubCorpus,
    partition: Partition,
    start: Start | None = None,
    processes: Processes = ALONE,
) -> dict[str, object]:
    """Returns the root attributes of a log: everything needed to know where its numbers come from."""
    return {
        **machine_attributes(folder, device, partition, processes),
        "recipe": recipe.model_dump_json(),
        "seed": recipe.seed,
        "data": json.dumps(dict(corpus.fingerprint)),
        **({"start_from": json.dumps(start.origin)} if start else {}),
    }
