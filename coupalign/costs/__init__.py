"""Everything that is counted, not timed: FLOPs, bytes, memory, messages."""
