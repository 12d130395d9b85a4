"use strict";
// Tables sort by the column whose heading is pressed: up first, then down. Rows without a number stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") === "ascending";
      const rows = [...table.tBodies[0].rows].map((row, place) => [row, place, row.cells[column]]);
      const number = (cell) => ("value" in cell.dataset ? Number(cell.dataset.value) : null);
      const numeric = rows.some(([, , cell]) => number(cell) !== null);
      rows.sort(([, i, a], [, j, b]) => {
        const x = numeric ? number(a) : a.textContent, y = numeric ? number(b) : b.textContent;
        if (x === null || y === null) return (x === null) - (y === null) || i - j;
        const order = numeric ? x - y : x.localeCompare(y, undefined, { numeric: true });
        return (down ? -order : order) || i - j;
      });
      table.tBodies[0].append(...rows.map(([row]) => row));
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      document.getElementById("said").textContent =
        `${table.caption.textContent}: sorted by ${heading.textContent}, ${down ? "descending" : "ascending"}.`;
    });
  });
}
