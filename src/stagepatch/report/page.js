// Tables that are sorted and filtered, and pictures that are compared. Without it the page holds the same.
"use strict";

const NEXT = { none: "ascending", ascending: "descending", descending: "none" };

function makeSortable(table) {
  const body = table.tBodies[0];
  const asWritten = [...body.rows];
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    header.querySelector("button").addEventListener("click", () => {
      const order = NEXT[header.getAttribute("aria-sort")];
      headers.forEach((other) => other.setAttribute("aria-sort", "none"));
      header.setAttribute("aria-sort", order);
      const rows = order === "none" ? asWritten : sorted(asWritten, column, order === "ascending" ? 1 : -1);
      body.append(...rows);
    });
  });
}

// What is empty comes last in either order.
function sorted(rows, column, sign) {
  const isNumeric = rows.some((row) => row.cells[column].dataset.number !== undefined);
  const key = (row) => (isNumeric ? row.cells[column].dataset.number : row.cells[column].textContent) || "";
  const compare = isNumeric ? (a, b) => a - b : (a, b) => a.localeCompare(b, "en", { numeric: true });
  return [...rows].sort((first, second) => {
    const [a, b] = [key(first), key(second)];
    if (a === "" || b === "") return (a === "") - (b === "");
    return sign * compare(a, b);
  });
}

function makeFilterable(filter) {
  const field = filter.querySelector("input");
  const count = filter.querySelector("output");
  const rows = [...filter.parentElement.querySelectorAll("tbody tr")];
  filter.hidden = false;
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\s+/);
    rows.forEach((row) => {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    });
    count.textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length} rows`;
  });
}

function makeSlider(comparison) {
  const slider = comparison.querySelector("input");
  const show = () => comparison.style.setProperty("--at", `${slider.value}%`);
  comparison.classList.add("slides");
  slider.addEventListener("input", show);
  show();
}

document.querySelectorAll("table").forEach(makeSortable);
document.querySelectorAll(".filter").forEach(makeFilterable);
document.querySelectorAll(".comparison").forEach(makeSlider);
