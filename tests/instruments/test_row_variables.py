"""Rows of all instruments say the same of themselves, and whose batch a loss of the checks is of."""

from __future__ import annotations

from hessprobe.instruments.row_variables import CHECK_VARIABLES, MEASUREMENT_VARIABLES


def test_every_measurement_says_its_unit_and_how_it_was_had():
    names = [v.name for v in MEASUREMENT_VARIABLES]
    assert names == [
        "loss", "tokens", "sequences", "damping", "symmetry_gap", "seconds", "gradient_equivalents", "peak_memory",
    ]  # fmt: skip
    for v in MEASUREMENT_VARIABLES:
        assert v.units and v.long_name and v.estimator and v.dims == ("step",)


def test_losses_of_the_checks_say_that_they_are_the_first_process_s():
    losses = {v.name: v.long_name for v in CHECK_VARIABLES if v.name.startswith("loss_")}
    assert list(losses) == ["loss_trained", "loss_whole_batch", "loss_train_mode"]
    assert [name for name, text in losses.items() if "of several processes the first's" not in text] == []
