"""What goes wrong in a rank is said in words."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as td

from coupalign.distributed.world import is_lost_rank, rank_session
from coupalign.errors import InputError, RunError

LOST = [
    # gloo
    RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer "
        "[127.0.0.1]:29500"
    ),
    RuntimeError("Read error [127.0.0.1]:29500: Connection reset by peer"),
    RuntimeError("writev [127.0.0.1]:29500: Broken pipe"),
    RuntimeError("Socket closed [127.0.0.1]:29500"),
    RuntimeError("Application timeout caused pair closure"),
    RuntimeError("Timed out waiting 1800000ms for recv operation to complete"),
    RuntimeError("Timed out waiting 1800000ms for send operation to complete"),
    RuntimeError("Rank 1 failed to pass monitoredBarrier in 1800000 ms"),
    # the store
    td.DistNetworkError(
        "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server "
        "shutdown or crash?"
    ),
    # NCCL
    td.DistBackendError(
        "NCCL error in: NCCLUtils.cpp:77, remote process exited or there was a network error, "
        "NCCL version 2.26.2\nncclRemoteError: A call failed possibly due to a network error or a "
        "remote process exiting prematurely."
    ),
    td.DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp:1275, internal error\nncclInternalError: Internal "
        "check failed.\nLast error:\nNet : Connection closed by remote peer n2<43236>"
    ),
    td.DistBackendError("NCCL communicator was aborted on rank 2."),
    td.DistBackendError("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1"),
]


@pytest.mark.parametrize("error", LOST, ids=lambda error: str(error)[:40])
def test_lost_rank_is_recognized(error: RuntimeError) -> None:
    assert is_lost_rank(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("size mismatch"),
        td.DistBackendError("ncclInvalidUsage: This usually reflects invalid usage of NCCL"),
        BrokenPipeError(32, "Broken pipe"),
        InputError("connection closed by peer"),
    ],
)
def test_other_errors_are_no_lost_rank(error: Exception) -> None:
    assert not is_lost_rank(error)


def session_that_raises(error: Exception) -> None:
    with rank_session():
        raise error


def test_lost_rank_is_a_failed_run_in_one_line() -> None:
    with pytest.raises(RunError, match="^rank 0 lost contact with another rank while") as caught:
        session_that_raises(LOST[9])

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory.")])
def test_shortage_is_a_failed_run_in_words(error: Exception) -> None:
    with pytest.raises(RunError, match="rank 0, while .*memory.*max_micro_batch"):
        session_that_raises(error)


@pytest.mark.parametrize(
    "error",
    [RunError("out of memory, in our words"), RuntimeError("a bug"), FileNotFoundError(2, "no")],
)
def test_other_errors_leave_a_session_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        session_that_raises(error)

    assert caught.value is error
