"use strict";
// Draws the figure in the page's colours, and again when those or the width change.
(() => {
  const figure = JSON.parse(document.getElementById("data").textContent);
  const chart = document.getElementById("chart");
  const narrow = matchMedia("(max-width: 700px)");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const config = { responsive: true, displaylogo: false, displayModeBar: narrow.matches ? false : "hover" };

  function dress(layout) {
    layout.font = { ...layout.font, color: css("--muted"), family: getComputedStyle(document.body).fontFamily };
    layout.annotations.forEach((it) => { it.font.color = css("--ink"); });
    Object.assign(layout.margin, narrow.matches ? { l: 46, r: 8 } : { l: 64, r: 16 });
    layout.dragmode = narrow.matches ? false : "zoom"; // a finger scrolls the page, a mouse zooms
    layout.hoverlabel = { bgcolor: css("--card"), bordercolor: css("--muted"), font: { color: css("--ink") } };
    const bar = { bgcolor: css("--line"), bordercolor: css("--muted"), activebgcolor: css("--accent") };
    layout.sliders.forEach((it) => Object.assign(it, bar, { currentvalue: { ...it.currentvalue, font: { size: 15, color: css("--ink") } } }));
    layout.updatemenus.forEach((it) => Object.assign(it, { bgcolor: css("--paper"), bordercolor: css("--line"), font: { color: css("--ink") } }));
    return layout;
  }

  const redress = () => Plotly.relayout(chart, dress(structuredClone(chart.layout)));
  Plotly.newPlot(chart, figure.data, dress(figure.layout), config)
    .then(() => Plotly.addFrames(chart, figure.frames))
    .then(() => {
      narrow.addEventListener("change", redress);
      dark.addEventListener("change", redress);
      document.body.dataset.ready = "true";
    });
})();
