"""hessprobe probe on Lightning's .ckpt and plain state_dicts: tensors only, put into the model that a function makes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hessprobe as hp
from hessprobe.checkpoints.measure_series import measure_series, open_series
from hessprobe.checkpoints.state_dicts import step_of
from hessprobe.errors import UserError

MODULE = """
import torch
from torch import nn
import hessprobe as hp

def model():
    net = nn.Sequential(nn.Embedding(11, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 11, bias=False))
    return net

def tied():
    net = model()
    net[3].weight = net[0].weight
    return net

def objective():
    return hp.Objective(model(), loss="cross_entropy", ignore_index=0)

def batches():
    for seed in range(100):
        x = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(seed))
        yield x[:, :-1], x[:, 1:]

def batch():
    return next(iter(batches()))

def breaks():
    raise RuntimeError("no such file")

number = 3
"""
SETTINGS = ('probes=["cross_layer"]', "partition=module", "cross_layer.sequences=8", "device=cpu")


class Evil:
    """Would run code if it were unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("unpickled"),))


@pytest.fixture(autouse=True)
def own_code(tmp_path, monkeypatch):
    (tmp_path / "own_code.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_code", raising=False)


def weights(seed: int, tied: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    import own_code  # type: ignore[import-not-found]

    model: nn.Module = own_code.tied() if tied else own_code.model()
    return {name: x.clone() for name, x in model.state_dict().items()}


def prefixed(prefix: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: x for name, x in found.items()}


def measured(*files: str, model: str = "own_code:model", data: str = "own_code:batches", **more: Any) -> Any:
    out = Path("out") / "-".join(Path(f).name.replace("*", "all") for f in files)
    measure_series(open_series(files, SETTINGS, model=model, data=data, **more), out)
    return hp.open_run(out)


def truth(found: dict[str, Tensor], ignore: int = -100) -> float:
    """The loss of a state_dict on the first eight sequences, by plain torch."""
    import own_code  # type: ignore[import-not-found]

    model = own_code.model()
    model.load_state_dict(found)
    pairs = [pair for pair, _ in zip(own_code.batches(), range(2), strict=False)]
    x, y = (torch.cat(part) for part in zip(*pairs, strict=True))
    return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=ignore).item()


