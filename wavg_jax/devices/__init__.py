"""Where the replicas live, how a device runs its replicas, and what machine this is.

`vmap`: the replicas of one device run in one batched program (`mapping.py`).
`pmap`: its successor, `jax.shard_map` over a mesh, spreads the replicas over several devices (`placement.py`).
"""
