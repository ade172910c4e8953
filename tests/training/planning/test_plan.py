"""A dry run says what a recipe would do without data or network; the paper's recipes have the paper's numbers."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from hessprobe.models.transformer import Decoder, DecoderConfig
from hessprobe.problem.objective import Objective
from hessprobe.problem.partition import Partition
from hessprobe.recipe import OPTIMIZERS, OptimizerRecipe, build_recipe, read_recipe, shipped_recipes
from hessprobe.text import corpus, hub_corpus
from hessprobe.training.builds import decoder_config
from hessprobe.training.loop import train
from hessprobe.training.optimizers import build_optimizer
from hessprobe.training.planning.estimate import GPU_SPEED, _saved_bytes, cost, memory, seconds
from hessprobe.training.planning.measuring_plan import plan_measuring
from hessprobe.training.planning.plan import plan, run_seconds, study_seconds
from hessprobe.training.study import run_study
from tests.training.runs import tables, text_file

PAPER = {
    "paper_45m": {
        "parameters": "45,363,712", "step": "128 minibatches of 32 sequences: 4,194,304 tokens, and 4,194,304 for",
        "steps": "215, 11 of them AdamW's warm-up: 901,775,360 tokens",
    },
    "paper_150m": {
        "parameters": "134,142,720", "step": "1,831 minibatches of 128 sequences: 239,992,832 tokens, and 239,992,832",
        "steps": "60 at most, until held-out loss 3.25, 3 of them AdamW's warm-up",
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Makes a plan that opens a corpus or a connection fail."""
    if "shrunken" in request.node.name:
        return

    def refuse(*_, **__):
        raise AssertionError("a dry run reads nothing")

    monkeypatch.setattr(corpus.Corpus, "open", refuse)
    monkeypatch.setattr(hub_corpus.HubCorpus, "open", refuse)
    monkeypatch.setattr(socket, "socket", refuse)


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_has_a_plan(name):
    text = plan(build_recipe(read_recipe(name)))
    for part in (
        "embedding",
        "block.0",
        "head",
        "total",
        "tokens",
        "gradients of a minibatch",
        "at the peak",
    ):
        assert part in text


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_recipes_have_the_papers_numbers(name):
    recipe = build_recipe(read_recipe(name))
    text = plan(recipe)
    for part in PAPER[name].values():
        assert part in text
    assert recipe.data.source == "hub:allenai/c4/en" and recipe.data.tokenizer == "t5-base"
    optimizer, training = recipe.optimizer, recipe.training
    assert optimizer.warmup_steps / training.steps == pytest.approx(0.05, rel=0.03)
    assert (optimizer.inner_solver, optimizer.clip, optimizer.warm_start) == ("muon", 1.0, True)
    assert optimizer.step_sizes == 5 and optimizer.searched == optimizer.minibatches
    if name == "paper_45m":
        read = training.steps * optimizer.minibatches * optimizer.sequences * 1024
        assert read == pytest.approx(0.9e9, rel=0.01)


def test_a_study_lists_its_runs():
    text = plan(build_recipe(read_recipe("iteration_complexity")))
    study = build_recipe(read_recipe("iteration_complexity")).study
    assert study is not None
    runs = 3 + sum(len(v.learning_rates) + 2 for v in study.variants)
    assert f"{runs} runs at 3 seeds" in text
    for variant in study.variants:
        assert f"\n{variant.name}, learning rates" in text
    assert "at 5 seeds" in plan(build_recipe(read_recipe("iteration_complexity")), seeds=5)


def test_the_short_study_fits_eight_minutes_of_one_gpu():
    recipe = build_recipe(read_recipe("paper_45m_short"))
    text = plan(recipe)
    assert recipe.study is not None and "does not fit" not in text
    assert [v.name for v in recipe.study.variants] == ["full_gn", "layerwise_gn", "adamw", "soap", "muon"]
    assert recipe.data == build_recipe(read_recipe("paper_45m")).data and "45,363,712" in text
    spent = study_seconds(recipe, 1)
    # Reading, judging on held-out text and starting six times are not counted.
    assert 120 < spent < 0.7 * 480 and f"about {spent / 60:.1f} min" in text


def test_one_outer_step_of_the_large_model_fits_a_gpu_and_a_minute():
    recipe = build_recipe(read_recipe("paper_150m_short"))
    text = plan(recipe)
    assert "134,142,720" in text and "does not fit" not in text
    assert recipe.training.steps - recipe.optimizer.warmup_steps == 1
    model = Decoder(decoder_config(recipe), generator=None)
    assert run_seconds(recipe, model, Partition.of(model)) < 60
    assert all(probe.memory < 80e9 for probe in plan_measuring(recipe))


