// The expert map: layers down, experts across. Fill is heat, where in memory; frames and signs are what happens.

import { useEffect, useRef, useState } from "preact/hooks";

import { colours, mix, onTheme, still, surface } from "./paint";
import type { Ink } from "./paint";
import type { Shown, Store } from "./store";
import { MARKS, STATES, USES } from "./types";

const LEFT = 34;
const TOP = 16;
const FLASH_MS = 450;
const MARK_INK = ["hit", "ahead", "late", "miss", "wasted"];

interface Grid {
  cell: number;
  width: number;
  height: number;
  first: number[];
}

export function ExpertMap({ store }: { store: Store }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const [at, setAt] = useState<[number, number]>([0, 0]);
  const [pointed, setPointed] = useState(false);
  const experts = store.about!.experts;
  const shown = store.shown();

  useEffect(() => {
    let frame = 0;
    const draw = () => {
      const element = canvas.current;
      if (!element) return;
      const grid = layout(experts, element.parentElement!.clientWidth);
      const age = performance.now() - store.markedAt;
      paint(surface(element, grid.width, grid.height), grid, experts, shown, at, pointed, age);
      if (age < FLASH_MS && !still.matches && store.at === undefined) frame = requestAnimationFrame(draw);
    };
    draw();
    const stop = onTheme(() => requestAnimationFrame(draw));
    addEventListener("resize", draw);
    return () => {
      cancelAnimationFrame(frame);
      stop();
      removeEventListener("resize", draw);
    };
  });

  const move = (event: KeyboardEvent) => {
    const steps: Record<string, [number, number]> = {
      ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0],
      Home: [0, -Infinity], End: [0, Infinity], PageUp: [-Infinity, 0], PageDown: [Infinity, 0],
    };
    const step = steps[event.key];
    if (!step) return;
    event.preventDefault();
    const layer = clamp(at[0] + step[0], experts.length - 1);
    setAt([layer, clamp(at[1] + step[1], experts[layer] - 1)]);
    setPointed(true);
  };
  const point = (event: MouseEvent) => {
    const box = canvas.current!.getBoundingClientRect();
    const { cell } = layout(experts, canvas.current!.parentElement!.clientWidth);
    const layer = Math.floor((event.clientY - box.top - TOP) / cell);
    const expert = Math.floor((event.clientX - box.left - LEFT) / cell);
    if (layer >= 0 && layer < experts.length && expert >= 0 && expert < experts[layer]) {
      setAt([layer, expert]);
      setPointed(true);
    }
  };

  return (
    <section aria-labelledby="map-title" class="panel map">
      <h2 id="map-title">Experts</h2>
      <div class="canvas">
        <canvas
          ref={canvas}
          id="map"
          tabIndex={0}
          role="application"
          aria-label={`Expert map, ${experts.length} layers by ${Math.max(...experts)} experts; arrow keys move from expert to expert`}
          aria-describedby="cell map-summary"
          onKeyDown={move}
          onMouseMove={point}
          onFocus={() => setPointed(true)}
          onBlur={() => setPointed(false)}
        />
      </div>
      <p id="cell" role="status" class="note">{describe(experts, shown, at)}</p>
      <p id="map-summary" class="note">{summary(shown)}</p>
      <Legend />
    </section>
  );
}

function Legend() {
  return (
    <ul class="legend" aria-label="Legend of the map">
      <li><i class="key resident" />in memory, stronger with use</li>
      <li><i class="key disk" />on disk only</li>
      <li><i class="key flying" />being read ahead</li>
      <li><i class="key staged" />read ahead</li>
      <li><i class="sign hit">□</i>hit</li>
      <li><i class="sign ahead">▲</i>hit, read ahead</li>
      <li><i class="sign late">●</i>late</li>
      <li><i class="sign miss">■</i>miss</li>
      <li><i class="sign wasted">✕</i>wasted</li>
    </ul>
  );
}

function layout(experts: number[], room: number): Grid {
  const widest = Math.max(...experts);
  const cell = Math.max(4, Math.min(24, Math.floor((room - LEFT - 2) / widest)));
  let sum = 0;
  const first = experts.map((count) => (sum += count) - count);
  return { cell, width: LEFT + widest * cell + 2, height: TOP + experts.length * cell + 2, first };
}

function paint(
  c: CanvasRenderingContext2D, grid: Grid, experts: number[], shown: Shown, at: [number, number], pointed: boolean, age: number,
): void {
  const ink = colours();
  const hottest = Math.max(1, ...shown.heat);
  label(c, grid, experts, ink);
  experts.forEach((count, layer) => {
    for (let expert = 0; expert < count; expert++) {
      const cell = grid.first[layer] + expert;
      fill(c, LEFT + expert * grid.cell, TOP + layer * grid.cell, grid.cell, shown.map[cell], shown.heat[cell] / hottest, ink);
    }
  });
  const fresh = still.matches || age >= FLASH_MS ? 0 : 1 - age / FLASH_MS;
  for (const [cell, what] of shown.marks) {
    const layer = grid.first.findLastIndex((start) => start <= cell);
    mark(c, LEFT + (cell - grid.first[layer]) * grid.cell, TOP + layer * grid.cell, grid.cell, what, ink[MARK_INK[what]], fresh);
  }
  if (pointed) {
    c.strokeStyle = ink.text;
    c.lineWidth = 2;
    c.strokeRect(LEFT + at[1] * grid.cell - 1, TOP + at[0] * grid.cell - 1, grid.cell + 1, grid.cell + 1);
  }
}

