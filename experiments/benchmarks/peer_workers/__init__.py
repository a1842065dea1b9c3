"""The systems that `experiments.benchmarks.peers` compares, each a program that takes its jobs line by line.

`lines` is the protocol, `cases` the networks and their data, `environment` the peers' virtual environment; the rest are
the programs and the networks they train. Only `ours_worker` imports `wavg_jax`.
"""
