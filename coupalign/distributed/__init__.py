"""Ranks: who they are, what they exchange, which one hangs, and requests to stop."""
