"""Checkpoints are measured as training would have measured them; one that fails leaves its reason, the others go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr

from hessprobe.checkpoints import measure_series as series_run
from hessprobe.checkpoints.measure_series import measure_series, open_series
from hessprobe.checkpoints.series import steps_of
from hessprobe.errors import RunFailed, UserError
from hessprobe.models.pretrained import Pretrained
from hessprobe.problem.partition import Partition
from hessprobe.recipe import GNHessianRecipe
from hessprobe.text.corpus import Corpus
from hessprobe.text.labelled_texts import LabelledTexts
from hessprobe.text.masked_corpus import MaskedCorpus
from hessprobe.training import loop
from hessprobe.training.loop import train
from tests.checkpoints.hugging_face import hub_folder, labelled_file, save_model, save_tokenizer, saved
from tests.training.runs import attributes, recipe, tables, text_file

MEASURED = 'probes=["cross_layer"]'
FEW = (MEASURED, "cross_layer.sequences=6", "training.threads=1")
CLOCK = {"seconds", "peak_memory"}


def measured(models: list[Path], out: Path, *settings: str, **given: Any) -> xr.Dataset:
    """Returns the table cross_layer of a series."""
    measure_series(open_series([str(model) for model in models], settings, **given), out)
    return tables(out)["cross_layer"]


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a run of three steps, measured at each, that has kept its checkpoint after each."""
    folder = tmp_path_factory.mktemp("series") / "run"
    kept = loop.save_checkpoint

    def keep(folder: Path, *, step: int, **state: Any) -> None:
        kept(folder, step=step, **state)
        shutil.copy(folder / "checkpoint" / "state.pt", folder / "checkpoint" / f"after-{step}.pt")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", keep)
        settings = ("optimizer.name=adamw", "training.steps=3", "cross_layer.every=1", MEASURED)
        train(recipe(folder, *settings), folder)
    return folder


class TestOwnRuns:
    """A run's checkpoint: model, data and settings come from the run."""

    def test_each_row_is_what_training_measured_there_but_for_the_update(self, series, tmp_path):
        files = [series / "checkpoint" / f"after-{step}.pt" for step in (1, 2)]
        found = measured(files, tmp_path / "out")
        wanted = tables(series)["cross_layer"].sel(step=[1, 2])
        assert found.step.values.tolist() == [1, 2]
        about_update = {"step_curvature", "step_slope", "alignment"}
        for name in set(wanted.variables) - CLOCK - about_update:
            np.testing.assert_array_equal(found[name].values, wanted[name].values, name)
        for name in about_update:
            assert found[name].sel(direction="update").isnull().all(), name
            np.testing.assert_array_equal(
                found[name].sel(direction="negative_gradient"),
                wanted[name].sel(direction="negative_gradient"),
            )

    def test_a_runs_folder_means_its_last_checkpoint_and_the_log_says_where_all_came_from(
        self, series, tmp_path
    ):
        out = tmp_path / "out"
        found = measured([series], out)
        assert found.step.values.tolist() == [3] and not any(found.failure.values)
        said = attributes(out)
        wanted = attributes(series)
        assert (
            said["seed"] == 0 and said["data"] == wanted["data"] and said["partition"] == wanted["partition"]
        )
        origin = json.loads(said["checkpoints"])["3"]
        assert origin["step"] == 3 and len(origin["sha256"]) == 64
        described = json.loads(said["recipe"])
        assert described["checkpoints"] == {"3": str(series)} and described["model"]["width"] == 8
        assert "optimizer" not in described and "every" not in described["cross_layer"]
        assert f"hessprobe probe {series}" in (out / "recipe.toml").read_text().splitlines()[0]

    def test_settings_data_and_seed_can_be_others(self, series, tmp_path):
        other = tmp_path / "other.txt"
        other.write_text("quite another text " * 90)
        out = tmp_path / "out"
        found = measured(
            [series], out, "seed=5", "cross_layer.method=products", data=str(other), sequences=4, context=6
        )
        assert found.sequences.item() == 4 and found.tokens.item() == 4 * 6
        assert json.loads(attributes(out)["data"])["source"] == str(other)
        assert attributes(out)["seed"] == 5

    def test_a_preset_wins_over_the_values_a_run_has_stored(self, series):
        chosen = open_series([str(series)], ["gn_hessian.preset=deep"]).recipe
        assert chosen.gn_hessian == GNHessianRecipe(preset="deep") != GNHessianRecipe()
        assert chosen.cross_layer.sequences == 4  # as stored

    def test_runs_that_ended_at_one_step_are_counted(self, series, tmp_path, capsys):
        twin = tmp_path / "twin"
        shutil.copytree(series, twin)
        found = measured([series, twin], tmp_path / "out")
        assert found.step.values.tolist() == [0, 1]
        np.testing.assert_array_equal(found.loss.values[0], found.loss.values[1])  # on one and the same batch
        assert "checkpoints share a step, so they are counted 0 .. 1" in capsys.readouterr().err

    def test_measuring_disturbs_neither_checkpoint_nor_random_state(self, series, tmp_path):
        before, state = (series / "checkpoint" / "state.pt").read_bytes(), torch.random.get_rng_state()
        measured([series], tmp_path / "out")
        assert (series / "checkpoint" / "state.pt").read_bytes() == before
        assert torch.equal(torch.random.get_rng_state(), state)


