"""Rows, checkpoints, and the journal that keeps them in step."""
