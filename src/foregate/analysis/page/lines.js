// Curves as SVG. Arrow keys: left and right along the axis, up and down between curves. Legend buttons hide curves.
function lines(figure, chart) {
  const W = 520, H = 300, box = { l: 52, r: 12, t: 8, b: 38 };
  const readout = frame(figure, chart), hidden = new Set();
  const svg = el("svg", { viewBox: `0 0 ${W} ${H}`, tabindex: 0, role: "application", "aria-label": `${chart.title}. Arrow keys read the values.` });
  const legend = el("div", { class: "legend" });
  const at = { series: 0, point: 0, on: false };
  const toX = chart.log ? Math.log2 : (v) => v;
  const drawn = () => chart.series.map((s, n) => ({ ...s, n })).filter((s) => !hidden.has(s.n));

  function scales() {
    const used = drawn().length ? drawn() : chart.series;
    const xs = used.flatMap((s) => s.x).map(toX), ys = used.flatMap((s) => [...s.y, ...(s.low || []), ...(s.high || [])]).filter((v) => v !== null);
    const x0 = Math.min(...xs, xs.length ? Infinity : 0), x1 = Math.max(...xs, xs.length ? -Infinity : 1), y0 = Math.min(0, ...ys), top = Math.max(y0 + 1e-9, ...ys);
    const step = nice((top - y0) / 5), y1 = y0 + Math.ceil((top - y0) / step - 1e-9) * step;
    const sx = (v) => box.l + (x1 > x0 ? (toX(v) - x0) / (x1 - x0) : .5) * (W - box.l - box.r);
    const sy = (v) => H - box.b - (v - y0) / (y1 - y0) * (H - box.t - box.b);
    return { sx, sy, x0, x1, y0, y1, step };
  }
  function nice(raw) {
    const power = 10 ** Math.floor(Math.log10(raw));
    return power * [1, 2, 2.5, 5, 10].find((m) => m * power >= raw * 0.999);
  }
  function ticks(s) {
    if (chart.log) return Array.from({ length: Math.floor(s.x1) - Math.ceil(s.x0) + 1 }, (_, n) => 2 ** (Math.ceil(s.x0) + n));
    const step = Math.max(nice((s.x1 - s.x0) / 8 || 1), s.x1 > 5 ? 1 : 0), first = Math.ceil(s.x0 / step);
    return Array.from({ length: Math.floor(s.x1 / step + 1e-9) - first + 1 }, (_, n) => (first + n) * step);
  }
  function marker(n, x, y, r = 3) {
    const fill = colour(n), kind = n % 4;
    if (kind === 0) return el("circle", { cx: x, cy: y, r, fill });
    if (kind === 1) return el("rect", { x: x - r, y: y - r, width: 2 * r, height: 2 * r, fill });
    const points = kind === 2 ? [[0, -r - 1], [r + 1, r], [-r - 1, r]] : [[0, -r - 1], [r + 1, 0], [0, r + 1], [-r - 1, 0]];
    return el("polygon", { points: points.map(([dx, dy]) => `${x + dx},${y + dy}`).join(" "), fill });
  }
  function path(s, sx, sy) {
    let d = "", open = false;
    s.x.forEach((x, n) => { if (s.y[n] === null) { open = false; return; } d += `${open ? "L" : "M"}${sx(x).toFixed(1)},${sy(s.y[n]).toFixed(1)}`; open = true; });
    return el("path", { d, fill: "none", stroke: colour(s.n), "stroke-width": 1.8, "stroke-dasharray": s.dashed ? "6 4" : "none" });
  }
  function band(s, sx, sy) {
    const good = s.x.map((x, n) => [x, s.low[n], s.high[n]]).filter(([, l, h]) => l !== null && h !== null);
    const points = [...good.map(([x, l]) => [x, l]), ...good.reverse().map(([x, , h]) => [x, h])].map(([x, y]) => `${sx(x).toFixed(1)},${sy(y).toFixed(1)}`);
    return el("polygon", { points: points.join(" "), fill: colour(s.n), opacity: .16 });
  }
  function draw() {
    const s = scales(), { sx, sy } = s;
    svg.replaceChildren();
    for (let y = s.y0; y <= s.y1 + s.step / 2; y += s.step) {
      svg.append(el("line", { class: "grid", x1: box.l, x2: W - box.r, y1: sy(y), y2: sy(y) }), el("text", { class: "axis", x: box.l - 5, y: sy(y) + 4, "text-anchor": "end" }, show(+y.toPrecision(6))));
    }
    for (const x of ticks(s)) svg.append(el("text", { class: "axis", x: sx(x), y: H - box.b + 15, "text-anchor": "middle" }, show(x)));
    svg.append(el("text", { class: "axis", x: (W + box.l) / 2, y: H - 5, "text-anchor": "middle" }, chart.x));
    svg.append(el("text", { class: "axis", transform: `translate(11 ${H / 2 - 10}) rotate(-90)`, "text-anchor": "middle" }, chart.y));
    for (const one of drawn()) {
      if (one.low) svg.append(band(one, sx, sy));
      svg.append(path(one, sx, sy));
      one.x.forEach((x, n) => { if (one.y[n] !== null) svg.append(marker(one.n, sx(x), sy(one.y[n]))); });
    }
    const one = drawn().find((d) => d.n === at.series);
    if (at.on && one && one.x.length) {
      const n = Math.min(at.point, one.x.length - 1), x = sx(one.x[n]);
      svg.append(el("line", { class: "cursor", x1: x, x2: x, y1: box.t, y2: H - box.b }));
      if (one.y[n] !== null) svg.append(marker(one.n, x, sy(one.y[n]), 6));
      const bounds = one.low && one.low[n] !== null ? ` [${show(one.low[n])}, ${show(one.high[n])}]` : "";
      readout.textContent = `${one.name}: ${chart.x} ${show(one.x[n])}, ${chart.y} ${show(one.y[n])}${bounds}`;
    }
  }
  function move(dx, dy) {
    const list = drawn();
    if (!list.length) return;
    const place = Math.max(0, list.findIndex((d) => d.n === at.series)), next = list[(place + dy + list.length) % list.length];
    at.series = next.n;
    at.point = Math.min(Math.max(at.point + (at.on ? dx : 0), 0), next.x.length - 1);
    at.on = true;
    draw();
  }
  svg.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], Home: [-1e6, 0], End: [1e6, 0] }[event.key];
    if (by) { event.preventDefault(); move(...by); }
  });
  svg.addEventListener("pointermove", (event) => {
    const rect = svg.getBoundingClientRect(), px = (event.clientX - rect.left) / rect.width * W, py = (event.clientY - rect.top) / rect.height * H;
    const { sx, sy } = scales();
    let best = [Infinity];
    for (const s of drawn()) s.x.forEach((x, n) => { if (s.y[n] !== null) { const d = Math.hypot(sx(x) - px, sy(s.y[n]) - py); if (d < best[0]) best = [d, s.n, n]; } });
    if (best[0] < 60) { [at.series, at.point, at.on] = [best[1], best[2], true]; draw(); }
  });
  function key() {
    legend.replaceChildren(...chart.series.map((s, n) => {
      const sample = el("svg", { viewBox: "0 0 32 12", "aria-hidden": "true" }, el("path", { d: "M0,6L32,6", stroke: colour(n), "stroke-width": 2, "stroke-dasharray": s.dashed ? "6 4" : "none" }), marker(n, 16, 6));
      const button = el("button", { type: "button", "aria-pressed": String(!hidden.has(n)) }, sample, s.name);
      button.addEventListener("click", () => { hidden.has(n) ? hidden.delete(n) : hidden.add(n); button.setAttribute("aria-pressed", String(!hidden.has(n))); draw(); });
      return button;
    }));
  }
  const rows = () => chart.series.flatMap((s) => s.x.map((x, n) => [s.name, x, s.y[n]]));
  figure.append(svg, legend, readout, dataTable(rows, ["curve", chart.x, chart.y]));
  redraw.push(() => { key(); draw(); });
  key();
  draw();
}
