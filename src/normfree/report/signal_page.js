// The curves of the report: drawn anew from `state` after every click, so that no click depends on another.
(() => {
  const { data, css, narrow } = page;
  const chart = document.getElementById("chart");
  const all = (selector) => [...document.querySelectorAll(selector)];
  const state = { scale: "auto", hidden: new Set(), selected: null, view: 0, range: null };
  // Everything is listed from the entry on, which stands one before block 0.
  const ENTRY = -1;
  const last = Math.max(1, ...data.models.map((model) => model.names.length + ENTRY - 1));
  // Plotly reads its own small HTML in hover text; names must show as they are.
  const escape = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const finite = (value) => (typeof value === "number" ? value : null);
  const axis = (row) => (row === 0 ? "" : String(row + 1));
  const isLog = (panel) => !panel.signed && (state.scale === "auto" ? panel.log : state.scale === "log");

  function isZero(panel, model, x) {
    const value = model.curves[panel.curve][x], variance = finite(model.curves.avg_channel_var[x]);
    return value === 0 || (panel.curve === "avg_channel_sq_mean" && value !== null && value < data.rounding * variance);
  }

  function shorten(text, width) {
    if (text.length <= width) return text;
    const head = Math.floor(((width - 1) * 2) / 3);
    return `${text.slice(0, head)}…${text.slice(text.length - (width - 1 - head))}`;
  }

  function number(value) {
    if (typeof value === "string") return value;
    const size = Math.abs(value);
    return value === 0 || (size >= 1e-3 && size < 1e5) ? String(+value.toPrecision(4)) : value.toExponential(3);
  }

  function hoverText(model, x) {
    const width = narrow.matches ? 34 : 60;
    const place = x === 0 ? `entry: input of the first ${model.unit}` : `${model.unit} ${x + ENTRY}`;
    const lines = [
      `<b>${escape(shorten(model.names[x], width))}</b>`,
      `${place}${model.transitions[x] ? ", transition" : ""}`,
      `shape ${escape(model.shapes[x])}, channels on axis ${model.axes[x]}`,
    ];
    for (const panel of data.panels) {
      const value = model.curves[panel.curve][x];
      if (value !== null) lines.push(`${panel.title.toLowerCase()} <b>${number(value)}</b>`);
      if (panel.curve === "avg_channel_var" && model.expected[x] !== null) {
        lines.push(`expected variance <b>${number(model.expected[x])}</b>`);
      }
    }
    if (model.dead[x]) lines.push(`dead channels <b>${number(100 * model.dead[x])} %</b>`);
    if (model.notes[x]) lines.push(escape(shorten(model.notes[x], width)));
    return [...lines, `<i>${escape(shorten(model.name, width))}</i>`].join("<br>");
  }

  function curve(panel, row, model, index) {
    // Plotly would draw a zero on a logarithmic axis as a line that falls off the panel.
    const y = model.curves[panel.curve].map((value, x) => {
      if (isZero(panel, model, x)) return isLog(panel) ? null : 0;
      return finite(value);
    });
    const alone = y.map((value, x) => value !== null && (y[x - 1] ?? null) === null && (y[x + 1] ?? null) === null);
    const size = (turn, x) => (turn ? 8 : y.length <= 61 || alone[x] ? 5 : 2.5);
    return {
      type: "scatter", mode: "lines+markers", name: escape(model.name), legendgroup: `m${index}`, showlegend: false,
      x: y.map((_, x) => x + ENTRY), y, yaxis: `y${axis(row)}`, visible: !state.hidden.has(index), connectgaps: false,
      meta: { kind: "curve", model: index, curve: panel.curve },
      line: { color: model.color, dash: model.dash, width: 2 },
      marker: {
        color: model.color, size: model.transitions.map(size), opacity: 1, line: { width: 1.5, color: model.color },
        symbol: model.transitions.map((turn) => (turn ? "circle-open" : "circle")),
      },
      text: model.names.map((_, x) => hoverText(model, x)), hovertemplate: "%{text}<extra></extra>",
    };
  }

  function expected(row, model, index) {
    return {
      type: "scatter", mode: "lines", x: model.expected.map((_, x) => x + ENTRY), y: model.expected, yaxis: `y${axis(row)}`,
      legendgroup: `m${index}`, showlegend: false, hoverinfo: "skip", visible: !state.hidden.has(index),
      meta: { kind: "expected", model: index }, line: { color: css("--ink"), dash: "5px,4px", width: 1.3 },
    };
  }

  function traces() {
    const list = [];
    data.panels.forEach((panel, row) => {
      if (panel.reference !== null) {
        list.push({
          type: "scatter", mode: "lines", x: [ENTRY, last], y: [panel.reference, panel.reference], yaxis: `y${axis(row)}`,
          hoverinfo: "skip", showlegend: false, meta: { kind: "reference" },
          line: { color: css("--ink"), dash: "1.5px,3px", width: 1.2 },
        });
      }
      data.models.forEach((model, index) => list.push(curve(panel, row, model, index)));
      if (panel.curve === "avg_channel_var") {
        data.models.forEach((model, index) => {
          if (model.expected.some((value) => value !== null)) list.push(expected(row, model, index));
        });
      }
    });
    return list;
  }

  // A linear axis never zooms into rounding noise, and starts at zero where that costs little.
  function include(panel) {
    const shown = data.models.filter((_, index) => !state.hidden.has(index));
    const values = shown.flatMap((model) => model.curves[panel.curve]).filter((value) => typeof value === "number");
    if (panel.signed || values.length === 0) return [];
    const [low, high] = values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
    return [low < 0.5 * high ? 0 : 0.45 * (low + high), 0.55 * (low + high)];
  }

  function layout() {
    const rows = data.panels.length, title = 34, plot = narrow.matches ? 150 : 175, bottom = 48;
    const inner = rows * (plot + title), at = (pixels) => 1 - pixels / inner;
    // Ticks that plotly chooses need not have one at the entry: then it is named beside them.
    const ticked = last <= 20 && !narrow.matches, tick = ticked ? "entry" : " ";
    const told = narrow.matches ? "" : " (entry: input of the first)";
    const made = {
      ...page.style(), height: inner + bottom + 6, margin: { l: narrow.matches ? 50 : 62, r: 14, t: 6, b: bottom },
      paper_bgcolor: css("--paper"), plot_bgcolor: css("--paper"), hovermode: "closest", hoverdistance: 30,
      annotations: [], shapes: [],
      xaxis: {
        anchor: `y${axis(rows - 1)}`, title: { text: data.x_label + told, standoff: 8 }, range: state.range ?? home(),
        uirevision: state.view, tickformat: "d", labelalias: { "-1": tick, "\u22121": tick }, dtick: ticked ? 1 : undefined, zeroline: false,
        showgrid: false, ticks: "outside", tickcolor: css("--line"), showline: true, linecolor: css("--line"),
        showspikes: true, spikemode: "across", spikesnap: "data", spikethickness: 1, spikedash: "solid",
        spikecolor: css("--muted"),
      },
    };
    data.panels.forEach((panel, row) => {
      const top = row * (plot + title) + title, log = isLog(panel);
      made[`yaxis${axis(row)}`] = {
        type: log ? "log" : "linear", domain: [Math.max(0, at(top + plot)), at(top)], uirevision: `${state.view} ${log}`,
        autorangeoptions: log ? {} : { include: include(panel) }, exponentformat: "power", nticks: 6,
        tickfont: { size: log ? 10 : 12 }, gridcolor: css("--grid"), zerolinecolor: css("--line"), showline: true, linecolor: css("--line"),
      };
      made.annotations.push(heading(panel, at(top), log), ...crosses(panel, row));
    });
    if (!ticked) made.annotations.push({
      text: "entry", xref: "x", yref: "paper", x: ENTRY, y: 0, xanchor: "right", xshift: last > 60 ? -6 : 6,
      yanchor: "top", yshift: -4, showarrow: false, font: { color: css("--ink"), size: 12 },
    });
    if (state.selected !== null) made.shapes.push(band(state.selected));
    return made;
  }

  const home = () => [ENTRY - 0.02 * last - 0.1, 1.02 * last + 0.1];

  function heading(panel, y, log) {
    const zeros = log && data.models.some((model, i) => !state.hidden.has(i) && model.names.some((_, x) => isZero(panel, model, x)));
    const told = `${log ? "log" : "linear"}${narrow.matches ? "" : " scale"}${zeros ? (narrow.matches ? ", no 0" : ", zeros not drawn") : ""}`;
    const scale = `<span style="color:${css("--muted")}">${told}</span>`;
    return {
      text: `<b>${panel.title}</b>  ${scale}`, xref: "paper", yref: "paper", x: 0, y, xanchor: "left",
      yanchor: "bottom", yshift: 4, showarrow: false, font: { color: css("--ink"), size: 13 },
    };
  }

  function crosses(panel, row) {
    const shown = data.models.filter((model, index) => !state.hidden.has(index) && model.gaps[panel.curve] !== null);
    return shown.map((model) => ({
      text: "<b>×</b>", x: model.gaps[panel.curve], xref: "x", y: 1, yref: `y${axis(row)} domain`, yanchor: "middle", showarrow: false,
      font: { color: model.color, size: 18 }, hovertext: `non-finite from ${model.gaps[panel.curve] === ENTRY ? "the entry" : `${model.unit} ${model.gaps[panel.curve]}`}`,
    }));
  }

  function band(x) {
    return {
      type: "rect", xref: "x", yref: "paper", x0: x - 0.5, x1: x + 0.5, y0: 0, y1: 1, layer: "below",
      fillcolor: css("--accent"), opacity: 0.2, line: { width: 0 },
    };
  }

  function draw() {
    all("[data-scale]").forEach((it) => it.setAttribute("aria-pressed", String(it.dataset.scale === state.scale)));
    all("#legend button").forEach((it) => it.setAttribute("aria-pressed", String(!state.hidden.has(+it.dataset.model))));
    all(".model-findings").forEach((it) => it.classList.toggle("hidden-model", state.hidden.has(+it.dataset.model)));
    return Plotly.react(chart, traces(), layout(), page.config());
  }

  function look(selected, range) {
    Object.assign(state, { selected, range, view: state.view + 1 });
    all(".finding.selected").forEach((it) => it.classList.remove("selected"));
  }

  function locate(button) {
    const x = +button.dataset.block;
    look(x, last > 60 ? [Math.max(home()[0], x - 15), Math.min(home()[1], x + 15)] : null);
    state.hidden.delete(+button.dataset.model);
    button.closest(".finding").classList.add("selected");
    draw();
    const box = chart.getBoundingClientRect();
    if (box.bottom < 200 || box.top > innerHeight - 200) chart.scrollIntoView({ block: "start" });
  }

  function isolate(model) {
    state.hidden = new Set(data.models.keys());
    state.hidden.delete(model);
    draw();
  }

  function toggle(model) {
    if (!state.hidden.delete(model)) state.hidden.add(model);
    draw();
  }

  all("[data-scale]").forEach((it) => it.addEventListener("click", () => { state.scale = it.dataset.scale; draw(); }));
  all("#legend button").forEach((it) => {
    it.addEventListener("click", (event) => (event.shiftKey ? isolate : toggle)(+it.dataset.model));
    it.addEventListener("dblclick", () => isolate(+it.dataset.model));
  });
  all(".locate").forEach((it) => it.addEventListener("click", () => locate(it)));
  document.getElementById("reset-view").addEventListener("click", () => { look(null, null); draw(); });
  page.onChange(draw);
  draw().then(() => page.ready(chart));
})();
