"use strict";
// Draws each figure in the element of its name, in the page's colours, and again when those change.
(() => {
  const figures = JSON.parse(document.getElementById("data").textContent);
  const narrow = matchMedia("(max-width: 700px)");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const config = { responsive: true, displaylogo: false, displayModeBar: narrow.matches ? false : "hover" };

  function dress(layout) {
    layout.font = { ...layout.font, color: css("--muted"), family: getComputedStyle(document.body).fontFamily };
    layout.dragmode = narrow.matches ? false : "zoom"; // a finger scrolls the page, a mouse zooms
    layout.hoverlabel = { bgcolor: css("--card"), bordercolor: css("--muted"), font: { color: css("--ink") } };
    layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: css("--muted"), activecolor: css("--ink") };
    if (layout.sliders) Object.assign(layout.margin, narrow.matches ? { l: 46, r: 8 } : { l: 64, r: 16 });
    (layout.annotations ?? []).forEach((it) => { it.font = { ...it.font, color: css("--ink") }; });
    const bar = { bgcolor: css("--line"), bordercolor: css("--muted"), activebgcolor: css("--accent") };
    (layout.sliders ?? []).forEach((it) => Object.assign(it, bar, { currentvalue: { ...it.currentvalue, font: { size: 15, color: css("--ink") } } }));
    (layout.updatemenus ?? []).forEach((it) => Object.assign(it, { bgcolor: css("--paper"), bordercolor: css("--line"), font: { color: css("--ink") } }));
    return layout;
  }

  const drawn = Object.entries(figures).map(([name, figure]) => {
    const place = document.getElementById(name);
    const redress = () => Plotly.relayout(place, dress(structuredClone(place.layout)));
    narrow.addEventListener("change", redress);
    dark.addEventListener("change", redress);
    const frames = figure.frames ?? [];
    return Plotly.newPlot(place, figure.data, dress(figure.layout), config)
      .then(() => (frames.length ? Plotly.addFrames(place, frames) : null));
  });
  Promise.all(drawn).then(() => { document.body.dataset.ready = "true"; });
})();
