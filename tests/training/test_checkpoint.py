"""A checkpoint is whole or not there: what comes after a failed or cut-off save is the one before."""

from __future__ import annotations

import errno

import pytest
import torch

from hessprobe.errors import UserError
from hessprobe.training import checkpoint
from hessprobe.training.checkpoint import DataPosition, load_checkpoint, save_checkpoint
from hessprobe.training.train_row import Totals

CPU = torch.device("cpu")


def save(folder, step: int) -> None:
    save_checkpoint(
        folder, step=step, parameters=torch.full((3,), float(step)), optimizer={"outer": step, "solver": []},
        totals=Totals(tokens=10 * step, seconds=0.5),
    )  # fmt: skip


def names(folder) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoint").iterdir())


def test_what_was_saved_comes_back(tmp_path):
    assert load_checkpoint(tmp_path, CPU) is None
    save(tmp_path, 3)
    found = load_checkpoint(tmp_path, CPU)
    assert found is not None
    assert found["step"] == 3
    assert torch.equal(found["parameters"], torch.full((3,), 3.0))
    assert found["optimizer"] == {"outer": 3, "solver": []}
    assert found["totals"] == Totals(tokens=30, seconds=0.5)
    assert (found["data"], found["ended"]) == (DataPosition(), False)


def test_the_place_in_the_data_and_the_end_come_back(tmp_path):
    place = DataPosition(seed=2, first={"train": 4}, read={"train": 32}, bookmarks={"train@2": [16, 1, 2, 3]})
    save_checkpoint(
        tmp_path, step=2, parameters=torch.zeros(6), optimizer={}, totals=Totals(), data=place, held_out_loss=2.5,
        shapes={"a": torch.Size([2, 3])}, ended=True,
    )  # fmt: skip
    found = load_checkpoint(tmp_path, CPU)
    assert found is not None and found["data"] == place
    assert (found["held_out_loss"], found["ended"], found["shapes"]) == (2.5, True, {"a": [2, 3]})


def test_a_later_one_takes_the_place_of_the_earlier(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert names(tmp_path) == ["state.pt"]
    assert torch.load(tmp_path / "checkpoint" / "state.pt", weights_only=True)["step"] == 2


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file"),
    ],
    ids=["by the system", "by torch"],
)
def test_a_full_disk_keeps_the_one_before_and_says_so(tmp_path, monkeypatch, failure):
    save(tmp_path, 1)

    def half(state, file) -> None:
        file.write(b"half of it")
        raise failure

    monkeypatch.setattr(checkpoint.torch, "save", half)
    with pytest.raises(UserError, match="no space left.*checkpoint of step 2 was not written.*--resume"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["state.pt"]
    assert load_checkpoint(tmp_path, CPU)["step"] == 1  # type: ignore[index]


def test_one_cut_off_while_it_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def half(state, file) -> None:
        file.write(b"half of it")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.torch, "save", half)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2)
    assert load_checkpoint(tmp_path, CPU)["step"] == 1  # type: ignore[index]
    save(tmp_path, 2)
    assert names(tmp_path) == ["state.pt"]


def test_another_failure_of_the_system_is_not_called_a_full_disk(tmp_path, monkeypatch):
    def refuse(state, file) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint.torch, "save", refuse)
    with pytest.raises(OSError, match="Input/output"):
        save(tmp_path, 1)
