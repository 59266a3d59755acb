"""Measurements: `coupalign bench WHAT`. A figure is a ratio within one run, beside the machine that it was taken on."""
