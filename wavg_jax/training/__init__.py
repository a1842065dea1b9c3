"""The whole run: rounds one after another, with data, rows, checkpoints and progress."""
