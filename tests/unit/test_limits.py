"""What ran out is named, with what to raise."""

from __future__ import annotations

import errno
import os
import resource

import numpy as np
import pytest
import torch

from coupalign.limits import explain_shortage


def raised(action) -> BaseException:
    try:
        action()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def open_too_many_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    handles = []
    try:
        while True:
            handles.append(os.open("/dev/null", os.O_RDONLY))
    finally:
        for handle in handles:
            os.close(handle)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (lambda: torch.empty(10**15), ["out of memory", "train.max_micro_batch", "can't allocate"]),
        (lambda: np.empty(10**15), ["out of memory", "data.workers", "Unable to allocate"]),
        (open_too_many_files, ["too many open files", "ulimit -n"]),
    ],
)
def test_real_shortages_are_explained(action, words: list[str]) -> None:
    text = explain_shortage(raised(action))

    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError(
                "unable to allocate shared memory(shm) for file </torch_22_1_0>: "
                "No space left on device (28)"
            ),
            ["/dev/shm has", "--shm-size", "data.workers=0"],
        ),
        (
            RuntimeError(
                "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
                "dataloader's workers are out of shared memory."
            ),
            ["--shm-size"],
        ),
        (
            RuntimeError(
                "unable to open shared memory object </torch_1>: Too many open files (24)"
            ),
            ["too many open files", "ulimit -n"],
        ),
        (RuntimeError("received 0 items of ancdata"), ["ulimit -n"]),
        (MemoryError(), ["out of memory", "(MemoryError)"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), ["GPU", "micro_batch"]),
        (RuntimeError("can't start new thread"), ["too many processes or threads"]),
        (
            BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
            ["too many processes or threads"],
        ),
    ],
)
def test_known_shortages_are_explained(error: Exception, words: list[str]) -> None:
    text = explain_shortage(error)

    assert all(word in text for word in words), text
    assert "\n" not in text


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("size mismatch"),
        ValueError("out of memory"),
        OSError(errno.EACCES, "Permission denied"),
        KeyError("bus error"),
        RuntimeError(""),
    ],
)
def test_other_errors_are_no_shortages(error: Exception) -> None:
    assert explain_shortage(error) is None
