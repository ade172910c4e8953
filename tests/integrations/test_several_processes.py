"""ProbeCallback under DistributedDataParallel, in the Trainers of transformers and Lightning, as torchrun starts them."""

from __future__ import annotations

import os
import socket
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tests.conftest  # a new process: hides a broken torchvision
import tests.integrations.conftest  # noqa: F401
from tests.processes import on_forks
from tests.training.runs import attributes, tables

COUNT = 2
pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("ignore")]


def by_transformers(rank: int, folder: Path) -> None:
    from hessprobe.integrations.transformers import ProbeCallback
    from tests.integrations.small_transformers import SMALL, same_weights, train

    def trained(where: str, *callbacks: Any) -> Any:
        return train("gpt2", folder / where, *callbacks, ddp_backend="gloo", max_steps=3)

    bare = trained("bare")
    random = torch.get_rng_state()
    probed = trained("probed", ProbeCallback(folder / "transformers", SMALL, every=2))
    assert probed.args.world_size == COUNT
    assert same_weights(bare, probed) and torch.equal(torch.get_rng_state(), random)
    trained("again", ProbeCallback(folder / "transformers", SMALL, every=2))  # recorded beside, by both
    torch.distributed.barrier()
    assert attributes(folder / "transformers-2")["processes"] == COUNT
    assert tables(folder / "transformers-2")["cross_layer"].failure.values.tolist() == ["", ""]


def by_lightning(rank: int, folder: Path) -> None:
    from hessprobe.integrations.lightning import ProbeCallback
    from tests.integrations.small_lightning import Language, fit, same_weights

    options = {"devices": COUNT, "strategy": "ddp", "use_distributed_sampler": True}
    bare = fit(Language, folder, **options)
    probe = {"cross_layer": {"sequences": 8}}
    probed = fit(Language, folder, ProbeCallback(folder / "lightning", probe, every=2), **options)
    assert torch.distributed.get_world_size() == COUNT
    assert same_weights(bare, probed)


def one(rank: int, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(COUNT), "LOCAL_WORLD_SIZE": str(COUNT),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1",
        "GROUP_RANK": "0", "ROLE_RANK": str(rank),
    }  # fmt: skip
    by_transformers(rank, folder)
    by_lightning(rank, folder)
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    on_forks(one, (found, port), COUNT)
    return found


@pytest.mark.parametrize(("library", "sequences"), [("transformers", 4), ("lightning", 8)])
def test_training_is_the_same_and_rows_are_of_all_processes(folder, library, sequences):
    assert attributes(folder / library)["processes"] == COUNT
    table = tables(folder / library)["cross_layer"]
    assert table.step.values.tolist() == [0, 2]
    assert table.failure.values.tolist() == ["", ""]
    assert table.sequences.values.tolist() == [sequences] * 2  # Lightning's batches are of 4
    assert np.isfinite(table.step_curvature.values).all()