def test_a_gradients_seconds_are_six_operations_a_token_and_weight():
    model, partition = problem(context=1)
    embedding = model.embedding.weight.numel()
    norms = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    attention = 2 * 2 * 16  # of each token to itself
    expected = 6 * (partition.size - embedding - norms + attention)
    assert seconds(10, 3, model.config) * GPU_SPEED == pytest.approx(30 * expected)


def test_what_does_not_fit_a_gpu_says_how_it_would():
    wide = "model.vocabulary=250000"
    text = plan(build_recipe(read_recipe("paper_150m"), [wide]))
    assert "does not fit 80 GB; 2 sequences a minibatch would (--set optimizer.sequences=)" in text
    smaller = build_recipe(read_recipe("paper_150m"), [wide, "optimizer.sequences=2"])
    assert "does not fit" not in plan(smaller) and smaller.optimizer.batch == 234368
    huge = build_recipe(read_recipe("paper_150m"), ["model.context=65536", "optimizer.sequences=1"])
    assert "nor does a minibatch of 1 sequence" in plan(huge)


def test_a_minibatch_is_worked_on_in_pieces_whose_memory_counts():
    text = plan(build_recipe(read_recipe("paper_150m")))
    assert "does not fit" not in text
    assert "float32, 8 sequences of a minibatch at a time" in text
    assert "one minibatch at a time" in plan(build_recipe(read_recipe("nano")))


@pytest.mark.parametrize(("sequences", "context"), [(128, 1024), (9, 3000), (3, 9000), (32, 64), (129, 64)])
def test_the_pieces_are_those_of_the_objective(sequences, context):
    model, partition = problem(context=context)
    objective = Objective(model)
    objective._splits = True  # without running so many tokens
    tokens = torch.zeros(sequences, context, dtype=torch.long)
    largest = max(len(inputs) for inputs, _ in objective.pieces((tokens, tokens)))
    recipe = OptimizerRecipe(name="full_gn", minibatches=1, sequences=sequences, learning_rate=1e-3)
    assert memory(recipe, model, partition).sequences == largest


def config(**changes) -> DecoderConfig:
    sizes = {
        "layers": 2,
        "width": 16,
        "feedforward": 64,
        "heads": 2,
        "vocabulary": 50,
        "context": 8,
        **changes,
    }
    return DecoderConfig(**sizes)


def problem(**changes) -> tuple[Decoder, Partition]:
    model = Decoder(config(**changes), generator=torch.Generator().manual_seed(0))
    return model, Partition.of(model)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_cost_of_a_step_is_what_the_step_reports(name):
    model, partition = problem()
    recipe = OptimizerRecipe(name=name, minibatches=2, line_search_minibatches=3, learning_rate=1e-3)
    optimizer = build_optimizer(recipe, Objective(model), partition, 5)
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randint(50, (2, 8), generator=generator), torch.randint(50, (2, 8), generator=generator))
        for _ in range(5)
    ]
    steps = 10 if name == "sophia" else 2  # sophia estimates curvature in every tenth
    spent = [optimizer.step(batches[:2], batches[2:]).gradient_equivalents for _ in range(steps)]
    expected = sum(spent) / steps if name == "sophia" else spent[-1]
    if name == "kfac":  # by operations, which depend on the shapes: the plan says the most
        assert 0.6 * cost(recipe, model, partition) < expected <= cost(recipe, model, partition)
    else:
        assert cost(recipe, model, partition) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["adamw", "muon", "soap", "shampoo", "sophia", "kfac", "full_gn"])
