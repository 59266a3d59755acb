"""CoupAlign and its parts; see docs/method.md for what is the paper's and what is our reconstruction."""
