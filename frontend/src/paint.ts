// Colours of the page, for canvases: read from CSS, so that both themes have one source.

export type Ink = Record<string, string>;

const NAMES = [
  "text", "muted", "panel", "cold", "warm", "hot", "line",
  "hit", "ahead", "late", "miss", "wasted",
  "part0", "part1", "part2", "part3", "part4",
];

let ink: Ink | undefined;
const dark = matchMedia("(prefers-color-scheme: dark)");
dark.addEventListener("change", () => (ink = undefined));

export function colours(): Ink {
  if (!ink) {
    const style = getComputedStyle(document.documentElement);
    ink = Object.fromEntries(NAMES.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
  }
  return ink;
}

export function onTheme(listener: () => void): () => void {
  dark.addEventListener("change", listener);
  return () => dark.removeEventListener("change", listener);
}

export const still = matchMedia("(prefers-reduced-motion: reduce)");

/** A canvas sized in CSS pixels, sharp on any screen. */
export function surface(canvas: HTMLCanvasElement, width: number, height: number): CanvasRenderingContext2D {
  const scale = devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d")!;
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

/** Between two #rrggbb colours. */
export function mix(a: string, b: string, share: number): string {
  const channel = (at: number) => {
    const [x, y] = [parseInt(a.slice(at, at + 2), 16), parseInt(b.slice(at, at + 2), 16)];
    return Math.round(x + (y - x) * share);
  };
  return `rgb(${channel(1)} ${channel(3)} ${channel(5)})`;
}
