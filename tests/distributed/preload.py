"""Imported once, by the process from which all ranks without a GPU are forked: the imports take longer than most tests."""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}

import torch._dynamo  # noqa: E402, F401  or the first optimizer of each rank would

import coupalign.engine.ddp  # noqa: E402, F401
import coupalign.training.loop  # noqa: E402, F401
from coupalign.compat import package_hidden  # noqa: E402

with package_hidden("mlflow"):
    import deepspeed  # noqa: F401
