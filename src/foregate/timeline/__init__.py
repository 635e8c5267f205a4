"""One run on a time axis: events → Chrome/Perfetto trace JSON → a figure. No torch, no engine."""
