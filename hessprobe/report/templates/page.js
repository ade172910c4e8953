/* Draws the charts with the page's own colours, and lets the slider choose the step that the matrices show. */
(() => {
  "use strict";
  const figures = JSON.parse(document.getElementById("chart-data").textContent);
  const stored = JSON.parse(document.getElementById("frame-data").textContent);
  const frames = stored.cross_layer;
  const DATA = new Set(["x", "y", "z", "text", "customdata", "categoryarray", "tickvals", "ticktext", "bdata"]);
  const touch = matchMedia("(pointer: coarse)").matches;

  const themed = (value, style) => {
    if (typeof value === "string") return value.startsWith("var(--") ? style.getPropertyValue(value.slice(4, -1)).trim() : value;
    if (Array.isArray(value)) return value.map((entry) => themed(entry, style));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, entry]) => [key, DATA.has(key) ? entry : themed(entry, style)]));
  };
  const area = (name) => document.getElementById("chart-" + name);

  const drawAll = () => {
    const style = getComputedStyle(document.documentElement);
    for (const [name, figure] of Object.entries(figures)) {
      if (!area(name)) continue;
      const { data, layout } = themed(figure, style);
      // On a touch screen a drag must scroll the page, not zoom the chart.
      if (touch) layout.dragmode = false;
      Plotly.react(area(name), data, layout, { displayModeBar: false, responsive: true });
    }
    showStep();
    showClock();
  };

  // The loss chart's lines as they lie along the chosen clock: steps, tokens, seconds or gradients.
  function showClock() {
    const chosen = document.querySelector('input[name="clock"]:checked');
    if (!chosen || !stored.training || !area("loss")) return;
    const { title, x, hover } = stored.training[chosen.value];
    const steps = { customdata: stored.training.step.x };
    Plotly.update(area("loss"), { x, hovertemplate: hover, ...steps }, { "xaxis.title.text": title, "xaxis.autorange": true });
  }

  const slider = document.getElementById("step-slider");
  const numbers = (packed) => new Float32Array(Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0)).buffer);
  const unpacked = (group) => Object.fromEntries(Object.entries(group).map(([name, packed]) => [name, numbers(packed)]));
  const stacks = unpacked(frames ? frames.stacks : {});
  const means = unpacked(frames ? frames.means : {});
  const matrixOf = (name, index) => {
    const size = frames.blocks.length;
    const at = index * size * size;
    return frames.blocks.map((_, row) => Array.from(stacks[name].subarray(at + row * size, at + (row + 1) * size)));
  };
  const plusMinus = (value, error) => {
    if (!(error > 0)) return value.toPrecision(4);
    const places = Math.min(6, Math.max(0, 1 - Math.floor(Math.log10(error))));
    return value.toFixed(places) + " ± " + error.toFixed(places);
  };
  // Errors as a trace's hover text takes them: numbers, or words where some are unknown.
  const spoken = (trace, errors) => trace.hovertemplate.includes("customdata:") ? errors
    : errors.map((error) => Number.isFinite(error) ? " ± " + Number(error.toPrecision(2)) : "");
  const escaped = (name) => name.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

  function showStep() {
    if (!frames || !slider) return;
    const index = Number(slider.value);
    document.getElementById("step-shown").textContent = frames.steps[index].toLocaleString("en");
    const coupling = matrixOf("coupling", index);
    const errors = matrixOf("coupling_stderr", index);
    const pairs = [];
    coupling.forEach((row, i) => row.forEach((value, j) => {
      if (j > i && Number.isFinite(value)) pairs.push({ i, j, value, error: errors[i][j] });
    }));
    coupling.forEach((row, i) => { row[i] = null; });
    Plotly.restyle(area("coupling"), { z: [coupling], customdata: [errors.map((row) => spoken(area("coupling").data[0], row))] });

    const chosen = document.querySelector('input[name="direction"]:checked');
    if (area("shares") && chosen) Plotly.restyle(area("shares"), { z: [matrixOf("share." + chosen.value, index)] });

    pairs.sort((a, b) => b.value - a.value);
    document.getElementById("strongest-pairs").replaceChildren(...pairs.slice(0, 8).map(({ i, j, value, error }) => {
      const row = document.createElement("tr");
      row.insertCell().textContent = frames.blocks[i] + " × " + frames.blocks[j];
      row.insertCell().textContent = plusMinus(value, error);
      return row;
    }));

    if (area("coupling_by_distance")) showDistances(pairs, index);
    for (const name of ["off_block_energy", "cross_share"]) {
      if (!area(name)) continue;
      const color = getComputedStyle(document.documentElement).getPropertyValue("--faint").trim();
      const at = { x0: frames.steps[index], x1: frames.steps[index], y0: 0, y1: 1, yref: "paper", type: "line" };
      Plotly.relayout(area(name), { shapes: [{ ...at, layer: "below", line: { color, width: 1, dash: "dot" } }] });
    }
  }

  function showDistances(pairs, index) {
    const placed = pairs.filter(({ i, j }) => frames.depths[i] !== null && frames.depths[j] !== null);
    const size = frames.distances.length;
    const row = (name) => Array.from(means[name].subarray(index * size, (index + 1) * size));
    const chart = area("coupling_by_distance"), mean = row("coupling"), errors = row("coupling_stderr");
    // Of very many distances the errors are a band, whose two edges lie before the means.
    const edges = chart.data.length > 2 ? [-1, 1].map((sign) => mean.map((value, k) => value + sign * errors[k])) : [];
    Plotly.restyle(chart, {
      x: [placed.map(({ i, j }) => Math.abs(frames.depths[i] - frames.depths[j])), ...edges.map(() => frames.distances), frames.distances],
      y: [placed.map((pair) => pair.value), ...edges, mean],
      customdata: [
        placed.map(({ i, j, error }) => ["", (Number.isFinite(error) ? "± " + Number(error.toPrecision(2)) : "") + "<br>"
          + escaped(frames.blocks[i] + " × " + frames.blocks[j])]),
        ...edges.map(() => null),
        spoken(chart.data.at(-1), errors),
      ],
      ...(edges.length ? {} : { "error_y.array": [null, errors] }),
    });
  }

  let waiting = false;
  const later = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; showStep(); });
  };
  if (slider) slider.addEventListener("input", later);
  for (const choice of document.querySelectorAll('input[name="direction"]')) choice.addEventListener("change", later);
  for (const choice of document.querySelectorAll('input[name="clock"]')) choice.addEventListener("change", showClock);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  drawAll();
})();
