"""The charts of the section on Gauss-Newton against Hessian: norms over training, spectra, and a step's models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.colors import sequential

from hessprobe.instruments.gn_hessian.answers import GAUSS_NEWTON, HESSIAN, MATRICES, RESIDUAL
from hessprobe.instruments.gn_hessian.ladder import BEYOND, LINEARISATION
from hessprobe.pictures.charts import SECOND, Series, evenly_spaced, layout, over_steps, shown

INK = "var(--ink)"
MATRIX_LOOKS = {
    GAUSS_NEWTON: ("G", "var(--series-1)", "solid"),
    HESSIAN: ("H", "var(--series-2)", "solid"),
    RESIDUAL: ("H − G", "var(--series-7)", "dot"),
}
MODEL_LOOKS = {
    "loss": ("loss", INK, "solid"),
    "prox_linear": ("linearised network", "var(--series-3)", "dash"),
    GAUSS_NEWTON: ("G's quadratic", "var(--series-1)", "dot"),
    HESSIAN: ("H's quadratic", "var(--series-2)", "dot"),
}
ERROR_LOOKS = {
    LINEARISATION: ("linearising", "var(--series-2)"),
    BEYOND: ("higher orders", "var(--series-1)"),
}
DIRECTION_LOOKS = {
    "update": ("update", "var(--series-1)"),
    "gauss_newton_step": ("Gauss-Newton step", "var(--series-2)"),
    "negative_gradient": ("−gradient", "var(--series-3)"),
    "top_eigenvector": ("G's top eigenvector", "var(--series-4)"),
    "random": ("random", "var(--series-5)"),
}
ENDS = {"lambda_max": ", largest", "lambda_min": ", smallest"}
COLUMNS_DRAWN = 60
# A density's lowest point drawn, as a share of its highest: an eigenvalue of a billion.
FLOOR = 1e-9


def line_chart(rows: xr.Dataset, name: str, title: str, label: str, **changes) -> go.Figure:
    """Returns one quantity over training with its errors."""
    stderr = rows[f"{name}_stderr"].values if f"{name}_stderr" in rows else None
    line = Series(label=label, steps=rows["step"].values, values=rows[name].values, stderr=stderr)
    return over_steps([line], title, **changes)


def matrix_lines(
    rows: xr.Dataset, names: Mapping[str, str], title: str, matrices: Sequence[str] = MATRICES, **changes
) -> go.Figure:
    """Returns quantities {name: its error's name} of several matrices over training."""
    lines = [
        Series(
            label=f"{MATRIX_LOOKS[matrix][0]}{ENDS.get(name, '')}",
            steps=rows["step"].values,
            values=rows[name].sel(matrix=matrix).values,
            stderr=rows[error].sel(matrix=matrix).values,
            color=MATRIX_LOOKS[matrix][1],
            dash="dash" if name == "lambda_min" else MATRIX_LOOKS[matrix][2],
        )
        for name, error in names.items()
        for matrix in matrices
        if np.isfinite(rows[name].sel(matrix=matrix).values).any()
    ]
    return over_steps(lines, title, **changes).update_layout(showlegend=True)


def block_gap_chart(rows: xr.Dataset) -> go.Figure:
    """Returns ||(H - G)_bb|| / ||G_bb|| by block and step as a heatmap; of many steps, evenly spaced ones."""
    rows = rows.isel(step=evenly_spaced(rows.sizes["step"], COLUMNS_DRAWN))
    figure = go.Figure(layout=layout("step", "", margin={"l": 20, "t": 40}))
    figure.add_heatmap(
        x=[f"{step:,}" for step in rows["step"].values.tolist()],
        y=[shown(_short(str(name))) for name in rows["block"].values],
        z=rows["gn_gap"].values.T,
        customdata=rows["gn_gap_stderr"].values.T,
        zmin=0.0,
        zmax=scale_end(rows["gn_gap"]),
        colorscale=sequential.Cividis,
        xgap=1,
        ygap=1,
        hoverongaps=False,
        hovertemplate="%{y} at step %{x}<br>%{z:.3g} ± %{customdata:.2g} of ‖G<sub>bb</sub>‖<extra></extra>",
        colorbar={
            "orientation": "h", "x": 0.5, "y": 1.0, "yanchor": "bottom", "thickness": 8, "len": 1.0, "ypad": 4,
            "outlinewidth": 0, "tickformat": ".2~g", "nticks": 5,
        },
    )  # fmt: skip
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category", autorange="reversed", title=None, showgrid=False)
    return figure


def scale_end(gaps: xr.DataArray) -> float:
    """Returns the median over steps of the largest gap: one step's can be ten times another's, and hide the others."""
    largest = gaps.where(np.isfinite(gaps)).max("block")
    return float(largest.where(largest > 0).median()) if bool((largest > 0).any()) else 1.0


def density_chart(density: xr.Dataset) -> go.Figure:
    """Returns the densities of the matrices at one row, each with the band from its lowest to its highest probe."""
    lines = [
        (f"{MATRIX_LOOKS[name][0]}", *MATRIX_LOOKS[name][1:], density.sel(matrix=name)) for name in MATRICES
    ]
    return densities(lines)


def densities(lines: Sequence[tuple[str, str, str, xr.Dataset]]) -> go.Figure:
    """Returns densities on a logarithmic scale: (label, colour, dash, {density, low, high} (eigenvalue))."""
    figure = go.Figure(layout=layout("eigenvalue, nats", "density", showlegend=True))
    for label, color, dash, line in lines:
        at, floor = line["eigenvalue"].values, FLOOR * float(np.nanmax(line["density"].values))
        values, low, high = (_above(line[name].values, floor) for name in ("density", "low", "high"))
        if not np.isfinite(values).any():
            continue
        look = {"line": {"color": color, "width": 1.6, "dash": dash}, "mode": "lines", "legendgroup": label}
        edge = {"x": at, "mode": "lines", "hoverinfo": "skip", "showlegend": False, "legendgroup": label}
        thin = {"color": color, "width": 0.5}
        figure.add_scatter(**edge, line=thin, opacity=0.6, y=low)
        figure.add_scatter(**edge, line=thin, opacity=0.6, y=high)
        said = np.stack([low, high], 1)
        figure.add_scatter(
            **look,
            x=at,
            y=values,
            name=shown(label),
            customdata=said,
            hovertemplate=f"{shown(label)}<br>at %{{x:.3g}}: %{{y:.2e}} "
            "(probes: %{customdata[0]:.1e} to %{customdata[1]:.1e})<extra></extra>",
        )
    figure.update_yaxes(type="log", exponentformat="power", dtick=1 if len(lines) < 2 else 2)
    figure.update_xaxes(zeroline=True)
    return figure


def ratio_chart(ratio: xr.DataArray) -> go.Figure:
    """Returns d.Hd / d.Gd along every direction over training."""
    lines = [
        Series(
            label=DIRECTION_LOOKS.get(str(name), (str(name),))[0],
            steps=ratio["step"].values,
            values=ratio.sel(direction=name).values,
            color=DIRECTION_LOOKS.get(str(name), ("", SECOND))[1],
        )
        for name in ratio["direction"].values
        if np.isfinite(ratio.sel(direction=name).values).any()
    ]
    figure = over_steps(lines, "d·Hd / d·Gd").update_layout(showlegend=True)
    return figure.add_hline(y=1.0, line={"color": "var(--faint)", "width": 1, "dash": "dot"})


def models_chart(row: xr.Dataset) -> go.Figure:
    """Returns the loss along one direction at one row, beside its models, against the step length."""
    figure = go.Figure(layout=layout("step length α", "change, nats per token", showlegend=True))
    for name, (label, color, dash) in MODEL_LOOKS.items():
        figure.add_scatter(
            x=row["alpha"].values,
            y=row["change"].sel(model=name).values,
            name=label,
            mode="lines+markers",
            line={"color": color, "width": 1.8, "dash": dash},
            marker={"size": 5, "color": color},
            hovertemplate=f"{label}<br>α %{{x}}: %{{y:.4g}}<extra></extra>",
        )
    return _alpha_axis(figure, row)


def errors_chart(row: xr.Dataset) -> go.Figure:
    """Returns the two errors of Gauss-Newton's model along one direction at one row, with errors over sequences."""
    figure = go.Figure(layout=layout("step length α", "error, nats per token", showlegend=True))
    for name, (label, color) in ERROR_LOOKS.items():
        errors = row[f"{name}_stderr"].values
        figure.add_scatter(
            x=row["alpha"].values,
            y=row[name].values,
            name=label,
            mode="lines+markers",
            line={"color": color, "width": 1.8},
            marker={"size": 6, "color": color},
            error_y={"type": "data", "array": errors, "thickness": 1.2, "width": 3},
            customdata=errors,
            hovertemplate=f"{label}<br>α %{{x}}: %{{y:.3g}} ± %{{customdata:.2g}}<extra></extra>",
        )
    return _alpha_axis(figure, row)


def errors_over_training(rows: xr.Dataset) -> go.Figure:
    """Returns the two errors along one direction at one step length over training, in units of the quadratic's change."""
    promised = abs(rows["change"].sel(model=GAUSS_NEWTON).values)
    scale = np.where(promised > 0, promised, np.nan)
    lines = [
        Series(
            label=label,
            steps=rows["step"].values,
            values=rows[name].values / scale,
            stderr=rows[f"{name}_stderr"].values / scale,
            color=color,
        )
        for name, (label, color) in ERROR_LOOKS.items()
    ]
    return over_steps(lines, "error / promised change", ".2~%", yaxis_tickformat=".0~%")


def _alpha_axis(figure: go.Figure, row: xr.Dataset) -> go.Figure:
    alphas = row["alpha"].values
    figure.update_yaxes(exponentformat="e")
    return figure.update_xaxes(
        type="log", tickvals=alphas.tolist(), ticktext=[f"{alpha:g}" for alpha in alphas]
    )


def _above(values: np.ndarray, floor: float) -> np.ndarray:
    return np.where(values > floor, values, np.nan)


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:8]}…{name[-9:]}"
