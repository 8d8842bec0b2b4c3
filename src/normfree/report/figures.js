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
    // From its first layout: that of the place has sizes of the window as it was.
    const draw = () => Plotly.react(place, figure.data, { ...dress(structuredClone(figure.layout), place), uirevision: true }, page.config());
    page.onChange(draw);
    return draw();
  });
  Promise.all(drawn).then(() => page.ready(...places));
})();
