"use strict";

// Content that scrolls sideways is reached by the keyboard too.
function reachScrollers() {
  for (const one of document.querySelectorAll("pre, .table-wrapper, .text_html, div.math, mjx-container")) {
    if (one.scrollWidth > one.clientWidth + 1) one.setAttribute("tabindex", "0");
    else one.removeAttribute("tabindex");
  }
}
window.addEventListener("load", () => {
  reachScrollers();
  window.addEventListener("resize", reachScrollers);
  if (window.MathJax && MathJax.startup) MathJax.startup.promise.then(reachScrollers);
});

// A page that is opened as a file cannot read other files, so results of a search come without excerpts there.
if (location.protocol === "file:" && typeof DOCUMENTATION_OPTIONS !== "undefined") {
  DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
}