FILES = {
    "plain.pt": lambda w: w,
    "wrapped.pth": lambda w: {"model_state_dict": prefixed("module.", w), "epoch": 3},
    "compiled.bin": lambda w: {"model": prefixed("_orig_mod.", w), "args": {"lr": 0.1}},
    "both.pt": lambda w: prefixed("module._orig_mod.", w),
    "lightning.ckpt": lambda w: {
        "epoch": 1, "global_step": 7, "pytorch-lightning_version": "2.5", "state_dict": prefixed("model.", w),
        "optimizer_states": [{"state": {}}], "hyper_parameters": {"width": 6},
    },
    "inside.ckpt": lambda w: {"state_dict": prefixed("model._orig_mod.", w)},
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_whatever_wrapper_saved_it(name):
    torch.save(FILES[name](weights(1)), name)
    row = measured(name)["cross_layer"]
    assert row.failure.values.tolist() == [""]
    assert float(row.loss[0]) == pytest.approx(truth(weights(1)), rel=1e-5)
    assert row.sequences.values.tolist() == [8]


def test_safetensors_are_read_and_a_tied_tensor_may_be_saved_once():
    saving = pytest.importorskip("safetensors.torch")
    found = weights(2, tied=True)
    saving.save_file({name: x for name, x in found.items() if name != "3.weight"}, "tied.safetensors")
    row = measured("tied.safetensors", model="own_code:tied")["cross_layer"]
    assert float(row.loss[0]) == pytest.approx(truth(found), rel=1e-5)


@pytest.mark.parametrize(
    "given", [("kept",), ("kept/*.ckpt",), ("kept/epoch=0-step=20.ckpt", "kept/epoch=1-step=3.ckpt")]
)
def test_a_folder_or_pattern_becomes_the_step_axis(given):
    Path("kept").mkdir()
    for step, name in ((3, "epoch=1-step=3.ckpt"), (20, "epoch=0-step=20.ckpt")):
        torch.save({"state_dict": weights(step)}, f"kept/{name}")
    rows = measured(*given)["cross_layer"]
    assert sorted(rows.step.values.tolist()) == [3, 20]
    assert [float(rows.sel(step=s).loss) for s in (3, 20)] == pytest.approx(
        [truth(weights(s)) for s in (3, 20)], rel=1e-5
    )


def test_numbers_in_names_are_steps():
    assert [step_of(name) for name in ("a/epoch=3-step=1200.ckpt", "ckpt_500.pt", "v2/model.pt", "model-v2-0010.pth")] == [
        1200, 500, None, 10,
    ]  # fmt: skip


def test_the_function_may_give_an_objective_and_one_batch():
    torch.save(weights(1), "one.pt")
    row = measured("one.pt", model="own_code:objective", data="own_code:batch")["cross_layer"]
    assert row.failure.values.tolist() == [""]
    assert row.sequences.values.tolist() == [4]


def test_what_holds_more_than_tensors_is_refused_and_not_unpickled():
    torch.save({"state_dict": weights(1), "hyper_parameters": Evil()}, "evil.ckpt")
    with pytest.raises(
        UserError, match="evil.ckpt holds more than tensors.*nothing is unpickled here"
    ) as refused:
        measured("evil.ckpt")
    assert "\n" not in str(refused.value)
    assert not Path("unpickled").exists()


REFUSED = {
    "no file": ({}, "nothing.pt", "own_code:model", "no weights there; --model measures files"),
    "other names": ({"other.weight": torch.ones(2)}, "a.pt", "own_code:model",
        r"4 missing \(0.weight, .*1 that the model does not have \(other.weight\)"),
    "no tensors": ({"epoch": 3}, "a.pt", "own_code:model", "holds no state_dict .there is epoch"),
    "no module": ({}, "a.pt", "nowhere:model", "--model nowhere:model: ModuleNotFoundError"),
    "no function": ({}, "a.pt", "own_code:nothing", "--model own_code:nothing: AttributeError"),
    "no colon": ({}, "a.pt", "own_code", "wanted module:function"),
    "a number": ({}, "a.pt", "own_code:number", "is a int; wanted a function"),
    "a function that raises": ({}, "a.pt", "own_code:breaks", r"RuntimeError: no such file \(.*in breaks\)"),
    "no model": ({}, "a.pt", "own_code:batch", "returned tuple; wanted an nn.Module or an hp.Objective"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(fault):
    held, name, model, said = REFUSED[fault]
    torch.save(held, "a.pt")
    with pytest.raises(UserError, match=said) as refused:
        measured(name, model=model)
    assert "\n" not in str(refused.value)
    assert not Path("out").exists()


@pytest.mark.parametrize("cut", [0, 7, 200])
def test_a_damaged_file_is_refused(cut):
    torch.save(weights(1), "whole.pt")
    Path("cut.pt").write_bytes(Path("whole.pt").read_bytes()[:cut])
    with pytest.raises(UserError, match="cut.pt") as refused:
        measured("cut.pt")
    assert "\n" not in str(refused.value)


def test_text_is_read_where_no_batches_are_given():
    Path("text.txt").write_text("abc" * 4000)
    Path("bytes_model.py").write_text(
        "from torch import nn\ndef model():\n"
        "    return nn.Sequential(nn.Embedding(256, 4), nn.Linear(4, 256))\n"
    )
    sys.modules.pop("bytes_model", None)
    torch.save(nn.Sequential(nn.Embedding(256, 4), nn.Linear(4, 256)).state_dict(), "bytes.pt")
    row = measured("bytes.pt", model="bytes_model:model", data="text.txt", context=16)["cross_layer"]
    assert row.failure.values.tolist() == [""]
    assert row.tokens.values.tolist() == [8 * 16]
