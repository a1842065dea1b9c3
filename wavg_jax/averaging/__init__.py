"""The averager: one reduction over the replica axis, an optional outer optimizer, and what replicas restart from."""
