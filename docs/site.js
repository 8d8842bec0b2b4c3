// Tables that are wider than the page scroll in their own box, which keys must reach to scroll it.
{
  const mark = () => document.querySelectorAll(".md-typeset__scrollwrap").forEach((box) => {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  });
  ["load", "resize"].forEach((event) => addEventListener(event, mark));
  addEventListener("toggle", mark, true); // of <details>, which does not bubble
}
