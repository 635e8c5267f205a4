"""Prompts to trace and to measure with: where they come from, and how they are worded. No torch."""
