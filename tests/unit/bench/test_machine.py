"""The description of a machine, and the clock and memory of a benchmark."""

from __future__ import annotations

import mmap

import pytest
import torch

from coupalign.bench.machine import (
    describe_machine,
    describe_processor,
    resident_gigabytes,
    sample_rates,
    time_call,
)

OLD_EPYC = (
    "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\nflags\t\t: fpu avx2\n"
    "\n"
    "processor\t: 1\nmodel\t\t: 1\n"
)


def test_processors_of_one_brand_are_distinguished() -> None:
    new_epyc = OLD_EPYC.replace("model\t\t: 1", "model\t\t: 17")
    new_epyc = new_epyc.replace("avx2", "avx2 avx512_bf16")

    old, new = describe_processor(OLD_EPYC), describe_processor(new_epyc)

    assert old.startswith("AMD EPYC (family 25, model 1, ")
    assert "bf16" not in old
    assert new.startswith("AMD EPYC (family 25, model 17, ")
    assert ", bf16), " in new


def test_processor_without_brand_is_described() -> None:
    arm = "processor\t: 0\nFeatures\t: fp asimd bf16\n"
    assert ", bf16), " in describe_processor(arm)

    without_proc = ""
    assert describe_processor(without_proc).endswith(" cores")


def test_machine_names_device_and_versions() -> None:
    machine = describe_machine(torch.device("cpu"))

    assert list(machine) == ["device", "threads", "cores", "torch", "python"]
    assert machine["device"].endswith(" cores")
    assert machine["torch"] == torch.__version__


def test_rates_are_median_and_quartiles() -> None:
    assert sample_rates(6, [1.0, 2.0, 3.0]) == (3.0, 2.0, 6.0)
    assert sample_rates(6, [2.0]) == (3.0, 3.0, 3.0)


def test_call_is_timed_and_its_result_returned() -> None:
    seconds, result = time_call(lambda: "result")

    assert seconds >= 0
    assert result == "result"


def test_resident_memory_counts_an_allocation() -> None:
    # Anonymous pages: an allocator could hand out memory that the process holds already.
    size = 200_000_000
    before = resident_gigabytes()
    with mmap.mmap(-1, size) as memory:
        for start in range(0, size, mmap.PAGESIZE):
            memory[start] = 1
        grown = resident_gigabytes() - before

    assert grown == pytest.approx(size / 1e9, rel=0.2)
