"""What a measured row says whichever instrument measured it: of the measurement itself, and of the checks before it."""

from __future__ import annotations

from hessprobe.schema.table import STEP, Variable


def _measurement(name: str, units: str, long_name: str, estimator: str = "exact") -> Variable:
    return Variable(name=name, dims=(STEP,), units=units, long_name=long_name, estimator=estimator)


# What is known of a row before any probe measures it: of the step's whole batch, of which probes read the first sequences.
# A recorder adds them to every probe's table.
CHECK_VARIABLES: tuple[Variable, ...] = (
    _measurement("loss_trained", "nats per token", "loss of the step's whole batch as the training loop passed it, of "
                 "several processes the first's; NaN where it passed none", "the loop's own"),
    _measurement("loss_whole_batch", "nats per token", "loss of the step's whole batch, of several processes the first's, "
                 "before the step, as it is measured: eval mode, no dropout, running averages for batch statistics; NaN "
                 "where it was not compared", "exact; where a batch of this shape is met first"),
    _measurement("loss_train_mode", "nats per token", "the same, of several processes the first's, in train mode, with "
                 "dropout, or with batch statistics alone where there are any; NaN where it was not compared",
                 "one pass; where a batch of this shape is met first"),
    _measurement("activation_bits", "bits", "precision of the least precise activation while the model is measured; NaN "
                 "where nobody looked", "exact"),
)  # fmt: skip

# What every probe says about the measurement itself, so that numbers of different probes can be compared.
MEASUREMENT_VARIABLES: tuple[Variable, ...] = (
    _measurement("loss", "nats per token", "loss on the probe batch, before the step, in eval mode: without dropout, "
                 "running averages in the place of batch statistics"),
    _measurement("tokens", "tokens", "valid target tokens in the probe batch"),
    _measurement("sequences", "sequences", "sequences in the probe batch"),
    _measurement("damping", "nats per token per squared parameter", "multiple of the identity added"),
    _measurement("symmetry_gap", "1", "|u.Av - v.Au| / (|u| |Av|), a check of the product itself",
                 "one random pair u, v"),
    _measurement("seconds", "s", "wall-clock time of the measurement"),
    _measurement("gradient_equivalents", "gradients", "cost, in gradients of the probe batch", "counted"),
    _measurement("peak_memory", "bytes", "peak memory of the measurement", "as the device or system reports"),
)  # fmt: skip
