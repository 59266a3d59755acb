"""torch.compile by region: the parts that a model is made of are compiled one by one, blocks of the same shape only once.

A whole Swin-B in one graph takes many times as long to compile, for the same kernels: what can be fused lies inside the blocks. What
was compiled is kept in the user's cache folder, so that a run that starts again, and every rank beside the first, reads it from there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from coupalign.files import user_cache
from coupalign.model.base import ReferringModel

_PLACE = "TORCHINDUCTOR_CACHE_DIR"
_MOST_VARIANTS = 128  # of one piece of code: a Swin block has one for each stage, shifted or not


def compile_regions(model: ReferringModel, backend: str = "inductor") -> int:
    """Compile the regions of a model in place, each when it is first run; a graph break is an error. Returns how many there are.

    Only passes with gradients run compiled: in scoring the last batch has another size. Names and weights stay as they are.
    """
    import torch._dynamo.config
    import torch._inductor.config
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # Inductor's own place is below /tmp; it notes that in the environment, too.
    if os.environ.get(_PLACE, default_cache_dir()) == default_cache_dir():
        os.environ[_PLACE] = str(user_cache("compiled"))
    torch._dynamo.config.recompile_limit = max(_MOST_VARIANTS, torch._dynamo.config.recompile_limit)
    torch._inductor.config.fallback_random = (
        True  # dropout draws what it draws uncompiled: a function of seed, step and rank
    )
    regions = model.regions()
    for region in regions:
        compiled = torch.compile(region.forward, fullgraph=True, dynamic=False, backend=backend)
        region.forward = _where_differentiated(region.forward, compiled)
    return len(regions)


def compile_seconds() -> float:
    """What compiling has taken in this process, reading from the cache included."""
    import torch._dynamo.utils

    return torch._dynamo.utils.calculate_time_spent()["total_wall_time"]


def explain_compilation() -> str:
    """What compiling took, and how much of it was there already, for people."""
    import torch._dynamo.utils

    hits, misses = (
        torch._dynamo.utils.counters["inductor"][f"fxgraph_cache_{what}"]
        for what in ("hit", "miss")
    )
    kept = torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"]
    return f"compiled in {compile_seconds():.1f} s: {misses} graphs anew, {hits + kept} taken from {os.environ[_PLACE]}"


def _where_differentiated(
    plain: Callable[..., Any], compiled: Callable[..., Any]
) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else plain)(*args, **kwargs)

    return forward
