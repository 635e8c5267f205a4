// What the server sends: see src/foregate/server/dashboard/board.py.

export type Mark = [cell: number, what: number];

export interface Totals {
  completion_tokens: number;
  ttft_s: number;
  tpot_s: number;
  expert_cache: { hits: number; misses: number; evictions: number };
  read_bytes: { demand: number; prefetch: number };
  prefetch: { issued: number; used: number; late: number; wasted: number; cancelled: number };
  stall_s: number;
  stall: { demand_s: number; late_prefetch_s: number };
}

export interface Controller {
  speculating?: boolean;
  reason?: string;
}

export interface Frame {
  index: number;
  text: string;
  token_id: number;
  phase: "prefill" | "decode";
  wall_s: number;
  layers: number[][];
  marks: Mark[];
  map: string;
  predictions: number;
  totals: Totals;
  controller: Controller;
}

export interface About {
  model: string;
  experts: number[];
  parts: string[];
  top_k: number;
  slots: number;
  slot_bytes: number;
  budget_bytes: number;
  predictor: string;
  prefetch: string;
  lookahead: number;
  cache_policy: string;
  store: string;
}

export interface Status {
  state: "idle" | "running" | "paused" | "failed";
  error: string;
}

export interface Snapshot {
  type: "snapshot";
  about: About;
  status: Status;
  prompt: string;
  text: string[];
  frames: Frame[];
  heat: number[];
  map: string;
  marks: Mark[];
  totals: Totals;
  controller: Controller;
}

export type Message =
  | Snapshot
  | { type: "delta"; layer: number; moves: [number, number][]; from: number; marks: Mark[] }
  | { type: "token"; frame: Frame }
  | ({ type: "status"; totals: Totals; map: string } & Status);

// States of a cell and marks of a token, as the server numbers them.
export const STATES = ["on disk only", "in memory", "being read on demand", "being read ahead", "read ahead, not used yet"];
export const MARKS = ["hit", "hit, read ahead", "late", "miss", "wasted"];
export const USES = 4;
