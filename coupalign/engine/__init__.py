"""One optimizer step under DDP (`ddp.py`) or DeepSpeed (`zero.py`), and its checkpoints."""
