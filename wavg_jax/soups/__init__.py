"""Averages of checkpoints that others trained: the library's weightings and reductions, over files."""
