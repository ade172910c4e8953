"""One class of each model type that builds: layers recognised, loss, G, H and kernels exact, or refused by name."""

from __future__ import annotations

import pytest

from tests.architectures.sweep import counted, names_of, swept, swept_by

pytestmark = pytest.mark.processes


# No list of layers, or a bare vector that nothing tells the place of: a note says so. FSMT has its head in its embedding.
WITH_NOTES = {
    "torch.LSTM", "torch.GRU", "Inkling2ForCausalLM", "Inkling2ForConditionalGeneration", "Inkling2LoopForCausalLM",
    "Inkling2LoopForConditionalGeneration", "FSMTForConditionalGeneration",
}  # fmt: skip

# What cannot be measured, and a part of the words that say why.
REFUSED = {
    "GitForCausalLM": "do not fit targets",  # its outputs begin with those of the image's patches
    "ProphetNetForCausalLM": "own loss on this batch",  # of several tokens ahead, smoothed: not of its logits alone
    "YosoForMaskedLM": "no second derivatives",  # attention by hashing, whose backward pass is a function of its own
}


@pytest.mark.slow
def test_every_architecture_is_measured_right_or_refused_by_name():
    outcomes = dict(swept_by(2, names_of([], each=True)))
    wrong = [
        f"{name} {check}: {said}"
        for name, checks in outcomes.items()
        if checks["built"] == "ok"
        for check, said in checks.items()
        if said != "ok" and not _expected(name, check, said)
    ]
    assert not wrong, "\n".join(wrong)
    counts = counted(outcomes)
    for check in ("built", "partition", "loss", "gauss_newton", "hessian", "kernels", "unchanged"):
        assert counts[check]["ok"] >= 200, f"{check}: {counts[check]}"


def _expected(name: str, check: str, said: str) -> bool:
    if said.startswith("refused"):
        return name in REFUSED and REFUSED[name] in said
    return check == "partition" and name in WITH_NOTES


@pytest.mark.slow
def test_a_model_that_ends_its_process_does_not_end_the_sweep():
    found = dict(swept(["torch.LSTM", "no such model", "torch.GRU"], curvature=False))
    assert found["torch.LSTM"]["built"] == found["torch.GRU"]["built"] == "ok"
    assert "process ended" in found["no such model"]["built"]