function label(c: CanvasRenderingContext2D, grid: Grid, experts: number[], ink: Ink): void {
  c.font = "11px system-ui, sans-serif";
  c.fillStyle = ink.muted;
  c.textAlign = "right";
  c.textBaseline = "middle";
  const every = Math.max(1, Math.ceil(12 / grid.cell));
  for (let layer = 0; layer < experts.length; layer += every) {
    c.fillText(String(layer), LEFT - 6, TOP + (layer + 0.5) * grid.cell);
  }
  c.textAlign = "center";
  const step = Math.ceil(26 / grid.cell);
  const across = [1, 2, 4, 8, 16, 32].find((n) => n >= step) ?? 64;
  for (let expert = 0; expert < Math.max(...experts); expert += across) {
    c.fillText(String(expert), LEFT + (expert + 0.5) * grid.cell, 7);
  }
}

/** Tier and heat: a full cell is in memory, a dot lies on disk; its colour says how often it was used. */
function fill(c: CanvasRenderingContext2D, x: number, y: number, size: number, state: number, heat: number, ink: Ink): void {
  const gap = size > 8 ? 1 : 0.5;
  c.fillStyle = ink.cold;
  c.fillRect(x + gap / 2, y + gap / 2, size - gap, size - gap);
  const colour = mix(ink.warm, ink.hot, Math.sqrt(heat));
  if (state === 1) {
    c.fillStyle = colour;
    c.fillRect(x + gap / 2, y + gap / 2, size - gap, size - gap);
  } else if (heat > 0) {
    const dot = Math.max(2, size * 0.3);
    c.fillStyle = colour;
    c.fillRect(x + (size - dot) / 2, y + (size - dot) / 2, dot, dot);
  }
  if (state >= 2) {
    c.strokeStyle = state === 2 ? ink.miss : ink.ahead;
    c.lineWidth = size > 8 ? 2 : 1;
    c.setLineDash(state === 3 ? [2, 2] : []);
    c.strokeRect(x + 1, y + 1, size - 2, size - 2);
    c.setLineDash([]);
  }
}

/** What happened to an expert in this token: a frame, and a sign that does without colour. */
function mark(c: CanvasRenderingContext2D, x: number, y: number, size: number, what: number, colour: string, fresh: number): void {
  const middle = [x + size / 2, y + size / 2] as const;
  const r = Math.max(1.5, size * 0.2);
  if (fresh > 0) {
    c.globalAlpha = 0.5 * fresh;
    c.fillStyle = colour;
    c.fillRect(x - 2, y - 2, size + 4, size + 4);
    c.globalAlpha = 1;
  }
  c.strokeStyle = c.fillStyle = colour;
  c.lineWidth = size > 8 ? 2 : 1;
  if (what < USES) c.strokeRect(x + 1, y + 1, size - 2, size - 2);
  if (what > 0) {
    // The sign lies on a disc of the page's colour: readable on any heat.
    c.fillStyle = colours().panel;
    c.beginPath();
    c.arc(...middle, r * 1.7, 0, 7);
    c.fill();
    c.fillStyle = colour;
  }
  c.beginPath();
  if (what === 1) {
    c.moveTo(middle[0], middle[1] - r);
    c.lineTo(middle[0] + r, middle[1] + r);
    c.lineTo(middle[0] - r, middle[1] + r);
    c.fill();
  } else if (what === 2) {
    c.arc(...middle, r, 0, 7);
    c.fill();
  } else if (what === 3) {
    c.fillRect(middle[0] - r, middle[1] - r, 2 * r, 2 * r);
  } else if (what === 4) {
    c.moveTo(middle[0] - r, middle[1] - r);
    c.lineTo(middle[0] + r, middle[1] + r);
    c.moveTo(middle[0] + r, middle[1] - r);
    c.lineTo(middle[0] - r, middle[1] + r);
    c.stroke();
  }
}

function describe(experts: number[], shown: Shown, [layer, expert]: [number, number]): string {
  const cell = experts.slice(0, layer).reduce((sum, count) => sum + count, 0) + expert;
  const marks = shown.marks.filter(([marked]) => marked === cell).map(([, what]) => MARKS[what]);
  const times = shown.heat[cell] === 1 ? "once" : `${shown.heat[cell]} times`;
  return `Layer ${layer}, expert ${expert}: ${STATES[shown.map[cell]]}; used ${times}${marks.length ? `; this token: ${marks.join(", ")}` : ""}`;
}

function summary(shown: Shown): string {
  const counts = [0, 0, 0, 0, 0];
  for (const state of shown.map) counts[state]++;
  return `${counts[1]} of ${shown.map.length} experts in memory, ${counts[3] + counts[4]} read ahead or on their way`;
}

function clamp(value: number, last: number): number {
  return Math.max(0, Math.min(last, value));
}
