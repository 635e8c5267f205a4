// P(b | a) between any two layers: two lists choose the layers (the same: co-activation), the matrix below shows them.
function matrices(figure, chart) {
  figure.append(el("figcaption", {}, chart.title));
  const from = el("select"), to = el("select");
  const label = (text, node) => el("label", {}, text, " ", node);
  figure.append(el("div", { class: "choice" }, label("layer of a", from), label("layer of b", to)));
  const view = heatView(figure, { x: chart.x, y: chart.y, value: "P(b | a)" });
  const pairs = Object.keys(chart.cells).map((key) => key.split(",").map(Number));
  const option = (n) => el("option", { value: n }, n);
  from.append(...[...new Set(pairs.map(([l]) => l))].sort((a, b) => a - b).map(option));

  function targets() {
    const before = to.value, later = pairs.filter(([l]) => l === +from.value).map(([, m]) => m).sort((a, b) => a - b);
    to.replaceChildren(...later.map(option));
    to.value = before && later.includes(+before) ? before : later.find((m) => m > +from.value) ?? later[0];
    update();
  }
  function update() {
    const raw = atob(chart.cells[`${from.value},${to.value}`] || ""), width = chart.sizes[+to.value], rows = [];
    for (let n = 0; n < raw.length; n += width) rows.push(Array.from(raw.slice(n, n + width), (c) => (c.charCodeAt(0) / 255) ** 2));
    view(rows, `${chart.title}, layer ${from.value} to ${to.value}`);
  }
  from.addEventListener("change", targets);
  to.addEventListener("change", update);
  targets();
}
