"""Imports for the server process that ranks without a GPU are forked from.

The imports take longer than most tests, so they happen once, here. A rank then starts in a tenth
of a second.
"""

import gc
import os

os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}

import torch._dynamo  # noqa: E402, F401  or the first optimizer of each rank would

import coupalign.engine.ddp  # noqa: E402, F401
import coupalign.engine.zero  # noqa: E402, F401
import coupalign.training.loop  # noqa: E402, F401
from coupalign.compat import package_hidden  # noqa: E402

with package_hidden("mlflow"):
    import deepspeed
    import deepspeed.ops

# DeepSpeed does this when a rank builds its first engine: a second of imports (the compiler of
# torch among them) and of looking for a C compiler.
import deepspeed.module_inject.auto_ep_layer  # noqa: E402
import deepspeed.runtime.superoffload.superoffload_stage3  # noqa: E402
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402
import deepspeed.utils.nvtx  # noqa: E402

_ = deepspeed.ops.__compatible_ops__

# Marks for NVIDIA's profiler, around half a million calls per test of ZeRO 3.
deepspeed.utils.nvtx.enable_nvtx = False

# The garbage collector of a rank need not look at what was imported here. Otherwise it visits all
# of torch and DeepSpeed at each full collection, and the fork copies the pages that it touches.
gc.collect()
gc.freeze()
