"use strict";

// Content that scrolls sideways is reached by the keyboard too.
function reachScrollers() {
  for (const one of document.querySelectorAll("pre, .table-wrapper, .text_html, div.math, mjx-container")) {
    if (one.scrollWidth > one.clientWidth + 1) one.setAttribute("tabindex", "0");
    else one.removeAttribute("tabindex");
  }
}
// Where lines of what a program prints scroll, those that are sentences are broken instead: no table is as wide.
const LONGEST = 100;
function breakSentences() {
  for (const pre of document.querySelectorAll(".highlight-text pre, div.cell_output pre")) {
    if (pre.querySelector("span:not(:empty)")) continue;
    const lines = pre.textContent.split("\n");
    if (!lines.some((line) => line.length > LONGEST)) continue;
    pre.replaceChildren();
    lines.forEach((line, number) => {
      if (number) pre.append("\n");
      if (line.length <= LONGEST) return pre.append(line);
      const sentence = document.createElement("span");
      sentence.className = "sentence";
      sentence.textContent = line;
      pre.append(sentence);
    });
  }
}

window.addEventListener("load", () => {
  breakSentences();
  reachScrollers();
  window.addEventListener("resize", reachScrollers);
  if (window.MathJax && MathJax.startup) MathJax.startup.promise.then(reachScrollers);
});

// A page that is opened as a file cannot read other files, so results of a search come without excerpts there.
if (location.protocol === "file:" && typeof DOCUMENTATION_OPTIONS !== "undefined") {
  DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
}
