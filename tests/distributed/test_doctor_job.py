"""The doctor of a whole job names what is wrong, on which rank, and what to change."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from coupalign.distributed.world import World
from coupalign.doctor import job
from coupalign.doctor.job import Finding, Rank, examine_job, findings_table
from tests.distributed.ranks import run_ranks

TROUBLES = ("none", "version", "clock", "directory")


def examine_with_troubles(world: World, folder: Path) -> dict[str, dict[str, Finding]]:
    """The findings by trouble and check, with each trouble on rank 1."""
    real_versions, real_time = job.versions_here, time.time
    results = {}
    for trouble in TROUBLES:
        if world.rank == 1:
            job.versions_here, time.time = real_versions, real_time
            if trouble == "version":
                job.versions_here = lambda: real_versions() | {"torch": "1.0"}
            if trouble == "clock":
                time.time = lambda: real_time() + 40

        run_dir = folder
        if trouble == "directory":
            job.PATIENCE_S = 0.5
            run_dir = folder / str(world.rank)

        findings = examine_job(run_dir, world, 0.1)
        results[trouble] = {finding.check: finding for finding in findings}
    return results


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Finding]]:
    first, second = run_ranks(examine_with_troubles, 2, tmp_path_factory.mktemp("run"))
    assert first == second
    return first


def test_healthy_job_has_no_failure(findings: dict[str, dict[str, Finding]]) -> None:
    healthy = findings["none"]

    failures = [finding for finding in healthy.values() if finding.verdict == "FAIL"]
    assert not failures, findings_table(list(healthy.values()))

    checks = {"rendezvous", "interface", "clock", "run directory", "all-reduce", "versions"}
    assert checks <= healthy.keys()
    assert "2 ranks met" in healthy["rendezvous"].found
    assert "GB/s at 16 MB" in healthy["all-reduce"].found


@pytest.mark.parametrize(
    ("trouble", "check", "verdict", "message"),
    [
        ("version", "versions", "FAIL", "1.0 on rank 1"),
        ("clock", "clock", "warn", "rank 1 on"),
        ("directory", "run directory", "FAIL", "does not see what rank"),
    ],
)
def test_trouble_on_a_rank_is_named_with_a_remedy(
    findings: dict[str, dict[str, Finding]], trouble: str, check: str, verdict: str, message: str
) -> None:
    finding = findings[trouble][check]
    assert finding.verdict == verdict
    assert finding.remedy
    assert message in finding.found


def make_rank(number: int, host: str, address: str = "10.0.0.1", **environment: str) -> Rank:
    return Rank(
        rank=number,
        local_rank=number % 2,
        local_size=2,
        host=host,
        address=address,
        interfaces=("lo", "ib0"),
        environment=environment,
        cores=8,
        gpu="none",
        versions={"torch": "2"},
    )


def test_interface_check_finds_loopback_and_missing_interfaces() -> None:
    loopback = [make_rank(0, "n1", "127.0.1.1"), make_rank(1, "n2", "127.0.1.1")]
    finding = job._check_interface(loopback)
    assert finding.verdict == "FAIL"
    assert "here: ib0" in finding.remedy

    missing = [
        make_rank(0, "n1", GLOO_SOCKET_IFNAME="ib0"),
        make_rank(1, "n2", GLOO_SOCKET_IFNAME="eth7"),
    ]
    assert "n2 has no such interface" in job._check_interface(missing).found

    unnamed = [make_rank(0, "n1"), make_rank(1, "n2")]
    assert job._check_interface(unnamed).verdict == "warn"

    one_host = [make_rank(0, "n1", "127.0.1.1"), make_rank(1, "n1", "127.0.1.1")]
    assert job._check_interface(one_host).verdict == "ok"


def test_repeated_local_ranks_and_too_many_threads_are_found() -> None:
    two_jobs = [make_rank(0, "n1"), make_rank(2, "n1")]
    assert "local rank [0] exists twice on n1" in job._check_rendezvous(two_jobs, 1.0).found

    crowded = [make_rank(0, "n1", OMP_NUM_THREADS="8")]
    assert "set OMP_NUM_THREADS=4" in job._check_threads(crowded).remedy
