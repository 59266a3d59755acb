"""Benchmarks: everything that is timed. `coupalign bench KIND` runs one.

Each result names its machine. Times of different machines cannot be compared, ratios within one run
can.
"""
