"""The systems that `experiments.benchmarks.peers` compares, each a program of its own that is told its work by lines.

`lines` is what is said, `cases` the networks and their data, `environment` the virtual environment of the peers; the
others are the programs, and the networks they train. The programs import nothing of `wavg_jax` but for `ours_worker`.
"""
