"""A run begins from another's weights where asked, ends early at its target, and the log says both."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from hessprobe.analysis import load_run
from hessprobe.errors import UserError
from hessprobe.instruments.train.section import content
from hessprobe.report.asking import ask
from hessprobe.text.corpus import Corpus
from hessprobe.training import loop
from hessprobe.training.builds import build_model
from hessprobe.training.checkpoint import load_start
from hessprobe.training.loop import train
from tests.training.runs import attributes, parameters, recipe, state, tables

ADAMW = ("optimizer.name=adamw", "optimizer.warmup_steps=0")


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a run of three steps."""
    folder = tmp_path_factory.mktemp("begun") / "first"
    train(recipe(folder, *ADAMW, "training.steps=3"), folder)
    return folder


@pytest.fixture(scope="module")
def losses(begun: Path) -> list[float]:
    """Returns its held-out loss after each step."""
    return tables(begun)["train"].held_out_loss.values.tolist()


class TestStopAt:
    """The run ends at the first held-out loss at or below its target."""

    def test_it_ends_where_the_target_is_reached_and_says_so(self, tmp_path, losses):
        folder = tmp_path / "run"
        end = train(recipe(folder, *ADAMW, "training.steps=3", f"training.stop_at={losses[1]}"), folder)
        assert (end.steps, end.reached, end.held_out_loss) == (2, True, losses[1])
        assert str(end) == "target reached in 2 steps"
        table = tables(folder)["train"]
        assert table.step.values.tolist() == [0, 1]
        assert table.held_out_loss.values.tolist() == losses[:2]
        assert state(folder)["ended"] and state(folder)["step"] == 2

    def test_the_page_calls_it_whole_and_another_in_progress(self, tmp_path, losses):
        folder = tmp_path / "run"
        train(recipe(folder, *ADAMW, "training.steps=9", f"training.stop_at={losses[1]}"), folder)
        run = load_run(folder)
        (training,) = ask([run]).runs["train"]
        said = content([training])
        assert said["target"] == losses[1] and said["planned"] == 9
        run.attrs["recipe"] = json.dumps({"training": {"steps": 9, "stop_at": 0.001}})
        assert content([training])["target"] is None
        run.attrs["recipe"] = json.dumps({"training": {"steps": 9}})
        assert content([training])["target"] is None

    def test_a_target_that_is_not_reached_is_not_a_number_of_steps(self, tmp_path, capsys):
        folder = tmp_path / "run"
        end = train(recipe(folder, *ADAMW, "training.steps=2", "training.stop_at=0.01"), folder)
        assert (end.steps, end.reached) == (2, False)
        assert str(end).startswith("target not reached in 2 steps, held-out loss 5.")
        assert "target not reached in 2 steps" in capsys.readouterr().err

    def test_it_is_looked_at_where_the_loss_is_evaluated(self, tmp_path, losses):
        folder = tmp_path / "run"
        settings = ("training.steps=5", "training.evaluate_every=2", f"training.stop_at={losses[1]}")
        assert train(recipe(folder, *ADAMW, *settings), folder).steps == 3

    @pytest.mark.parametrize("after", ["the row", "the checkpoint"])
    def test_killed_at_its_end_and_resumed_it_takes_no_further_step(
        self, tmp_path, losses, after, monkeypatch
    ):
        folder = tmp_path / "run"
        wanted = recipe(folder, *ADAMW, "training.steps=6", f"training.stop_at={losses[1]}")

        class Kill(BaseException): ...

        place, name = (loop.Run, "_record") if after == "the row" else (loop, "save_checkpoint")
        real = getattr(place, name)

        def killed(*words, **named):
            real(*words, **named)
            if named.get("step", words[1] if len(words) > 1 else 0) == (1 if after == "the row" else 2):
                raise Kill

        with monkeypatch.context() as patched:
            patched.setattr(place, name, killed)
            with pytest.raises(Kill):
                train(wanted, folder)
        end = train(wanted, folder, resume=True)
        assert (end.steps, end.reached) == (2, True)
        assert tables(folder)["train"].step.values.tolist() == [0, 1]
        again = train(wanted, folder, resume=True)
        assert again == end


