"""What every instrument promises, checked: `check_instrument("mine")` raises an AssertionError naming what is broken.

For tests of an instrument that an installed package adds; ours are checked by it too.
"""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hessprobe.errors import UserError

__all__ = ["check_instrument"]

HOSTILE = ('<img src=x onerror="alert(1)">', "[red]a[/] [/nope]", "$x_1$ {{ y }} %{z}", "line\nbreak & more")
ODD = {"nan": math.nan, "infinity": math.inf, "minus infinity": -math.inf, "zero": 0.0, "one": 1.0}
# What the recorder knows of a row, whatever measures it.
BY_THE_RECORDER = {"seconds", "peak_memory"}


def check_instrument(name: str, settings: Mapping[str, Any] | None = None, *, seed: int = 0) -> None:
    """Checks everything that an instrument of this name promises, on a decoder of a few hundred parameters.

    Args:
        name: of an instrument that is registered: one of ours, or an entry point of the group `hessprobe.instruments`.
        settings: of its section of a recipe; small ones are quicker. At most 8 sequences a batch are there.
        seed: of the decoder and its text.

    Raises:
        AssertionError: a promise is broken; the message says which.
    """
    from hessprobe.instruments.registry import instruments

    assert name in instruments(), (
        f"{name}: no instrument of this name is registered; there are {[*instruments()]}"
    )
    instrument = instruments()[name]
    chosen = instrument.settings(**(settings or {})) if instrument.settings else None
    with TemporaryDirectory() as folder:
        if chosen is not None:
            _check_measuring(instrument, chosen, seed, Path(folder))
        with warnings.catch_warnings():
            # Infinities leave NaN behind, and numpy says so; what counts is that a page comes of it.
            warnings.simplefilter("ignore", RuntimeWarning)
            _check_reading(instrument, chosen, Path(folder))


