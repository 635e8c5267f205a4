// Prompt and brakes, and the way back through the last tokens.

import { useState } from "preact/hooks";

import type { Store } from "./store";

async function send(path: string, body: object = {}): Promise<string> {
  try {
    const answer = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
    if (answer.ok) return "";
    const { detail } = (await answer.json()) as { detail: string | { msg: string; loc: string[] }[] };
    return typeof detail === "string" ? detail : detail.map(({ msg, loc }) => `${loc.at(-1)}: ${msg}`).join("; ");
  } catch {
    return "the server does not answer";
  }
}

export function Controls({ store }: { store: Store }) {
  const [prompt, setPrompt] = useState("Question: Natalia sold 48 clips in April and half as many in May. How many clips did she sell in all?");
  const [tokens, setTokens] = useState(128);
  const [problem, setProblem] = useState("");
  const { state, error } = store.status;
  const going = state === "running" || state === "paused";
  const tell = (path: string, body?: object) => void send(path, body).then(setProblem);
  const start = (event: Event) => {
    event.preventDefault();
    tell("start", { prompt, max_new_tokens: tokens });
  };
  return (
    <section aria-labelledby="prompt-title" class="panel controls">
      <h2 id="prompt-title">Prompt</h2>
      <form onSubmit={start}>
        <label for="prompt" class="hidden">Prompt</label>
        <textarea id="prompt" rows={3} value={prompt} onInput={(event) => setPrompt(event.currentTarget.value)} />
        <div class="row">
          <label for="max-tokens">Tokens at most</label>
          <input
            id="max-tokens" type="number" min={1} max={100000} value={tokens}
            onInput={(event) => setTokens(event.currentTarget.valueAsNumber)}
          />
          <button id="start" type="submit" disabled={going}>Start</button>
          {/* One button that keeps its place, so that the focus stays where it is. */}
          <button id="pause" type="button" disabled={!going} onClick={() => tell(state === "paused" ? "resume" : "pause")}>
            {state === "paused" ? "Resume" : "Pause"}
          </button>
          <button id="step" type="button" disabled={!going} onClick={() => tell("step")}>Step</button>
          <button id="stop" type="button" disabled={!going} onClick={() => tell("stop")}>Stop</button>
        </div>
      </form>
      {(problem || error) && <p id="problem" role="alert">{problem || error}</p>}
    </section>
  );
}

export function Text({ store }: { store: Store }) {
  const newest = store.frames.length - 1;
  const at = store.at ?? newest;
  const older = store.text.length - store.frames.length;
  const current = store.frames[at];
  return (
    <section aria-labelledby="text-title" class="panel text">
      <h2 id="text-title">Text</h2>
      <p id="text" tabIndex={0} aria-label="Generated text">
        <span class="prompt">{store.prompt}</span>
        {older > 0 && <span>{store.text.slice(0, older).join("")}</span>}
        {store.frames.map((frame, n) => (
          <span
            key={frame.index}
            class={n === at ? "token now" : store.at !== undefined && n > at ? "token later" : "token"}
            onClick={() => store.scrub(n)}
          >{frame.text}</span>
        ))}
      </p>
      <div class="row">
        <label for="scrub">Back through the last tokens</label>
        <input
          id="scrub" type="range" min={0} max={Math.max(0, newest)} value={Math.max(0, at)} disabled={newest < 1}
          aria-valuetext={current ? `token ${current.index}: ${current.text}` : "no token"}
          onInput={(event) => store.scrub(event.currentTarget.valueAsNumber)}
        />
        <output id="at" for="scrub">{current ? `token ${current.index}` : "no token"}</output>
        <button id="live" type="button" disabled={store.at === undefined} onClick={() => store.scrub(undefined)}>Live</button>
      </div>
    </section>
  );
}
