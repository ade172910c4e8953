"""Several runs on one page: the same sections with a colour for each run, and differences only where errors allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hessprobe.instruments.cross_layer.section import several_cross_layer
from hessprobe.instruments.gn_hessian.several import several_gn_hessian
from hessprobe.instruments.preconditioner.several import several_preconditioner
from hessprobe.instruments.train.answers import measuring_costs, summarize_training
from hessprobe.instruments.train.charts import by_clock
from hessprobe.pictures.charts import over_steps
from hessprobe.pictures.section import Section
from hessprobe.pictures.several import lines_over_steps, stored_line
from hessprobe.reading.rows import sound_rows
from hessprobe.reading.wording import counted
from hessprobe.report.differences import Beside, differences, runs_beside
from hessprobe.report.page import PAGE, render_page, write_page
from hessprobe.report.provenance import decoded, flat, said_setting, said_time
from hessprobe.report.summary import findings_json, summary_markdown


def write_runs_report(runs: Sequence[Path], destination: Path | None = None) -> Path:
    """Writes several runs' report as one HTML page and returns its path; findings.json and summary.md beside it.

    Args:
        runs: their folders.
        destination: the file to write; default `report.html` beside the first run's folder.

    Raises:
        UserError: as `write_report`, for the first run it holds of.
    """
    beside, common = runs_beside(runs)
    path = Path(runs[0]).resolve().parent / PAGE if destination is None else Path(destination)
    found, name = differences(beside), " · ".join(run.label for run in beside)
    at = "each at its last measured step" if common is None else f"compared at step {common:,}"
    text = render_page(
        name=name,
        findings=found,
        sections=[
            several_cross_layer(beside),
            several_gn_hessian(beside),
            several_preconditioner(beside),
            _training(beside),
            _costs(beside),
            _provenance(beside),
        ],
        subtitle=[
            counted(len(beside), "run"),
            at,
            f"page written {said_time(datetime.now(UTC).isoformat())}",
        ],
    )
    write_page(path, text)
    stem = "" if path.name == PAGE else f"{path.stem}."
    write_page(path.with_name(f"{stem}findings.json"), findings_json(name, found, {}))
    write_page(path.with_name(f"{stem}summary.md"), summary_markdown(name, found, {}))
    return path


def _training(beside: Sequence[Beside]) -> Section:
    rows, missing = [], []
    for run in beside:
        summary = summarize_training(run.tree["train"].to_dataset()) if "train" in run.tree.children else None
        if summary is None:
            missing.append(f"{run.label} holds no recorded step of training.")
        else:
            rows.append((run.label, summary))
    charts, clocks = {}, {}
    for name, variable, title in (
        ("loss", "held_out_loss", "held-out loss, nats per token"),
        ("step_size", "step_size", "step size"),
    ):
        series = lines_over_steps(beside, stored_line("train", variable))
        if series:
            charts[name] = over_steps(series, title).update_layout(showlegend=True)
        if series and name == "loss":
            trained = {run.label: run.tree["train"].to_dataset() for run in beside if run.label in dict(rows)}
            clocks = by_clock(charts[name], [sound_rows(trained[line.label], variable) for line in series])
    return Section(
        name="training", title="Training", template="several_training.html.j2", charts=charts, frames=clocks,
        missing="" if rows else " ".join(missing),
        content={"rows": rows, "missing": missing, "clocks": {key: each["label"] for key, each in clocks.items()}},
    )  # fmt: skip


def _costs(beside: Sequence[Beside]) -> Section:
    rows: list[Mapping[str, Any]] = []
    for run in beside:
        table = measuring_costs(run.tree)
        for i, name in enumerate(table["table"].values):
            numbers = {str(key): float(column.values[i]) for key, column in table.items()}
            rows.append({"run": run.label, "table": str(name), **numbers})
    return Section(
        name="costs", title="Costs of measuring", template="several_costs.html.j2", content={"rows": rows},
        missing="" if rows else "No table of these runs holds costs.",
    )  # fmt: skip


def _provenance(beside: Sequence[Beside]) -> Section:
    """Returns what differs between the runs' recipes, data, devices and versions; what is the same is not repeated."""
    facts: list[dict[str, str]] = []
    for run in beside:
        attributes = run.tree.attrs
        known = {key: attributes.get(key) for key in ("device", "seed", "git_commit", "schema_version")}
        for part in ("recipe", "data", "versions"):
            known |= {f"{part}: {key}": value for key, value in flat(decoded(attributes.get(part)), "")}
        facts.append({key: said_setting(value) for key, value in known.items()})
    keys = dict.fromkeys(key for each in facts for key in each)
    differing = {
        key: values
        for key in keys
        if len(set(values := [each.get(key, "not recorded") for each in facts])) > 1
    }
    content = {
        "runs": [run.label for run in beside],
        "differing": differing,
        "same": len(keys) - len(differing),
    }
    return Section(
        name="provenance", title="Provenance", template="several_provenance.html.j2", content=content
    )
