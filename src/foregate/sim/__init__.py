"""The engine's cache, policies, pipeline and prefetcher on a virtual clock: any bandwidth, any device, no model, no torch."""
