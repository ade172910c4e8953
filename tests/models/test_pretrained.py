"""What a saved model of transformers is, is known before its weights are read; all of its weights are its own."""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import torch

from hessprobe.errors import UserError
from hessprobe.models import pretrained
from hessprobe.models.pretrained import Pretrained
from tests.checkpoints.hugging_face import save_model, save_tokenizer


@pytest.mark.parametrize(
    ("kind", "said"), [("gpt2", "causal"), ("llama", "causal"), ("bert", "masked"), ("classifier", "classification")]
)  # fmt: skip
def test_a_models_kind_sizes_and_weights(kind, said, tmp_path):
    import safetensors.torch

    found = Pretrained.find(str(save_model(tmp_path / kind, kind)))
    assert (found.kind, found.vocabulary, found.positions, found.step) == (said, 280, 16, None)
    model = found.load()
    stored = safetensors.torch.load_file(tmp_path / kind / "model.safetensors")
    own = model.state_dict()
    assert stored and all(torch.equal(own[name], value) for name, value in stored.items())
    assert not model.training and model.config.use_cache is False
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-500", 500), ("step1000", 1000), ("global_step20", 20), ("step-3", 3), ("model-500", None),
        ("checkpoint-best", None),
    ],
)  # fmt: skip
def test_a_folders_name_tells_its_step(name, step, tmp_path):
    assert Pretrained.find(str(save_model(tmp_path / name, "gpt2"))).step == step


def test_a_revision_on_the_hub_tells_its_step_and_stands_apart_from_the_name():
    given = {"kind": "causal", "config": None, "transformers": None}
    assert Pretrained(name="EleutherAI/pythia-70m@step512", **given).step == 512
    assert Pretrained(name="EleutherAI/pythia-70m@main", **given).step is None
    assert Pretrained(name="EleutherAI/pythia-70m@step512", **given).tokenizer == "EleutherAI/pythia-70m"


def test_the_tokenizer_of_the_folder_or_of_the_one_above(tmp_path):
    found = Pretrained.find(str(save_model(tmp_path / "run" / "checkpoint-1", "gpt2")))
    assert found.tokenizer is None
    above = save_tokenizer(tmp_path / "run", ["</s>"])
    assert found.tokenizer == str(above)
    beside = save_tokenizer(tmp_path / "run" / "checkpoint-1", ["</s>"])
    assert found.tokenizer == str(beside)


def test_models_differ_by_their_sizes_not_by_where_they_were_saved(tmp_path):
    one, same, other, bert = (
        Pretrained.find(str(save_model(tmp_path / name, kind, seed=seed, **numbers)))
        for name, kind, seed, numbers in (
            ("one", "gpt2", 0, {}), ("same", "gpt2", 1, {}), ("other", "gpt2", 0, {"n_inner": 5}), ("bert", "bert", 0, {}),
        )
    )  # fmt: skip
    assert one.differs(same) == ""
    assert one.differs(other) == "n_inner is None there and 5 here"
    assert one.differs(bert) == "GPT2LMHeadModel there and BertForMaskedLM here"
    assert one.origin["sha256"] != same.origin["sha256"]


def test_the_librarys_own_words_are_heard_as_before(tmp_path, capfd):
    import transformers

    logging, folder = transformers.utils.logging, str(save_model(tmp_path / "m", "gpt2"))
    logging.enable_progress_bar()
    level = logging.get_verbosity()
    Pretrained.find(folder).load()
    assert logging.get_verbosity() == level and logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "hidden"),
    [("raise RuntimeError('operator torchvision::nms does not exist')", True), ("", False)],
)
def test_a_torchvision_that_cannot_be_imported_is_hidden_and_only_such_a_one(
    text, hidden, tmp_path, monkeypatch
):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(pretrained, "find_spec", lambda name: PathFinder.find_spec(name, [str(tmp_path)]))
    pretrained._hide_broken_torchvision()
    seen = sys.modules["torchvision"]
    monkeypatch.delitem(sys.modules, "torchvision")
    assert (seen is None) == hidden
    assert hidden or Path(str(seen.__file__)).parent.parent == tmp_path


def test_names_that_no_hub_model_has_are_not_looked_up(monkeypatch):
    monkeypatch.setattr(pretrained, "_library", lambda name: pytest.fail("looked up"))
    for name in ("./none", "/none", "a/b/c", "../x", "~none", "runs\\x"):
        with pytest.raises(UserError, match="there is no such file or folder"):
            Pretrained.find(name)
