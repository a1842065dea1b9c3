"""Benchmarks: `python -m experiments.benchmarks.<name>`, each a table of ratios from alternating runs, and its rows."""
