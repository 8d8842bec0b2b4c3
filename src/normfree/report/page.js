"use strict";
// What the scripts of all pages share: the page's data, its colours, and how plotly is set up.
const page = (() => {
  const narrow = matchMedia("(max-width: 700px)");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  return {
    data: JSON.parse(document.getElementById("data").textContent),
    css,
    narrow,
    // The buttons are named one by one: plotly's own choice has one that uploads the figure to its cloud.
    config: () => ({
      responsive: true, displaylogo: false, displayModeBar: narrow.matches ? false : "hover",
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
      toImageButtonOptions: { filename: document.title, scale: 2 },
    }),
    // What every figure's layout has in common, in the page's colours of the moment.
    style: () => {
      const family = getComputedStyle(document.body).fontFamily;
      return {
        font: { family, size: 12, color: css("--muted") },
        hoverlabel: { bgcolor: css("--card"), bordercolor: css("--muted"), align: "left", font: { color: css("--ink"), family, size: 12 } },
        modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--muted"), activecolor: css("--ink") },
        dragmode: narrow.matches ? false : "zoom", // a finger scrolls the page, a mouse zooms
      };
    },
    onChange: (draw) => [narrow, dark].forEach((query) => query.addEventListener("change", draw)),
    // A figure is one thing with a label: a screen reader would read each number at its ticks.
    ready: (...figures) => {
      figures.forEach((it) => it.querySelectorAll(".main-svg").forEach((svg) => svg.setAttribute("aria-hidden", "true")));
      document.body.dataset.ready = "true";
    },
  };
})();
