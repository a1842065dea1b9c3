"""Where the replicas live, how a device runs its replicas, what machine this is, and what an exchange costs.

`vmap`: the replicas of one device run in one batched program (`mapping.py`).
`pmap`: its successor, `jax.shard_map` over a mesh, spreads the replicas over several devices (`placement.py`).
What workers send one another, and how long that takes over a link, is computed in `network.py`.
"""
