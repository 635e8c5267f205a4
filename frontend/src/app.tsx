// The page: connects to the engine's events, and lays out the panels.

import { render } from "preact";
import { useEffect, useReducer } from "preact/hooks";

import { Breakdown } from "./breakdown";
import { Controls, Text } from "./controls";
import { Counters, bytes } from "./counters";
import { ExpertMap } from "./map";
import { Store } from "./store";

const store = new Store();

function App() {
  const [, redraw] = useReducer((n: number) => n + 1, 0);
  useEffect(() => store.subscribe(() => redraw(undefined)), []);
  const about = store.about;
  return (
    <>
      <header>
        <h1>Foregate</h1>
        {about && (
          <p>
            <strong>{about.model}</strong>: {about.experts.length} layers, {about.experts.reduce((a, b) => a + b, 0)} experts,
            top {about.top_k}; budget {bytes(about.budget_bytes)} = {about.slots} slots; {about.cache_policy} cache; predictor{" "}
            {about.predictor}, prefetch {about.prefetch}, lookahead {about.lookahead}
          </p>
        )}
        <p id="status" role="status" data-state={store.status.state}>{!store.connected ? "not connected" : about ? status() : "connecting"}</p>
      </header>
      {about && (
        <main>
          <div class="left">
            <Controls store={store} />
            <Text store={store} />
            <ExpertMap store={store} />
          </div>
          <div class="right">
            <Counters store={store} />
            <Breakdown store={store} />
          </div>
        </main>
      )}
    </>
  );
}

/** Read out when it changes: so no token numbers while running. */
function status(): string {
  const { state } = store.status;
  const made = store.text.length;
  if (state === "running") return "generating";
  if (state === "paused") return `paused after ${made} tokens`;
  if (state === "failed") return "failed";
  return made ? `finished: ${made} tokens` : "ready";
}

/** Space pauses and "." steps, wherever no field or button has the focus. */
addEventListener("keydown", (event) => {
  const target = event.target as HTMLElement;
  if (event.ctrlKey || event.metaKey || event.altKey || target.closest("input, textarea, button, #map")) return;
  const id = { " ": "pause", ".": "step" }[event.key];
  if (id) {
    event.preventDefault();
    document.getElementById(id)?.click();
  }
});

render(<App />, document.getElementById("app")!);
store.connect();
