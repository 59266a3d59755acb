"""Ranks: who they are, what they exchange, who hangs, who asked to stop."""
