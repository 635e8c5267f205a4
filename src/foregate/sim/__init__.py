"""The engine's cache, policies, pipeline and prefetcher on a virtual clock: any bandwidth, no model, no torch."""
