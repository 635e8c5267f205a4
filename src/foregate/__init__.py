"""Foregate: run Mixture-of-Experts models that do not fit in memory, bringing experts in before the router asks."""

__version__ = "0.1.0"
