// The run in figures, under the names of its JSON.

import type { Store } from "./store";

export function Counters({ store }: { store: Store }) {
  const { totals, controller, map } = store.shown();
  const about = store.about!;
  const { hits, misses, evictions } = totals.expert_cache;
  const needed = hits + misses;
  const held = map.reduce((sum, state) => sum + (state ? 1 : 0), 0) * about.slot_bytes;
  const rows: [string, string, string][] = [
    ["speed", "speed", totals.tpot_s ? `${(1 / totals.tpot_s).toFixed(1)} tokens/s (first after ${totals.ttft_s.toFixed(2)} s)` : "–"],
    ["tokens", "tokens", String(totals.completion_tokens)],
    ["hit rate", "hit-rate", needed ? `${((100 * hits) / needed).toFixed(1)} %` : "–"],
    ["hits", "hits", String(hits)],
    ["misses", "misses", String(misses)],
    ["evictions", "evictions", String(evictions)],
    ["read on demand", "demand-bytes", bytes(totals.read_bytes.demand)],
    ["read ahead", "prefetch-bytes", bytes(totals.read_bytes.prefetch)],
    ["stall", "stall", `${totals.stall_s.toFixed(3)} s (late ${totals.stall.late_prefetch_s.toFixed(3)} s)`],
  ];
  return (
    <section aria-labelledby="counters-title" class="panel">
      <h2 id="counters-title">{store.at === undefined ? "Run" : "Run up to this token"}</h2>
      <dl>
        {rows.map(([name, id, value]) => (
          <div key={id}><dt>{name}</dt><dd id={id}>{value}</dd></div>
        ))}
        {Object.entries(totals.prefetch).map(([name, count]) => (
          <div key={name}><dt>prefetch {name}</dt><dd id={`prefetch-${name}`}>{count}</dd></div>
        ))}
      </dl>
      <label for="budget">Budget: <span id="held">{bytes(held)}</span> of {bytes(about.budget_bytes)} held</label>
      <meter id="budget" min={0} max={about.budget_bytes} value={held} />
      <p id="controller" class="note">
        Speculation {controller.reason === undefined ? "not decided yet" : `${controller.speculating ? "on" : "off"}: ${controller.reason}`}
      </p>
    </section>
  );
}

export function bytes(count: number): string {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (count < 1000) return unit === "B" ? `${count} B` : `${Number(count.toPrecision(3))} ${unit}`;
    count /= 1000;
  }
  return `${Number(count.toPrecision(3))} TB`;
}
