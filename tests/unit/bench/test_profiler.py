"""Counting the calls in a profile."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch.profiler import ProfilerActivity, profile

from coupalign.bench.profiler import count_calls, profiler_activities


def test_operators_and_reads_back_are_counted_per_repeat() -> None:
    device = torch.device("cpu")
    x = torch.ones(3)
    with profile(activities=profiler_activities(device)) as profiler:
        for _ in range(4):
            (x + x)[0].item()

    calls = count_calls(profiler.events(), 4, device)

    assert list(calls) == ["operators", "numbers read back"]
    assert calls["numbers read back"] == 1
    assert calls["operators"] >= 3


def test_launches_and_waits_are_counted_on_a_gpu() -> None:
    names = ["aten::add", "cudaLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch", "memcpy"]
    waits = ["cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize"]
    events = [SimpleNamespace(name=name) for name in (*names, *waits)]

    calls = count_calls(events, 2, torch.device("cuda"), own_waits=1)

    assert calls == {
        "operators": 0.5,
        "numbers read back": 0,
        "kernels launched": 1.5,
        "waits": 1,
    }


def test_kernels_are_recorded_only_on_a_gpu() -> None:
    assert profiler_activities(torch.device("cpu")) == [ProfilerActivity.CPU]
    assert ProfilerActivity.CUDA in profiler_activities(torch.device("cuda"))
