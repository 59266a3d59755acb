"""Training: what a run consists of (`run.py`), its loop (`loop.py`), clocks and learning rate."""
