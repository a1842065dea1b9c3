"""From flags to objects, for all binaries."""
