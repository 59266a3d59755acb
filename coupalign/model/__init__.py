"""CoupAlign and its parts. docs/method.md tells the paper from our reconstruction."""