class TestPretrained:
    """Models of transformers, read through their own tokenizers, judged by the library's own loss."""

    @pytest.mark.parametrize("kind", ["gpt2", "llama"])
    def test_a_causal_models_loss_and_gradient_are_the_librarys(self, kind, tmp_path):
        folder, text = saved(tmp_path / kind, kind), str(text_file(tmp_path))
        row = measured([folder], tmp_path / "out", *FEW, data=text, context=12).isel(step=0)
        corpus = Corpus.open(text, context=12, tokenizer=str(folder / "tokenizer.json"))
        inputs, targets = corpus.batch(seed=0, step=0, sequences=6, stream="probe/cross_layer")
        model = Pretrained.find(str(folder)).load()
        loss = F.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten())
        loss.backward()
        np.testing.assert_allclose(row.loss.item(), loss.item(), rtol=1e-5)
        named = {name: p.grad for name, p in model.named_parameters()}
        partition = Partition.of(model)
        norms = [
            sum(named[n].square().sum().item() for n in partition.parameters_of(b)) for b in partition.blocks
        ]
        assert row.block.values.tolist() == list(partition.blocks)
        np.testing.assert_allclose(row.gradient_norm2.values, norms, rtol=1e-4)
        assert row.tokens.item() == 6 * 12

    def test_a_masked_models_loss_is_the_librarys(self, tmp_path):
        folder, text = saved(tmp_path / "bert", "bert"), str(text_file(tmp_path))
        row = measured([folder], tmp_path / "out", *FEW, data=text, context=12).isel(step=0)
        tokenizer = str(folder / "tokenizer.json")
        corpus = MaskedCorpus.of(Corpus.open(text, context=12, tokenizer=tokenizer), tokenizer)
        batch = corpus.batch(seed=0, step=0, sequences=6, stream="probe/cross_layer")
        with torch.no_grad():
            loss = Pretrained.find(str(folder)).load()(**batch).loss
        np.testing.assert_allclose(row.loss.item(), loss.item(), rtol=1e-5)
        assert row.tokens.item() == int((batch["labels"] >= 0).sum()) > 0
        assert (row.fro2 > 0).all()

    def test_a_classifiers_loss_is_the_librarys(self, tmp_path, capsys):
        folder, texts = saved(tmp_path / "bert", "classifier"), str(labelled_file(tmp_path))
        row = measured([folder], tmp_path / "out", *FEW, data=texts, context=12).isel(step=0)
        tokenizer = str(folder / "tokenizer.json")
        read = LabelledTexts.open(texts, tokenizer=tokenizer, context=12, classes=3, pad=0)
        batch = read.batch(seed=0, step=0, sequences=6, stream="probe/cross_layer")
        assert not batch["attention_mask"].all()  # some are padded
        with torch.no_grad():
            loss = Pretrained.find(str(folder)).load()(**batch).loss
        np.testing.assert_allclose(row.loss.item(), loss.item(), rtol=1e-5)
        assert row.tokens.item() == 6
        assert list(row.block.values) == [
            "embedding",
            "block.0",
            "block.1",
            "head",
        ]  # the pooler stands before the head

    def test_trainers_folder_is_a_series_at_its_own_steps_on_one_batch(self, tmp_path):
        run = tmp_path / "trained"
        for step in (1000, 500, 250):
            save_model(run / f"checkpoint-{step}", "gpt2", seed=step)
        save_tokenizer(run, ["<|endoftext|>"])
        text = str(text_file(tmp_path))
        found = measured([run], tmp_path / "all", *FEW, data=text, context=12)
        assert found.step.values.tolist() == [250, 500, 1000]
        assert len(set(found.loss.values.tolist())) == 3
        alone = measured([run / "checkpoint-500"], tmp_path / "one", *FEW, data=text, context=12)
        for name in set(found.data_vars) - CLOCK:
            np.testing.assert_array_equal(found[name].sel(step=[500]).values, alone[name].values, name)
        origins = json.loads(attributes(tmp_path / "all")["checkpoints"])
        assert len({origin["sha256"]["model.safetensors"] for origin in origins.values()}) == 3

    def test_one_whose_weights_are_damaged_is_marked_and_the_others_go_on(self, tmp_path, capsys):
        run = tmp_path / "trained"
        for step in (1, 2, 3):
            save_model(run / f"checkpoint-{step}", "gpt2", seed=step)
        save_tokenizer(run, ["<|endoftext|>"])
        (run / "checkpoint-2" / "model.safetensors").write_bytes(b"not weights")
        found = measured([run], tmp_path / "out", *FEW, data=str(text_file(tmp_path)), context=12)
        assert found.step.values.tolist() == [1, 2, 3]
        assert "checkpoint-2 cannot be loaded" in found.failure.values[1]
        assert found.failure.values[[0, 2]].tolist() == ["", ""]
        assert np.isfinite(found.loss.values[[0, 2]]).all() and np.isnan(found.loss.values[1])
        assert "cross_layer: failed on" in capsys.readouterr().err

    def test_a_hub_data_set_and_token_shards_are_read_too(self, tmp_path):
        folder = saved(tmp_path / "gpt2", "gpt2")
        hub = measured([folder], tmp_path / "a", *FEW, data=f"hub:{hub_folder(tmp_path / 'set')}", context=12)
        (folder / "tokenizer.json").unlink()
        shards = tmp_path / "tokens.bin"
        np.random.default_rng(0).integers(0, 280, 4000).astype("<u2").tofile(shards)
        plain = measured([folder], tmp_path / "b", *FEW, data=str(shards), context=12)
        assert np.isfinite([hub.loss.item(), plain.loss.item()]).all()
        assert json.loads(attributes(tmp_path / "a")["data"])["kind"] == "hub stream"
        assert json.loads(attributes(tmp_path / "b")["data"])["kind"] == "tokens"

    def test_a_large_vocabulary_comes_in_micro_batches_and_changes_nothing(self, tmp_path, monkeypatch):
        folder, text = saved(tmp_path / "gpt2", "gpt2"), str(text_file(tmp_path))
        whole = measured([folder], tmp_path / "whole", *FEW, data=text, context=12)
        sizes = []
        original = series_run.pieces_of
        monkeypatch.setattr(series_run, "LOGITS", 2 * 12 * 280)
        monkeypatch.setattr(series_run, "pieces_of", lambda batch, n: sizes.append(n) or original(batch, n))
        cut = measured([folder], tmp_path / "cut", *FEW, data=text, context=12)
        assert sizes == [3]
        np.testing.assert_allclose(cut.fro2.values, whole.fro2.values, rtol=1e-4)
        np.testing.assert_allclose(cut.loss.values, whole.loss.values, rtol=1e-5)

    def test_the_other_instruments_measure_too_and_what_is_about_an_update_is_not_a_number(self, tmp_path):
        folder = saved(tmp_path / "gpt2", "gpt2")
        small = (
            'probes=["gn_hessian", "preconditioner"]', "gn_hessian.samples=2", "gn_hessian.lanczos_steps=2",
            "gn_hessian.lanczos_probes=1", "gn_hessian.cg_iterations=2", "gn_hessian.alphas=[1.0]",
            'preconditioner.candidates=["gradient", "update"]', "preconditioner.dampings=[0.1]",
            "preconditioner.cg_iterations=2",
        )  # fmt: skip
        out, text = tmp_path / "out", str(text_file(tmp_path))
        measure_series(open_series([str(folder)], small, data=text, sequences=4, context=8), out)
        hessian, scores = (tables(out)[name].isel(step=0) for name in ("gn_hessian", "preconditioner"))
        assert hessian.failure.item() == scores.failure.item() == ""
        assert hessian.gn_gap.item() > 0
        assert np.isfinite(scores.efficiency_held_out.sel(candidate="gradient")).all()
        assert scores.efficiency_held_out.sel(candidate="update").isnull().all()
        assert "not known" in scores.candidate_failure.sel(candidate="update").item()


