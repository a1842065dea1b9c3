"""Where the replicas live, how those of one device are mapped, and what machine this is."""