def test_the_optimizers_state_is_counted(name):
    """Against the tensors of its state_dict, which is what a checkpoint holds beside theta."""
    model, partition = problem(vocabulary=9)
    recipe = OptimizerRecipe(name=name, minibatches=1, line_search_minibatches=1)
    optimizer = build_optimizer(recipe, Objective(model), partition, 5)
    tokens = torch.randint(9, (2, 8), generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        optimizer.step([(tokens, tokens)], [(tokens, tokens)])

    def count(value) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel() if value.dim() else 0
        values = (
            value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        )
        return sum(map(count, values))

    held = 4 * count(optimizer.state_dict())
    copies = memory(recipe, model, partition).state - held
    # Beside it Gauss-Newton holds theta, the step and its gradient by group; a baseline theta before and after.
    assert copies / (4 * partition.size) == pytest.approx(3 if name == "full_gn" else 2, abs=0.02)


def test_what_a_forward_pass_saves_is_what_real_tensors_take():
    shape = config(attention="math")
    model, found = Decoder(shape, generator=torch.Generator().manual_seed(0)), {}
    own = {p.data_ptr() for p in model.parameters()}

    def kept(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(kept, lambda t: t):
        model(torch.zeros(1, 8, dtype=torch.long))
    real = sum(t.untyped_storage().nbytes() for at, t in found.items() if at not in own)
    assert _saved_bytes(config()) == pytest.approx(real, rel=0.05)


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a tokenizer.json of words, with T5's name for the end of a text."""
    rules = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>")
    )
    rules.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    trainer = tokenizers.trainers.WordLevelTrainer(
        vocab_size=20, special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    rules.train_from_iterator([text_file(folder).read_text()], trainer)
    rules.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def tiny_settings(folder: Path, tokenizer: Path) -> list[str]:
    """Returns what makes a recipe of the paper's small, on words of a file."""
    return [
        f"data.source={text_file(folder)}", f"data.tokenizer={tokenizer}", "data.held_out_sequences=4",
        "model.layers=1", "model.width=8", "model.feedforward=8", "model.heads=2", "model.vocabulary=32",
        "model.context=8", "optimizer.sequences=2", "optimizer.batch=4", "training.threads=1",
    ]  # fmt: skip


@pytest.mark.parametrize("method", ["full_gn", "layerwise_gn", "soap", "muon"])
@pytest.mark.parametrize("name", PAPER)
def test_three_steps_of_a_shrunken_copy(tmp_path, small_tokenizer, name, method):
    own = ["training.steps=3", "optimizer.warmup_steps=1", f"optimizer.name={method}"]
    shrunken = build_recipe(read_recipe(name), [*tiny_settings(tmp_path, small_tokenizer), *own])
    train(shrunken, tmp_path / "run")
    table = tables(tmp_path / "run")["train"]
    assert table.step.values.tolist() == [0, 1, 2]
    assert np.isfinite(table.held_out_loss.values).all()
    assert table.tokens.values.tolist() == [32, 64, 96]
    assert (table.line_search_tokens.values[-1] > 0) == method.endswith("_gn")


def test_every_variant_of_a_shrunken_study_trains_and_measures(tmp_path, small_tokenizer):
    settings = [
        *tiny_settings(tmp_path, small_tokenizer), "training.steps=1", "study.warm_up_steps=1", "study.target_loss=0.1",
        "optimizer.line_search_minibatches=1", "preconditioner.cg_iterations=2", "preconditioner.curvature_sequences=[2]",
        "preconditioner.held_out_sequences=4",
        "preconditioner.candidates=['update', 'full_gn']", "cross_layer.sequences=4", "cross_layer.max_rounds=1",
    ]  # fmt: skip
    recipe = build_recipe(read_recipe("paper_45m_short"), settings)
    assert recipe.study is not None
    ends = run_study(recipe, tmp_path / "runs")
    assert [end.name for end in ends] == [variant.name for variant in recipe.study.variants]
    for variant in recipe.study.variants:
        (found,) = (tmp_path / "runs" / variant.name).glob("learning_rate-*/seed-0")
        written = tables(found)
        assert np.isfinite(written["train"].held_out_loss.values).all()
        for name in ("cross_layer", "preconditioner"):
            assert written[name].recorded.values.any() and not written[name].failure.values.any()


def test_a_shrunken_copy_of_one_outer_step_trains_and_measures(tmp_path, small_tokenizer):
    recipe = build_recipe(read_recipe("paper_150m_short"), tiny_settings(tmp_path, small_tokenizer))
    train(recipe, tmp_path / "run")
    written = tables(tmp_path / "run")
    assert np.isfinite(written["train"].held_out_loss.values).all()
    assert np.isfinite(written["cross_layer"].loss.values).any()
    assert (written["train"].peak_memory.values > 0).all()


@pytest.mark.processes
def test_dry_run_prints_and_makes_nothing(tmp_path):
    call = [sys.executable, "-m", "hessprobe", "train", "paper_45m", "--dry-run", "--optimizer", "soap"]
    done = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and "45,363,712" in done.stdout and "optimizer soap" in done.stdout
    assert not list(tmp_path.iterdir())
