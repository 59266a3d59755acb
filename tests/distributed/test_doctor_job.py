"""The doctor of a whole job says what is wrong, on which rank, and what to change."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from coupalign.distributed.world import World
from coupalign.doctor import job as preflight
from coupalign.doctor.job import Finding, Rank, examine_job, findings_table
from tests.distributed.ranks import run_ranks

TROUBLES = ("none", "version", "clock", "directory")


def examined(world: World, folder: Path) -> dict[str, dict[str, Finding]]:
    """The findings by trouble and check, with something wrong on rank 1."""
    real, clock = preflight.versions_here, time.time
    found = {}
    for trouble in TROUBLES:
        if world.rank == 1:
            preflight.versions_here = (
                (lambda: real() | {"torch": "1.0"}) if trouble == "version" else real
            )
            time.time = (lambda: clock() + 40) if trouble == "clock" else clock
        if trouble == "directory":
            preflight.PATIENCE_S = 0.5
        where = folder / str(world.rank) if trouble == "directory" else folder
        found[trouble] = {finding.check: finding for finding in examine_job(where, world, 0.1)}
    return found


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Finding]]:
    first, second = run_ranks(examined, 2, tmp_path_factory.mktemp("run"))
    assert first == second
    return first


def test_a_healthy_job(findings: dict[str, dict[str, Finding]]) -> None:
    healthy = findings["none"]
    assert not [finding for finding in healthy.values() if finding.verdict == "FAIL"], (
        findings_table(list(healthy.values()))
    )
    assert {
        "rendezvous",
        "interface",
        "clock",
        "run directory",
        "all-reduce",
        "versions",
    } <= healthy.keys()
    assert (
        "2 ranks met" in healthy["rendezvous"].found
        and "GB/s at 16 MB" in healthy["all-reduce"].found
    )


@pytest.mark.parametrize(
    ("trouble", "check", "verdict", "words"),
    [
        ("version", "versions", "FAIL", "1.0 on rank 1"),
        ("clock", "clock", "warn", "rank 1 on"),
        ("directory", "run directory", "FAIL", "does not see what rank"),
    ],
)
def test_what_is_wrong_on_a_rank_is_named(
    findings: dict[str, dict[str, Finding]], trouble: str, check: str, verdict: str, words: str
) -> None:
    found = findings[trouble][check]
    assert (found.verdict, bool(found.remedy)) == (verdict, True) and words in found.found


def rank(number: int, host: str, address: str = "10.0.0.1", **environment: str) -> Rank:
    return Rank(
        number, number % 2, 2, host, address, ("lo", "ib0"), environment, 8, "none", {"torch": "2"}
    )


def test_interfaces() -> None:
    apart = [rank(0, "n1", "127.0.1.1"), rank(1, "n2", "127.0.1.1")]
    assert (
        preflight._interface(apart).verdict == "FAIL"
        and "here: ib0" in preflight._interface(apart).remedy
    )
    named = [rank(0, "n1", GLOO_SOCKET_IFNAME="ib0"), rank(1, "n2", GLOO_SOCKET_IFNAME="eth7")]
    assert "n2 has no such interface" in preflight._interface(named).found
    assert preflight._interface([rank(0, "n1"), rank(1, "n2")]).verdict == "warn"
    assert (
        preflight._interface([rank(0, "n1", "127.0.1.1"), rank(1, "n1", "127.0.1.1")]).verdict
        == "ok"
    )


def test_two_jobs_on_one_host_and_too_many_threads() -> None:
    assert (
        "local rank [0] is there twice on n1"
        in preflight._rendezvous([rank(0, "n1"), rank(2, "n1")], 1.0).found
    )
    assert (
        "set OMP_NUM_THREADS=4" in preflight._threads([rank(0, "n1", OMP_NUM_THREADS="8")]).remedy
    )
