// A figure of several records, one shown at a time: by the slider, its arrow keys or play; drawn anew from `state`.
function drawRecords(place, figure, dress) {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const slider = document.getElementById("record"), told = document.getElementById("step"), play = document.getElementById("play");
  const state = { scale: "auto", at: figure.records.length - 1, timer: null };
  const row = (trace) => +(trace.yaxis.slice(1) || 1) - 1;
  const axis = (at) => figure.scales[at][state.scale];
  // Plotly would draw a zero on a logarithmic axis as a line that falls off the panel.
  const drawable = (at, y) => (axis(at).type === "log" ? y.map((value) => (value > 0 ? value : null)) : y);
  const values = (trace, index) => (index < figure.moving ? trace.y : figure.records[state.at].y[index - figure.moving]);

  function layout() {
    const made = structuredClone(figure.layout);
    figure.scales.forEach((_, at) => {
      Object.assign(made[`yaxis${at ? at + 1 : ""}`], axis(at));
      const zeros = axis(at).type === "log" && figure.zeros[at];
      const scale = `${axis(at).type}${page.narrow.matches ? "" : " scale"}${zeros ? (page.narrow.matches ? ", no 0" : ", zeros not drawn") : ""}`;
      made.annotations[at].text += `  <span style="color:${page.css("--muted")}">${scale}</span>`;
    });
    if (page.narrow.matches) Object.assign(made.margin, { l: 46, r: 8 });
    return Object.assign(dress(made, place), { uirevision: state.scale });
  }

  function draw() {
    const { step } = figure.records[state.at];
    all("[data-scale]").forEach((it) => it.setAttribute("aria-pressed", String(it.dataset.scale === state.scale)));
    told.textContent = `step ${step}`;
    slider.value = state.at;
    slider.setAttribute("aria-valuetext", `step ${step}`);
    play.textContent = state.timer === null ? "Play" : "Pause";
    const data = figure.data.map((trace, index) => ({ ...trace, y: drawable(row(trace), values(trace, index)) }));
    return Plotly.react(place, data, layout(), page.config());
  }

  function pause() {
    clearInterval(state.timer);
    state.timer = null;
  }

  function forward() {
    state.at += 1;
    if (state.at === figure.records.length - 1) pause();
    draw();
  }

  slider.addEventListener("input", () => { pause(); state.at = +slider.value; draw(); });
  play.addEventListener("click", () => {
    if (state.timer !== null) pause();
    else {
      if (state.at === figure.records.length - 1) state.at = 0;
      state.timer = setInterval(forward, 150);
    }
    draw();
  });
  all("[data-scale]").forEach((it) => it.addEventListener("click", () => { state.scale = it.dataset.scale; draw(); }));
  page.onChange(draw);
  return draw();
}
