"""Replay of a block trace through the replacement policies: `python -m wicore_backend.hmt.replay TRACE`."""
