"""One round as a pure function: local steps, scores, blend, and what carries over."""
