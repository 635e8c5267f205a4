"""Speed, measured: physical limits, then arms that differ in one thing, interleaved, cold, under a memory limit."""
