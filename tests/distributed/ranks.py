"""Run an ordinary function on several ranks: `run_ranks(fn, 2, argument)`."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from coupalign.distributed.world import rank_session

TIMEOUT_S = 240


def run_ranks(fn: Callable[..., Any], ranks: int, *arguments: Any, gpu: bool = False) -> list[Any]:
    """Call `fn(world, *arguments)` in `ranks` new processes, joined over gloo (on a GPU: nccl).

    The ranks meet in a file, so no port is used.

    Returns:
        what each rank returned.

    Raises:
        AssertionError: a rank failed (with its traceback) or did not end in time.
    """
    # CUDA does not survive a fork.
    context = multiprocessing.get_context("spawn" if gpu else "forkserver")
    context.set_forkserver_preload(["tests.distributed.preload"])

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            context.Process(target=_run_rank, args=(fn, rank, ranks, folder, arguments, gpu))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()

        try:
            for process in processes:
                process.join(TIMEOUT_S)
            late = [rank for rank, process in enumerate(processes) if process.is_alive()]
            assert not late, f"ranks {late} did not end within {TIMEOUT_S} s"
            failures = [file.read_text() for file in sorted(folder.glob("*.error"))]
            assert not failures, "\n".join(failures)
            return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(ranks)]
        finally:
            for process in processes:
                process.kill()


def _run_rank(
    fn: Callable[..., Any],
    rank: int,
    ranks: int,
    folder: Path,
    arguments: tuple[Any, ...],
    gpu: bool,
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(ranks),
        "OMP_NUM_THREADS": "1",
    }
    if not gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # The variable comes too late for a torch that is imported already.
    torch.set_num_threads(1)

    try:
        with rank_session(f"file://{folder}/rendezvous", hang_minutes=3) as world:
            result = fn(world, *arguments)
        (folder / f"{rank}.result").write_bytes(pickle.dumps(result))
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
