"""The tracks of a timeline file and the names of what lies on them: what the recorder writes and the figure reads."""

from __future__ import annotations

TOKENS = 1
COMPUTE = 2
WAITS = 3
PREDICTIONS = 4
READERS = 10
"""Track of reader thread 0; reader n is at ``READERS + n``."""

TRACKS = {TOKENS: "tokens", COMPUTE: "compute", WAITS: "waits", PREDICTIONS: "predictions"}

DEMAND_READ = "demand read"
SPECULATIVE_READ = "speculative read"
DEMAND_WAIT = "wait: demand"
LATE_WAIT = "wait: late prefetch"
PREDICT = "predict"
FLOW = "prediction to use"
MEMORY = "expert bytes"
"""Counter with the series resident, loading and staged."""
