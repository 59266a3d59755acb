"""The configuration of a run: its schema (`schema.py`), and reading and comparing it (`load.py`).

Imports no torch.
"""
