"""How `scripts/build_engines.py` works: what a build will take, the processes that do it, and the tables."""
