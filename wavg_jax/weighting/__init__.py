"""Weightings: how much each replica counts in the blend."""