def _check_measuring(instrument: Any, settings: Any, seed: int, folder: Path) -> None:
    from hessprobe.measuring.row_recorder import as_array

    probe = _probe(instrument, settings)
    snapshot = _snapshot(seed, probe.sequences)
    table = probe.table(snapshot.partition)
    _check_declared(instrument, settings, table, snapshot.partition.blocks)
    with _promise(instrument, "its row is what its table declares"):
        row = {name: as_array(value) for name, value in probe.measure(snapshot).items()}
        declared = {v.name: table.row_shape(v) for v in table.variables if v.name not in BY_THE_RECORDER}
        assert set(row) == set(declared), f"only one of the two names {sorted(set(row) ^ set(declared))}"
        shapes = {name: _shape(value) for name, value in row.items()}
        wrong = {name: (shape, declared[name]) for name, shape in shapes.items() if shape != declared[name]}
        assert not wrong, f"shapes (measured, declared) differ: {wrong}"
    with _promise(instrument, "a row's cost is not below what is counted"):
        counted, cost = float(row["gradient_equivalents"]), probe.cost(snapshot.partition)
        assert cost >= counted * (1 - 1e-6), f"{cost:.4g} gradients are declared, and {counted:.4g} counted"
    with _promise(instrument, "the same seed gives the same row"):
        again = _probe(instrument, settings).measure(_snapshot(seed, probe.sequences))
        other = [key for key, value in row.items() if not _same(value, as_array(again[key]))]
        assert not other, f"the second time other numbers in {other}"
    with _promise(instrument, "training is the same, bit for bit, with it and without it"):
        bare, measured = _trained(None, seed, folder), _trained(_probe(instrument, settings), seed, folder)
        assert all(map(_equal, bare, measured)), "the parameters after training differ"
    with _promise(instrument, "a row that cannot be measured says why"):
        from hessprobe.store.reader import open_run

        reasons = open_run(folder / "measured")[instrument.name].to_dataset()["failure"].values.tolist()
        assert not any(reasons[:2]) and reasons[-1], f"failures of the rows: {reasons}"
    _read(folder / "measured")
    with _promise(instrument, "its rows are read where there is no torch"):
        done = subprocess.run(
            [sys.executable, "-c", _WITHOUT_TORCH, str(folder / "measured"), *sys.path],
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert instrument.name in done.stdout.split(), f"it is left out: {done.stderr}"


def _check_declared(instrument: Any, settings: Any, table: Any, blocks: Sequence[str]) -> None:
    with _promise(instrument, "its table is declared before anything is measured"):
        assert table.name == instrument.name, f"the probe's table is named {table.name!r}"
        names = [variable.name for variable in table.variables]
        declared = [variable.name for variable in instrument.layout(blocks, settings).variables]
        assert sorted(names) == sorted(declared), f"one of the two alone has {set(names) ^ set(declared)}"
    with _promise(instrument, "every variable has units, an estimator and words"):
        bare = [v.name for v in table.variables if not (v.units and v.estimator and v.long_name)]
        assert not bare, f"missing for {bare}"


def _check_reading(instrument: Any, settings: Any, folder: Path) -> None:
    from hessprobe.store.writer import RunWriter

    table = instrument.layout(HOSTILE, settings)
    runs: dict[str, list[float] | None] = {
        "missing": None,
        "empty": [],
        "one": [1.0],
        "odd": list(ODD.values()),
        "failed": [math.nan],
    }
    paths = []
    for kind, values in runs.items():
        path = folder / f"{kind} {HOSTILE[2]}"
        with RunWriter.create(path, {"name": HOSTILE[0]}) as writer:
            if values is not None:
                writer.add_table(table, range(len(values)) if values else None)
            for step, value in enumerate(values or ()):
                if kind == "failed":
                    writer.fail(table.name, step, HOSTILE[1])
                else:
                    writer.write(table.name, step, _row(table, value))
        with _promise(instrument, f"page, figures and terminal survive a run whose rows are {kind}"):
            text = _read(path)
            assert "<img src=x" not in text, "a name stands in the page as markup"
        paths.append(path)
    with _promise(instrument, "a page of several runs survives missing, failed and odd rows"):
        from hessprobe.report.several_runs import write_runs_report

        text = write_runs_report(paths, folder / "several.html").read_text(encoding="utf-8")
        assert "<img src=x" not in text, "a name stands in the page as markup"


def _read(path: Path) -> str:
    """Returns the page of a run, its tables printed and its figures drawn."""
    from rich.console import Console

    from hessprobe.reading.load_run import load_run
    from hessprobe.report.figure_set import figures_of
    from hessprobe.report.page import write_report
    from hessprobe.report.terminal import show

    for draw in figures_of(load_run(path)).values():
        with suppress(UserError):  # it says why there is nothing to draw
            draw()
    show(path, Console(file=StringIO(), width=80))
    return write_report(path).read_text(encoding="utf-8")


def _row(table: Any, value: float) -> dict[str, Any]:
    """Returns a row of multiples of one number, each another along its labels, and hostile words where words are due."""
    import numpy as np

    def filled(variable: Any) -> Any:
        shape = table.row_shape(variable)
        words = {"str": HOSTILE[0], "bool": True}
        if variable.dtype in words:
            return np.full(shape, words[variable.dtype])
        number = value if variable.dtype.startswith("float") else 1
        return number * (1 + np.arange(np.prod(shape, dtype=int)).reshape(shape))

    return {variable.name: filled(variable) for variable in table.variables}


def _probe(instrument: Any, settings: Any) -> Any:
    from hessprobe.instruments.instrument import loaded

    return loaded(instrument.probe)(settings)


def _model(seed: int) -> Any:
    import torch

    from hessprobe.models.transformer import Decoder, DecoderConfig

    config = DecoderConfig(vocabulary=11, layers=1, width=8, feedforward=8, heads=2, context=6)
    return Decoder(config, generator=torch.Generator().manual_seed(seed))


def _batch(seed: int) -> Any:
    import torch

    text = torch.randint(11, (8, 7), generator=torch.Generator().manual_seed(seed))
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def _snapshot(seed: int, sequences: int) -> Any:
    import torch

    from hessprobe.measuring.snapshots import Snapshots
    from hessprobe.problem.objective import Objective
    from hessprobe.problem.partition import Partition

    model = _model(seed)
    taken = Snapshots(objective=Objective(model), partition=Partition.of(model), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    update = 0.01 * torch.randn(taken.theta().shape, generator=generator)
    return taken.take(0, [tuple(part[:sequences] for part in _batch(seed))], update=update)


def _trained(probe: Any, seed: int, folder: Path) -> list[Any]:
    """Returns the parameters after two steps, each measured where there is a probe; then one row is NaN throughout."""
    import torch

    from hessprobe.any_loop.recorder import Recorder

    model = _model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    recorder = None
    if probe is not None:
        recorder = Recorder(
            folder / "measured", model, probes=[probe], every=1, optimizer=optimizer, seed=seed
        )
    for step in range(2):
        inputs, targets = _batch(seed + step)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        if recorder is not None:
            recorder(step, (inputs, targets))
    found = [parameter.detach().clone() for parameter in model.parameters()]
    if recorder is not None:
        with torch.no_grad():
            next(model.parameters()).fill_(math.nan)
        for step in (2, 3):  # a row is of the parameters before its step
            recorder(step, _batch(seed))
        recorder.close()
    return found


def _shape(value: Any) -> tuple[int, ...]:
    import numpy as np

    return tuple(np.shape(value))


def _same(one: Any, other: Any) -> bool:
    import numpy as np

    one, other = np.asarray(one), np.asarray(other)
    return np.array_equal(one, other, equal_nan=one.dtype.kind == "f")


def _equal(one: Any, other: Any) -> bool:
    return bool((one == other).all())


@contextmanager
def _promise(instrument: Any, promise: str) -> Iterator[None]:
    """Names the promise in whatever breaks it."""
    try:
        yield
    except Exception as error:
        words = str(error).strip() or type(error).__name__
        raise AssertionError(f"{instrument.name}: {promise}: {words}") from error


_WITHOUT_TORCH = """
import sys
sys.path[:] = sys.argv[2:]
sys.modules.update(dict.fromkeys(("torch", "curvlinops", "backpack", "pytorch_optimizer")))  # importing them raises
from pathlib import Path
from rich.console import Console
from hessprobe.instruments.registry import instruments
from hessprobe.report.page import write_report
from hessprobe.report.terminal import show
run = Path(sys.argv[1])
show(run, Console(file=sys.stderr))
write_report(run)
print(*instruments())
"""
