"""From flags to objects: what the binaries have in common."""
