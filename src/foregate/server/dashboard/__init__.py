"""The live dashboard: ``board`` folds an engine's events, ``channel`` hands them to browsers, ``routes`` mounts it.

Needs ``foregate[dashboard]`` (FastAPI, uvicorn). Its page is built from ``frontend/`` by ``make frontend``.
"""
