"""The command `hessprobe validate`: the stages in order of worth, what machine they run on, and where figures go."""

from __future__ import annotations

import datetime
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from hessprobe.errors import UserError
from hessprobe.machine.devices import pick_device
from hessprobe.measuring.provenance import environment
from hessprobe.validation.modes import prepare
from hessprobe.validation.runner import SCRATCH, Bench, Budget, Stage, Validation, run_stages
from hessprobe.validation.stages.correctness import correctness
from hessprobe.validation.stages.costs import costs
from hessprobe.validation.stages.harmlessness import harmlessness
from hessprobe.validation.stages.instruments import instruments
from hessprobe.validation.stages.peaks import peaks
from hessprobe.validation.stages.precision import precision
from hessprobe.validation.stages.processes import processes
from hessprobe.validation.stages.steps import steps
from hessprobe.validation.stages.throughput import throughput

# In order of worth. A name, a title (its first words are the page's link), its share of the time, the least it needs.
STAGES = (
    Stage(
        name="correctness",
        title="Correctness: against float64 on the CPU",
        run=correctness,
        weight=3,
        least=5,
    ),
    Stage(
        name="harmlessness",
        title="Harmlessness: training stays as it is",
        run=harmlessness,
        weight=3,
        least=10,
    ),
    Stage(
        name="costs",
        title="Costs: products, kernels and attention in gradients",
        run=costs,
        weight=6,
        least=5,
    ),
    Stage(
        name="precision", title="Precision: every stored quantity against float64", run=precision, weight=2
    ),
    Stage(
        name="instruments", title="Rows: one of each instrument at 150M", run=instruments, weight=4, least=5
    ),
    Stage(name="steps", title="Steps: full and layerwise Gauss-Newton", run=steps, weight=4, least=5),
    Stage(
        name="throughput", title="Throughput: tokens per second of a loop", run=throughput, weight=2, least=5
    ),
    Stage(name="processes", title="Processes: torchrun and fully_shard", run=processes, weight=2, least=15),
    Stage(name="peaks", title="Peaks: what the machine can do at most", run=peaks, weight=1),
)


def validate(
    *,
    device: str,
    minutes: float,
    small: bool,
    folder: Path,
    stages: tuple[Stage, ...] | None = None,
) -> Validation:
    """Runs the stages and returns what they found, which stands in the folder too; prints one line a figure.

    Args:
        device: "auto", "cpu", "cuda", "cuda:1".
        minutes: for everything; stages that no longer fit are left out and said.
        small: whether the large models are shrunken copies.
        folder: where validate.json and validate.html go; made where it is missing.
        stages: others than STAGES.

    Raises:
        UserError: a device this machine does not have, no time, or a folder that cannot be written.
    """
    if not minutes > 0:
        raise UserError(f"--minutes {minutes:g}: wanted more than 0")
    prepare()
    chosen = pick_device(device)
    scratch = folder / SCRATCH
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--out {folder}: cannot write there ({error.strerror}); give another folder"
        ) from error
    # A folder of its own for every call: runs in it are begun, not resumed.
    own = scratch / datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S-%f")
    own.mkdir()
    bench = Bench(device=chosen, small=small, folder=own, budget=Budget(60 * minutes))
    facts = machine(chosen, minutes, small)
    for label, value in facts.items():
        print(f"{label:<12}{value}")
    with (
        warnings.catch_warnings(),
        _threads(1 if small and chosen.type == "cpu" else torch.get_num_threads()),
    ):
        warnings.simplefilter(
            "ignore"
        )  # torch's and libraries', once a kind; figures are what is to be read here
        return run_stages(STAGES if stages is None else stages, bench, facts, folder, _say)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Lets torch use so many threads: on a busy machine two wait for each other, over such small matrices above all."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine(device: torch.device, minutes: float, small: bool) -> dict[str, str]:
    """Returns the facts that a reader of the figures needs, by name."""
    known = environment(device)
    cuda = device.type == "cuda"
    name = (
        torch.cuda.get_device_name(device) if cuda else f"CPU ({platform.processor() or platform.machine()})"
    )
    facts = {"device": f"{name}, {torch.get_num_threads()} threads"}
    if cuda:
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": name,
            "memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "capability": f"{properties.major}.{properties.minor}, {properties.multi_processor_count} processors",
            "CUDA": str(torch.version.cuda),
        }
    return {
        **facts,
        "versions": ", ".join(f"{library} {version}" for library, version in known.versions.items()),
        "commit": known.commit or "installed without a source tree",
        "system": platform.platform(),
        "asked for": f"{minutes:g} minutes, {'shrunken' if small else 'full'} sizes",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _say(line: str) -> None:
    print(line, flush=True)
