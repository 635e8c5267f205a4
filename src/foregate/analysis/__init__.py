"""Trace → numbers, tables, figures and one report. Reads traces part by part; no torch.

One noun a file. A collector (``section.py``) sees every prompt once and ends as a ``Section``: numbers, tables,
charts and notes on what could not be computed. ``study.py`` runs the collectors; ``output.py`` writes what they found.
"""
