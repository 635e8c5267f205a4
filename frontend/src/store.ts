// The page's state: what the server said, and where the reader stands in it. Views are told at most once a frame.

import type { About, Controller, Frame, Mark, Message, Snapshot, Status, Totals } from "./types";
import { USES } from "./types";

const KEPT = 256;

/** What the map and the panels show: now, or a token of the past. */
export interface Shown {
  map: Uint8Array;
  marks: Mark[];
  heat: Uint32Array;
  frame: Frame | undefined;
  totals: Totals;
  controller: Controller;
}

export class Store {
  about: About | undefined;
  status: Status = { state: "idle", error: "" };
  connected = false;
  prompt = "";
  text: string[] = [];
  frames: Frame[] = [];
  /** Position in `frames` while scrubbing; undefined is live. */
  at: number | undefined;
  totals!: Totals;
  controller: Controller = {};
  map: Uint8Array = new Uint8Array();
  heat: Uint32Array = new Uint32Array();
  marks: Mark[] = [];
  /** When the newest marks came, for their flash. */
  markedAt = 0;
  layer = -1;

  private listeners = new Set<() => void>();
  private scheduled = false;

  connect(): void {
    const source = new EventSource("events");
    source.onopen = () => this.set(() => (this.connected = true));
    source.onerror = () => this.set(() => (this.connected = false));
    source.onmessage = (event) => this.set(() => this.fold(JSON.parse(event.data) as Message));
  }

  subscribe(listener: () => void): () => void {
    this.listeners.add(listener);
    return () => this.listeners.delete(listener);
  }

  scrub(at: number | undefined): void {
    this.set(() => (this.at = at === undefined || at >= this.frames.length - 1 ? undefined : Math.max(0, at)));
  }

  /** What is shown at the reader's place. */
  shown(): Shown {
    const frame = this.at === undefined ? this.frames.at(-1) : this.frames[this.at];
    if (this.at === undefined || !frame) {
      return { map: this.map, marks: this.marks, heat: this.heat, frame, totals: this.totals, controller: this.controller };
    }
    const heat = this.heat.slice();
    const later = [...this.frames.slice(this.at + 1).map((f) => f.marks), ...(this.live() ? [this.marks] : [])];
    for (const marks of later) for (const [cell, what] of marks) if (what < USES) heat[cell]--;
    return { map: digits(frame.map), marks: frame.marks, heat, frame, totals: frame.totals, controller: frame.controller };
  }

  /** Whether `marks` belong to a token that is still being computed. */
  private live(): boolean {
    return this.marks !== this.frames.at(-1)?.marks;
  }

  private fold(message: Message): void {
    switch (message.type) {
      case "snapshot":
        return this.restart(message);
      case "delta": {
        if (!this.live()) this.marks = [];
        for (const [cell, state] of message.moves) this.map[cell] = state;
        // Who has come within this token has a part of them from the snapshot.
        const fresh = message.marks.slice(this.marks.length - message.from);
        this.marks.push(...fresh);
        this.warm(fresh);
        this.layer = message.layer;
        return;
      }
      case "token": {
        const { frame } = message;
        // Deltas have brought a part of the token's marks already.
        this.warm(frame.marks.slice(this.live() ? this.marks.length : 0));
        this.frames.push(frame);
        if (this.frames.length > KEPT) {
          this.frames.shift();
          if (this.at !== undefined) this.at = Math.max(0, this.at - 1);
        }
        this.text.push(frame.text);
        this.map = digits(frame.map);
        this.marks = frame.marks;
        this.totals = frame.totals;
        this.controller = frame.controller;
        this.layer = -1;
        return;
      }
      case "status":
        this.status = { state: message.state, error: message.error };
        this.totals = message.totals;
        this.map = digits(message.map);
        return;
    }
  }

  private restart(message: Snapshot): void {
    const { about, status, prompt, text, frames, totals, controller, marks } = message;
    Object.assign(this, { about, status, prompt, text, frames, totals, controller });
    this.map = digits(message.map);
    this.heat = Uint32Array.from(message.heat);
    this.marks = marks.length || !frames.length ? marks : frames.at(-1)!.marks;
    this.at = undefined;
  }

  private warm(marks: Mark[]): void {
    for (const [cell, what] of marks) if (what < USES) this.heat[cell]++;
    this.markedAt = performance.now();
  }

  private set(change: () => void): void {
    change();
    if (this.scheduled) return;
    this.scheduled = true;
    // A hidden page gets no animation frames; it is drawn when it is seen again.
    requestAnimationFrame(() => {
      this.scheduled = false;
      for (const listener of this.listeners) listener();
    });
  }
}

function digits(map: string): Uint8Array {
  return Uint8Array.from(map, (digit) => digit.charCodeAt(0) - 48);
}
