// What all charts share: elements, numbers, colours, a readout that screen readers announce.
"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const redraw = [];
const dark = () => document.documentElement.dataset.theme === "dark";
const colour = (n) => { const all = dark() ? DATA.dark : DATA.light; return all[n % all.length]; };
const show = (v) => v === null || v === undefined ? "no value" : Math.abs(v) >= 1e5 ? v.toExponential(2) : String(+v.toPrecision(4));

function el(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "line", "text", "circle", "rect", "polygon"].includes(name);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function frame(figure, chart) {
  const readout = el("p", { class: "readout", "aria-live": "polite" });
  figure.append(el("figcaption", {}, chart.title));
  return readout;
}

// A table of the chart's numbers, made when it is first opened.
function dataTable(rows, head) {
  const details = el("details", {}, el("summary", {}, "Numbers"));
  details.addEventListener("toggle", () => {
    if (details.querySelector("table")) return;
    const table = el("table", {}, el("thead", {}, el("tr", {}, ...head.map((h) => el("th", { scope: "col" }, h)))));
    table.append(el("tbody", {}, ...rows().map((r) => el("tr", {}, ...r.map((c) => el("td", { class: "n" }, typeof c === "string" ? c : show(c)))))));
    details.append(el("div", { class: "scroll" }, table));
  });
  return details;
}

const ANCHORS = DATA.cividis.map((h) => [1, 3, 5].map((n) => parseInt(h.slice(n, n + 2), 16)));
function cividis(share) {
  const at = Math.min(Math.max(share, 0), 1) * (ANCHORS.length - 1), low = Math.floor(at), high = Math.min(low + 1, ANCHORS.length - 1);
  return ANCHORS[low].map((v, n) => Math.round(v + (ANCHORS[high][n] - v) * (at - low)));
}
