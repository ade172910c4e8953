"""Which process this is, which device it takes, and what is too small or too different to be shared."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest
import torch

from hessprobe.errors import UserError
from hessprobe.machine.process_group import own_device, process_group
from hessprobe.machine.processes import ALONE, Processes
from hessprobe.machine.torchrun import Launch, is_first, launched
from hessprobe.training.builds import check_same_text, check_shares
from tests.training.runs import recipe


class Several(Processes):
    """One of several as far as it knows, without a group to talk to."""

    def __init__(self, rank: int, count: int) -> None:
        super().__init__()
        self.rank, self.count = rank, count


TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("torchrun")
def test_torchrun_says_which_process_this_is():
    assert launched() == Launch(rank=5, count=8, local_rank=1, local_count=4)
    assert not is_first()


@pytest.mark.usefixtures("torchrun")
@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "1"), ("LOCAL_RANK", ""), ("RANK", "none")])
def test_without_all_it_says_or_with_one_process_there_is_nothing_to_share(name, value, monkeypatch):
    """As in a container whose WORLD_SIZE is another program's."""
    monkeypatch.setenv(name, value)
    assert launched() is None and is_first()


def test_one_process_is_alone_and_its_signals_stay_as_they_are():
    before = signal.getsignal(signal.SIGTERM)
    with process_group(None) as processes:
        assert processes is ALONE
        assert signal.getsignal(signal.SIGTERM) is before
    assert own_device("cpu", ALONE) == torch.device("cpu")


@pytest.mark.parametrize("wanted", ["cuda:3", "cpu:0", "tpu"])
def test_several_processes_take_no_device_by_number(wanted):
    with pytest.raises(UserError, match=rf"--device {wanted}: 4 processes .* wanted auto, cpu, or cuda"):
        own_device(wanted, Several(1, 4))
    assert own_device("cpu", Several(1, 4)) == torch.device("cpu")


@pytest.mark.gpu
def test_process_n_takes_gpu_n_and_more_processes_than_gpus_are_refused():
    have = torch.cuda.device_count()
    if have > 1:
        assert own_device("cuda", Several(1, have)) == torch.device("cuda", 1)
        torch.cuda.set_device(0)
    with pytest.raises(
        UserError, match=rf"{have + 1} processes on this machine need a GPU each, and it has {have}"
    ):
        own_device("auto", Several(have, have + 1))


def test_every_batch_too_small_to_be_shared_is_named(tmp_path):
    chosen = recipe(
        tmp_path / "run", 'probes=["gn_hessian", "preconditioner"]', "optimizer.sequences=8", "gn_hessian.sequences=3",
        "data.held_out_sequences=5", "preconditioner.curvature_sequences=[4, 16]", "cross_layer.sequences=3",
    )  # fmt: skip
    check_shares(chosen, Several(0, 3))
    with pytest.raises(UserError) as refused:
        check_shares(chosen, Several(0, 5))
    said = str(refused.value)
    assert said.startswith(
        "gn_hessian.sequences = 3, preconditioner.curvature_sequences = 4: wanted at least 5"
    )
    assert "start at most 3 with --nproc-per-node" in said
    check_shares(chosen, ALONE)


def test_processes_that_read_other_texts_are_told():
    corpus = SimpleNamespace(fingerprint={"sha256": "aa"})
    others = SimpleNamespace(count=3, gathered=lambda own: [own, own, "bb"])
    with pytest.raises(UserError, match="process 2 of 3 reads another text than the first .sha256 bb and aa"):
        check_same_text(corpus, others)  # type: ignore[arg-type]
    check_same_text(corpus, ALONE)  # type: ignore[arg-type]