class TestStartFrom:
    """Another run's weights, its place in the data, and where they came from."""

    def test_the_weights_are_the_other_runs_and_the_log_says_which(self, tmp_path, begun, monkeypatch):
        seen = []
        monkeypatch.setattr(
            loop.Run, "steps", lambda self, _: seen.append(self.partition.vector(self.objective.model))
        )
        folder = tmp_path / "run"
        train(recipe(folder, *ADAMW, f"training.start_from={begun}"), folder)
        assert torch.equal(seen[0], parameters(begun))
        origin = json.loads(attributes(folder)["start_from"])
        file = begun / "checkpoint" / "state.pt"
        assert origin["path"] == str(begun) and origin["step"] == 3
        assert origin["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        folder = tmp_path / "by-file"
        train(recipe(folder, *ADAMW, f"training.start_from={file}"), folder)
        assert torch.equal(seen[1], seen[0])

    def test_it_goes_on_in_the_data_where_the_other_stopped(self, tmp_path, begun, monkeypatch):
        asked = []
        batch = Corpus.batch
        monkeypatch.setattr(
            Corpus, "batch", lambda self, **named: asked.append(named) or batch(self, **named)
        )
        folder = tmp_path / "run"
        wanted = recipe(
            folder, *ADAMW, "training.steps=2", "optimizer.minibatches=3", f"training.start_from={begun}"
        )
        train(wanted, folder)
        assert [a["step"] for a in asked if a["stream"] == "train"] == [6, 7, 8, 9, 10, 11]  # 3 x 2 were read
        asked.clear()
        train(
            recipe(tmp_path / "b", *ADAMW, "training.steps=1", "seed=5", f"training.start_from={begun}"),
            tmp_path / "b",
        )
        assert [a["step"] for a in asked if a["stream"] == "train"] == [0, 1]  # another seed, another stream
        asked.clear()
        chained = recipe(tmp_path / "c", *ADAMW, "training.steps=1", f"training.start_from={folder}")
        train(chained, tmp_path / "c")
        assert [a["step"] for a in asked if a["stream"] == "train"] == [12, 13]

    def test_weights_go_by_name_whatever_the_partition(self, tmp_path, begun):
        folder = tmp_path / "run"
        model = build_model(recipe(folder), torch.device("cpu"))
        start = {
            by: load_start(str(begun), loop.Partition.of(model, by)).parameters
            for by in ("layer", "parameter")
        }
        named = {by: loop.Partition.of(model, by).unflatten(theta) for by, theta in start.items()}
        assert all(torch.equal(named["layer"][n], named["parameter"][n]) for n in named["layer"])

    def test_a_resumed_run_needs_the_other_no_more(self, tmp_path, begun):
        copy = tmp_path / "copy"
        (copy / "checkpoint").mkdir(parents=True)
        file = copy / "checkpoint" / "state.pt"
        file.write_bytes((begun / "checkpoint" / "state.pt").read_bytes())
        folder = tmp_path / "run"
        wanted = recipe(folder, *ADAMW, "training.steps=2", f"training.start_from={copy}")
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(loop.Run, "steps", lambda self, _: None)
            train(wanted, folder)  # its log is made, no step is taken
        other = torch.load(file, weights_only=True)
        torch.save({**other, "parameters": other["parameters"] + 1}, file)
        with pytest.raises(UserError, match="no longer holds the weights it was started from: put them back"):
            train(wanted, folder, resume=True)
        torch.save(other, file)
        train(wanted, folder, resume=True)
        file.unlink()
        train(wanted, folder, resume=True)
        assert state(folder)["step"] == 2

    def test_mistakes_are_told_before_a_run_exists(self, tmp_path, begun):
        (tmp_path / "empty").mkdir()
        (tmp_path / "text.pt").write_text("no checkpoint")
        torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
        for given, words in {
            tmp_path / "none": "there is no such file or folder; give a run's folder or its checkpoint file",
            tmp_path / "empty": "the folder holds no checkpoint/state.pt",
            tmp_path / "text.pt": "text.pt is no checkpoint of hessprobe",
            tmp_path / "other.pt": "other.pt is no checkpoint of hessprobe",
        }.items():
            with pytest.raises(UserError, match=words):
                train(recipe(tmp_path / "run", *ADAMW, f"training.start_from={given}"), tmp_path / "run")
        wider = recipe(tmp_path / "run", *ADAMW, "model.width=16", f"training.start_from={begun}")
        with pytest.raises(
            UserError, match=r"another model .*embedding.weight is \(256, 8\) there and \(256, 16\) here"
        ):
            train(wider, tmp_path / "run")
        deeper = recipe(tmp_path / "run", *ADAMW, "model.layers=2", f"training.start_from={begun}")
        with pytest.raises(
            UserError, match=r"blocks.1.* is absent there and .* here; give the sizes of that run"
        ):
            train(deeper, tmp_path / "run")
        assert not (tmp_path / "run").exists()
