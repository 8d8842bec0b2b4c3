// Draws each figure of the data in the element of its name, in the page's colours, and again when those change.
(() => {
  const { css, narrow } = page;

  function dress(layout) {
    Object.assign(layout, page.style());
    if (layout.sliders) Object.assign(layout.margin, narrow.matches ? { l: 46, r: 8 } : { l: 64, r: 16 });
    (layout.annotations ?? []).forEach((it) => { it.font = { ...it.font, color: css("--ink") }; });
    const bar = { bgcolor: css("--line"), bordercolor: css("--muted"), activebgcolor: css("--accent") };
    (layout.sliders ?? []).forEach((it) => Object.assign(it, bar, { currentvalue: { ...it.currentvalue, font: { size: 15, color: css("--ink") } } }));
    (layout.updatemenus ?? []).forEach((it) => Object.assign(it, { bgcolor: css("--paper"), bordercolor: css("--line"), font: { color: css("--ink") } }));
    return layout;
  }

  const drawn = Object.entries(page.data).map(([name, figure]) => {
    const place = document.getElementById(name);
    page.onChange(() => Plotly.relayout(place, dress(structuredClone(place.layout))));
    const frames = figure.frames ?? [];
    return Plotly.newPlot(place, figure.data, dress(figure.layout), page.config())
      .then(() => (frames.length ? Plotly.addFrames(place, frames) : null));
  });
  Promise.all(drawn).then(page.ready);
})();
