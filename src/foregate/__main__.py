"""``python -m foregate``."""

from foregate.cli.main import main

main()
