"""The reference model: a small MoE that ships with Foregate, and the recipe that trained it.

corpus -> data (tokens) -> train (model, optimizer, schedule) -> export -> evaluate -> card; `recipe` runs them all.
"""
