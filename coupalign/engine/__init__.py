"""One optimizer step, whoever owns the ranks: the interface (`base.py`), DDP (`ddp.py`), DeepSpeed (`zero.py`)."""
