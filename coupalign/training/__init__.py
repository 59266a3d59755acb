"""Training: the loop (`loop.py`), the optimizer (`optim.py`), the learning rate (`schedule.py`)."""
