// A matrix as canvas, one cell a block of pixels. Arrow keys move the cell that is read out.
function heatView(figure, labels) {
  const canvas = el("canvas", { tabindex: 0, role: "application" });
  const mark = canvas.getContext("2d");
  const scale = el("div", { class: "scale" }), low = el("span"), high = el("span"), bar = el("i");
  bar.style.background = `linear-gradient(90deg, ${DATA.cividis.join(",")})`;
  scale.append(low, bar, high);
  const readout = el("p", { class: "readout", "aria-live": "polite" });
  const at = { row: 0, column: 0, on: false };
  const across = el("div", { class: "across", "aria-hidden": "true" }), down = el("div", { class: "down", "aria-hidden": "true" });
  const name = (names, n) => names ? names[n] : n;
  let cells = [[]], size = 1;

  // Numbers beside the cells: every one, or every 2nd, 5th, 10th … so that at most 16 are shown.
  function ticks(node, count, names, side) {
    const step = [1, 2, 5, 10, 20, 50, 100, 200, 500].find((n) => count / n <= 16) || 1000;
    const shown = Array.from({ length: Math.ceil(count / step) }, (_, n) => n * step);
    node.replaceChildren(...shown.map((n) => el("span", { style: `${side}:${(n + 0.5) / count * 100}%` }, name(names, n))));
  }

  function draw() {
    const rows = cells.length, columns = cells[0].length;
    size = Math.max(2, Math.floor(480 / Math.max(columns, 1)));
    canvas.width = columns * size;
    const tall = Math.max(2, Math.min(size, Math.floor(480 / rows)));
    canvas.height = rows * tall;
    const known = cells.flat().filter((v) => v !== null);
    const least = known.reduce((a, b) => Math.min(a, b), 0), most = known.reduce((a, b) => Math.max(a, b), least + 1e-9);
    cells.forEach((row, r) => row.forEach((value, c) => {
      if (value === null) return;
      mark.fillStyle = `rgb(${cividis((value - least) / (most - least)).join(",")})`;
      mark.fillRect(c * size, r * tall, size, tall);
    }));
    ticks(across, columns, labels.columns, "left");
    ticks(down, rows, labels.rows, "top");
    low.textContent = show(least);
    high.textContent = show(most);
    canvas.tall = tall;
    if (!at.on) return;
    at.row = Math.min(at.row, rows - 1);
    at.column = Math.min(at.column, columns - 1);
    mark.lineWidth = 2;
    for (const [inset, stroke] of [[0, "#000"], [1.5, "#fff"]]) {
      mark.strokeStyle = stroke;
      mark.strokeRect(at.column * size + inset, at.row * tall + inset, size - 2 * inset, tall - 2 * inset);
    }
    readout.textContent = `${labels.y} ${name(labels.rows, at.row)}, ${labels.x} ${name(labels.columns, at.column)}: ${labels.value} ${show(cells[at.row][at.column])}`;
  }
  canvas.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], Home: [0, -1e6], End: [0, 1e6] }[event.key];
    if (!by) return;
    event.preventDefault();
    if (at.on) { at.row = Math.min(Math.max(at.row + by[0], 0), cells.length - 1); at.column = Math.min(Math.max(at.column + by[1], 0), cells[0].length - 1); }
    at.on = true;
    draw();
  });
  canvas.addEventListener("pointermove", (event) => {
    const rect = canvas.getBoundingClientRect();
    at.column = Math.floor((event.clientX - rect.left) / rect.width * cells[0].length);
    at.row = Math.floor((event.clientY - rect.top) / rect.height * cells.length);
    at.on = true;
    draw();
  });
  figure.append(el("div", { class: labels.rows ? "matrix named" : "matrix" }, down, canvas, across), scale, el("p", { class: "readout" }, `across: ${labels.x}; down: ${labels.y}; colour: ${labels.value}`), readout);
  return (values, title) => { cells = values.length ? values : [[]]; canvas.setAttribute("aria-label", `${title}. Arrow keys read the values.`); draw(); };
}

function heat(figure, chart) {
  figure.append(el("figcaption", {}, chart.title));
  heatView(figure, { x: chart.x, y: chart.y, value: chart.value, rows: chart.rows, columns: chart.columns })(chart.cells, chart.title);
  const rows = () => chart.cells.flatMap((row, r) => row.map((value, c) => [chart.rows ? chart.rows[r] : r, chart.columns ? chart.columns[c] : c, value]));
  figure.append(dataTable(rows, [chart.y, chart.x, chart.value]));
}
