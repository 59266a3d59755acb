"""torch.compile by region: the parts of a model are compiled one by one, equal shapes only once.

Compiling a whole Swin-B as one graph takes many times as long and gives the same kernels, because
everything that can be fused is inside the blocks. Compiled code is stored in the user's cache
folder, where restarted runs and the other ranks find it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from coupalign.files import user_cache
from coupalign.model.base import ReferringModel

_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

# Variants of one piece of code: a Swin block has one for each stage, shifted or not.
_MAX_VARIANTS = 128


def compile_regions(model: ReferringModel, backend: str = "inductor") -> int:
    """Compile the regions of a model in place. Returns how many there are.

    Each region is compiled at its first call, and a graph break is an error. Only passes with
    gradients run compiled, because in scoring the last batch has another size. Names and weights
    do not change.
    """
    import torch._dynamo.config
    import torch._inductor.config
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # Replace inductor's default, which is below /tmp. A folder that the user chose stays.
    # Inductor may have written its default into the environment already.
    if os.environ.get(_CACHE_VARIABLE, default_cache_dir()) == default_cache_dir():
        os.environ[_CACHE_VARIABLE] = str(user_cache("compiled"))

    torch._dynamo.config.recompile_limit = max(_MAX_VARIANTS, torch._dynamo.config.recompile_limit)

    # Dropout draws the same numbers as uncompiled: a function of seed, step and rank.
    torch._inductor.config.fallback_random = True

    regions = model.regions()
    for region in regions:
        compiled = torch.compile(region.forward, fullgraph=True, dynamic=False, backend=backend)
        region.forward = _compiled_in_training(region.forward, compiled)
    return len(regions)


def compile_seconds() -> float:
    """Return the seconds this process has spent on compiling, including reads from the cache."""
    import torch._dynamo.utils

    return torch._dynamo.utils.calculate_time_spent()["total_wall_time"]


def describe_compilation() -> str:
    """Describe in one line how long compiling took, and how much came from the cache."""
    import torch._dynamo.utils

    counters = torch._dynamo.utils.counters
    compiled = counters["inductor"]["fxgraph_cache_miss"]
    cached = counters["inductor"]["fxgraph_cache_hit"]
    cached += counters["aot_autograd"]["autograd_cache_hit"]
    return (
        f"compiled in {compile_seconds():.1f} s: {compiled} new graphs, "
        f"{cached} from the cache in {os.environ[_CACHE_VARIABLE]}"
    )


def _compiled_in_training(
    plain: Callable[..., Any], compiled: Callable[..., Any]
) -> Callable[..., Any]:
    """Run `compiled` where gradients are recorded, and `plain` elsewhere."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return compiled(*args, **kwargs)
        return plain(*args, **kwargs)

    return forward