def test_where_no_row_can_be_measured_the_run_has_failed_and_its_log_says_why(tmp_path):
    folder = saved(tmp_path / "bert", "classifier")
    few = str(labelled_file(tmp_path, count=5))
    with pytest.raises(RunFailed, match="no row could be measured.*holds 5 texts, and a row reads 6"):
        measured([folder], tmp_path / "out", *FEW, data=few, context=12)
    assert "--sequences 5 or fewer" in tables(tmp_path / "out")["cross_layer"].failure.item()


@pytest.mark.parametrize(
    ("known", "steps", "said"),
    [
        ([500, 1000], [500, 1000], ""),
        ([1000, 500], [1000, 500], ""),
        ([None], [0], ""),
        ([0, None, 2], [0, 1, 2], "not every checkpoint says its step"),
        ([7, 7], [0, 1], "share a step"),
    ],
)
def test_the_step_axis(known, steps, said):
    found, why = steps_of(known)
    assert found == steps and said in why and bool(why) == bool(said)


def test_a_mistake_in_a_probes_section_is_told_before_there_is_a_folder(series, tmp_path):
    with pytest.raises(UserError, match="block.7"):
        measured([series], tmp_path / "out", 'probes=["gn_hessian"]', 'gn_hessian.density_blocks=["block.7"]')
    assert not (tmp_path / "out").exists()
