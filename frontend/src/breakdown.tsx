// Where a token's time went: a table over its parts, and one bar a layer.

import { useEffect, useRef } from "preact/hooks";

import { colours, onTheme, surface } from "./paint";
import type { Store } from "./store";

const NAMES: Record<string, string> = { expert: "experts", wait: "waits", predict: "prediction" };
const LEFT = 34;

export function Breakdown({ store }: { store: Store }) {
  const canvas = useRef<HTMLCanvasElement>(null);
  const { frame } = store.shown();
  const layers = frame?.layers ?? [];
  const parts = store.about!.parts;
  const sums = parts.map((_, part) => layers.reduce((sum, layer) => sum + layer[part], 0) / 1e3);
  const wall = (frame?.wall_s ?? 0) * 1e3;
  const rest = Math.max(0, wall - sums.reduce((a, b) => a + b, 0));

  useEffect(() => {
    const draw = () => {
      const element = canvas.current;
      if (!element || !layers.length) return;
      const width = element.parentElement!.clientWidth;
      const row = Math.max(5, Math.min(14, Math.floor(260 / layers.length)));
      const c = surface(element, width, layers.length * row + 2);
      const ink = colours();
      const longest = Math.max(1, ...layers.map((layer) => layer.reduce((a, b) => a + b, 0)));
      c.font = "11px system-ui, sans-serif";
      c.textAlign = "right";
      c.textBaseline = "middle";
      layers.forEach((layer, number) => {
        if (number % Math.ceil(12 / row) === 0) {
          c.fillStyle = ink.muted;
          c.fillText(String(number), LEFT - 6, (number + 0.5) * row);
        }
        let x = LEFT;
        layer.forEach((microseconds, part) => {
          const length = (microseconds / longest) * (width - LEFT - 4);
          c.fillStyle = ink[`part${part}`];
          c.fillRect(x, number * row, length, row - 1);
          x += length;
        });
      });
    };
    draw();
    addEventListener("resize", draw);
    const stop = onTheme(() => requestAnimationFrame(draw));
    return () => {
      removeEventListener("resize", draw);
      stop();
    };
  });

  const worst = layers.reduce((best, layer, n) => (layer[3] > (layers[best]?.[3] ?? 0) ? n : best), 0);
  return (
    <section aria-labelledby="time-title" class="panel">
      <h2 id="time-title">Time of this token</h2>
      <table aria-labelledby="time-title">
        <thead><tr><th scope="col">part</th><th scope="col">ms</th><th scope="col">share</th></tr></thead>
        <tbody>
          {parts.map((part, n) => (
            <Row key={part} name={NAMES[part] ?? part} swatch={`part${n}`} value={sums[n]} of={wall} />
          ))}
          <Row name="everything else" swatch="rest" value={rest} of={wall} />
          <Row name="token" swatch="" value={wall} of={wall} />
        </tbody>
      </table>
      <div class="canvas">
        <canvas
          ref={canvas}
          id="layers"
          role="img"
          aria-label={layers.length ? `Time by layer; layer ${worst} waited longest, ${(layers[worst][3] / 1e3).toFixed(2)} ms` : "Time by layer"}
        />
      </div>
    </section>
  );
}

function Row({ name, swatch, value, of }: { name: string; swatch: string; value: number; of: number }) {
  return (
    <tr>
      <th scope="row">{swatch && <i class={`swatch ${swatch}`} />}{name}</th>
      <td>{value.toFixed(2)}</td>
      <td>{of ? `${Math.round((100 * value) / of)} %` : "–"}</td>
    </tr>
  );
}
