// Draws each figure of the data in the element of its name, in the page's colours, and again when those change.
(() => {
  const { css, narrow } = page;

  function dress(layout, place) {
    Object.assign(layout, page.style());
    if (layout.yaxis.scaleanchor) layout.height = Math.min(560, place.clientWidth + 110); // as high as wide, and its bar
    (layout.annotations ?? []).forEach((it) => { it.font = { ...it.font, color: css("--ink") }; });
    return layout;
  }

  const places = [];
  const drawn = Object.entries(page.data).map(([name, figure]) => {
    const place = document.getElementById(name);
    places.push(place);
    if (figure.records) return drawRecords(place, figure, dress);
    page.onChange(() => Plotly.relayout(place, dress(structuredClone(place.layout), place)));
    return Plotly.newPlot(place, figure.data, dress(figure.layout, place), page.config());
  });
  Promise.all(drawn).then(() => page.ready(...places));
})();
