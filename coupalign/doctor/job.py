"""Examines a job on all its ranks within a minute: whether they meet, agree and reach each other, and what to change if not."""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

import coupalign
from coupalign.distributed.world import (
    World,
    from_main,
    gather_objects,
    gather_vector,
    launcher_name,
    on_main,
    sum_over_ranks,
    wait_for_all,
)
from coupalign.doctor.installation import examine
from coupalign.files import whole_file
from coupalign.tracking import git_revision

PATIENCE_S = 10.0  # for a file that another machine wrote
CLOCK_S = 1.0  # tolerated difference of two clocks
FREE_GB = 20.0  # tolerated room in the run directory
SLOW_GB_PER_S = {
    "gloo": 0.1,
    "nccl": 5.0,
}  # rules of thumb: a 1 Gb/s network, and half of a 100 Gb/s one


@dataclass(frozen=True)
class Finding:
    """What one check found, and what to change where it is not ok."""

    check: str
    verdict: Literal["ok", "warn", "FAIL"]
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Rank:
    """What a rank knows about itself."""

    rank: int
    local_rank: int
    local_size: int
    host: str
    address: str  # that its host's name resolves to
    interfaces: tuple[str, ...]
    environment: dict[str, str]  # the variables that matter
    cores: int
    gpu: str
    versions: dict[str, str]


def examine_job(run_dir: Path, world: World, joined_s: float) -> list[Finding]:
    """Run all checks; collective. The same findings on every rank.

    Args:
        run_dir: a directory that all ranks should share; created where it is missing.
        joined_s: how long joining the process group took on this rank, seconds.
    """
    ranks: list[Rank] = gather_objects(_know_yourself(world), world)
    findings = [
        _rendezvous(ranks, max(gather_objects(joined_s, world))),
        _interface(ranks),
        _devices(ranks),
        _threads(ranks),
        _versions(ranks),
        _clock(ranks, world),
        _shared_directory(run_dir, ranks, world),
        _room(run_dir, world),
        _bandwidth(world),
    ]
    return from_main(findings, world)


def findings_table(findings: list[Finding]) -> str:
    """For people."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.verdict:<4}  {finding.check:<{width}}  {finding.found}")
        if finding.remedy:
            lines.append(f"{'':<4}  {'':<{width}}  -> {finding.remedy}")
    return "\n".join(lines)


def to_json(findings: list[Finding]) -> list[dict[str, Any]]:
    return [asdict(finding) for finding in findings]


# ----------------------------------------------------------------------------------------------- one check a function


def _know_yourself(world: World) -> Rank:
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        address = "unknown"
    names = (
        "GLOO_SOCKET_IFNAME",
        "NCCL_SOCKET_IFNAME",
        "OMP_NUM_THREADS",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    gpu = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "none"
    return Rank(
        world.rank,
        world.local_rank,
        world.local_size,
        host,
        address,
        tuple(name for _, name in socket.if_nameindex()),
        {name: os.environ[name] for name in names if name in os.environ},
        os.cpu_count() or 1,
        gpu,
        versions_here(),
    )


def versions_here() -> dict[str, str]:
    """What must be equal on all ranks."""
    found = examine()
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none"
    names = ("coupalign", "python", "torch", "triton", "timm", "transformers", "deepspeed")
    revision = git_revision(Path(coupalign.__file__).parent)
    return {name: found[name] for name in names} | {
        "revision": revision,
        "cuda": torch.version.cuda or "none",
        "nccl": nccl,
    }


def _rendezvous(ranks: list[Rank], joined_s: float) -> Finding:
    hosts: dict[str, list[Rank]] = defaultdict(list)
    for rank in ranks:
        hosts[rank.host].append(rank)
    found = f"{launcher_name()}: {len(ranks)} ranks met in {joined_s:.1f} s on " + ", ".join(
        f"{host} ({len(here)})" for host, here in list(hosts.items())[:16]
    )
    for host, here in hosts.items():
        twice = {
            rank.local_rank
            for rank in here
            if sum(other.local_rank == rank.local_rank for other in here) > 1
        }
        if twice:
            return Finding(
                "rendezvous",
                "FAIL",
                f"{found}; local rank {sorted(twice)} is there twice on {host}",
                "two jobs share a node, or hosts share a name: ranks of one host need local ranks of their own",
            )
    return Finding("rendezvous", "ok", found)


def _interface(ranks: list[Rank]) -> Finding:
    variable = "NCCL_SOCKET_IFNAME" if ranks[0].gpu != "none" else "GLOO_SOCKET_IFNAME"
    chosen = {rank.environment.get(variable, "") for rank in ranks}
    several = len({rank.host for rank in ranks}) > 1
    offered = ", ".join(name for name in ranks[0].interfaces if name != "lo") or "none but lo"
    for rank in ranks:
        name = rank.environment.get(variable, "")
        if variable.startswith("GLOO") and name and name not in rank.interfaces:
            return Finding(
                "interface",
                "FAIL",
                f"{variable}={name}, and {rank.host} has no such interface",
                f"choose one that every node has ({rank.host}: {', '.join(rank.interfaces)}) in slurm/env.sh or .deepspeed_env",
            )
        if several and not name and rank.address.startswith("127."):
            return Finding(
                "interface",
                "FAIL",
                f"{rank.host} is {rank.address} to itself and {variable} is not set: other nodes cannot "
                "answer to that",
                f"set {variable} to the interface between the nodes (here: {offered})",
            )
    if several and chosen == {""}:
        return Finding(
            "interface",
            "warn",
            f"{variable} is not set; it worked through what the host names resolve to",
            f"name the fast one (here: {offered}), or a slow network may be taken",
        )
    return Finding(
        "interface", "ok", f"{variable}={'/'.join(sorted(chosen)) or 'not set, one host'}"
    )


def _devices(ranks: list[Rank]) -> Finding:
    kinds = _who_has({rank.rank: rank.gpu for rank in ranks})
    if len(kinds) > 1:
        return Finding(
            "devices",
            "warn",
            _spell(kinds),
            "the slowest decides the speed: take nodes of one kind",
        )
    return Finding(
        "devices",
        "ok",
        next(iter(kinds)) if ranks[0].gpu != "none" else "no GPU: gloo on the processor",
    )


def _threads(ranks: list[Rank]) -> Finding:
    for rank in ranks:
        threads = int(rank.environment.get("OMP_NUM_THREADS") or 0)
        if threads * rank.local_size > rank.cores:
            return Finding(
                "threads",
                "warn",
                f"{rank.host}: OMP_NUM_THREADS={threads} for each of {rank.local_size} ranks on {rank.cores} "
                "cores",
                f"set OMP_NUM_THREADS={max(1, rank.cores // rank.local_size)}",
            )
    first = ranks[0]
    return Finding(
        "threads",
        "ok",
        f"OMP_NUM_THREADS={first.environment.get('OMP_NUM_THREADS', 'not set')}, {first.local_size} ranks on "
        f"{first.cores} cores",
    )


def _versions(ranks: list[Rank]) -> Finding:
    differ = {
        name: kinds
        for name in ranks[0].versions
        if len(kinds := _who_has({r.rank: r.versions[name] for r in ranks})) > 1
    }
    if differ:
        return Finding(
            "versions",
            "FAIL",
            "; ".join(f"{name}: {_spell(kinds)}" for name, kinds in differ.items()),
            "start all ranks from one environment (slurm/env.sh), constraints.txt lists what was tested together",
        )
    return Finding(
        "versions",
        "ok",
        ", ".join(
            f"{name} {value}" for name, value in ranks[0].versions.items() if value != "none"
        ),
    )


def _clock(ranks: list[Rank], world: World) -> Finding:
    rounds = []
    for _ in range(5):
        wait_for_all(world)
        rounds.append(
            gather_vector(
                torch.tensor([time.time()], dtype=torch.float64, device=world.device), world
            )[:, 0]
        )
    ahead_by_round = (
        torch.stack(rounds) - torch.stack(rounds)[:, :1]
    )  # [rounds, ranks], seconds ahead of rank 0
    ahead = ahead_by_round.median(0).values
    worst = int(ahead.abs().argmax())
    error = float(
        (ahead_by_round[:, worst].max() - ahead_by_round[:, worst].min()) / 2
    )  # how unequally the ranks leave a barrier
    found = f"rank {worst} on {ranks[worst].host} is {float(ahead[worst]):+.3f} s from rank 0 (within {error:.3f} s), the furthest"
    if abs(float(ahead[worst])) > CLOCK_S:
        return Finding(
            "clock",
            "warn",
            found,
            "synchronize the nodes' clocks (chrony, ntpd), or times in logs and MLflow mislead",
        )
    return Finding("clock", "ok", found)


def _shared_directory(run_dir: Path, ranks: list[Rank], world: World) -> Finding:
    token = from_main(uuid.uuid4().hex, world)
    mine = run_dir / f".preflight-{token}-{world.rank}"
    try:
        with whole_file(
            mine, "w"
        ) as file:  # written beside, flushed to disk, renamed: as a checkpoint is
            file.write(token)
        problem = ""
    except OSError as error:
        problem = str(error)
    problems = gather_objects(problem, world)
    expected = {
        rank: run_dir / f".preflight-{token}-{rank}"
        for rank in range(world.size)
        if not problems[rank]
    }
    seen_by = gather_objects(_never_appear(expected, token), world)
    mine.unlink(missing_ok=True)
    for rank, words in enumerate(problems):
        if words:
            return Finding(
                "run directory",
                "FAIL",
                f"rank {rank} on {ranks[rank].host} cannot write: {words}",
                "make it writable, or choose another run_dir",
            )
    for rank, missing in enumerate(seen_by):
        if missing:
            return Finding(
                "run directory",
                "FAIL",
                f"rank {rank} on {ranks[rank].host} does not see what rank {missing[0]} on "
                f"{ranks[missing[0]].host} wrote to {run_dir}",
                "it must be one directory on a shared file system for all nodes",
            )
    return Finding(
        "run directory",
        "ok",
        f"{run_dir.resolve()}: every rank sees what every other one writes; rename and fsync work",
    )


def _never_appear(expected: dict[int, Path], content: str) -> list[int]:
    """The ranks whose file does not come to be seen here within PATIENCE_S."""
    until = time.monotonic() + PATIENCE_S
    while True:
        expected = {rank: path for rank, path in expected.items() if not _holds(path, content)}
        if not expected or time.monotonic() > until:
            return list(expected)
        time.sleep(0.1)


def _holds(path: Path, content: str) -> bool:
    try:
        return path.read_text("utf-8") == content
    except OSError:
        return False


def _room(run_dir: Path, world: World) -> Finding:
    def free() -> float:
        return shutil.disk_usage(run_dir if run_dir.exists() else run_dir.parent).free / 1e9

    gigabytes = on_main(free, world)
    if gigabytes < FREE_GB:
        return Finding(
            "room",
            "warn",
            f"{gigabytes:.1f} GB are free",
            "a checkpoint of a large model with its optimizer takes several GB",
        )
    return Finding("room", "ok", f"{gigabytes:,.0f} GB are free")


def _bandwidth(world: World) -> Finding:
    """Bus bandwidth of an all-reduce, 2 (N - 1) / N x bytes / time (the definition of NVIDIA's nccl-tests)."""
    if world.size == 1:
        return Finding("all-reduce", "ok", "one rank: nothing to exchange")
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    rates = {}
    for megabytes in (1, 64) if backend == "nccl" else (1, 16):
        tensor = torch.ones(megabytes * 250_000, device=world.device)
        seconds = statistics.median(
            _timed(partial(sum_over_ranks, tensor, world), world) for _ in range(5)
        )
        slowest = max(gather_objects(seconds, world))
        rates[megabytes] = 2 * (world.size - 1) / world.size * megabytes * 1e6 / slowest / 1e9
    found = f"{backend}: " + ", ".join(
        f"{rate:.2f} GB/s at {megabytes} MB" for megabytes, rate in rates.items()
    )
    if max(rates.values()) < SLOW_GB_PER_S[backend]:
        return Finding(
            "all-reduce",
            "warn",
            f"{found}; as a rule of thumb at least {SLOW_GB_PER_S[backend]} GB/s",
            "look at the interface above; with GPUs NCCL_DEBUG=INFO shows which network is taken",
        )
    return Finding("all-reduce", "ok", found)


def _timed(act: Callable[[], None], world: World) -> float:
    wait_for_all(world)
    began = time.perf_counter()
    act()
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _who_has(values: Mapping[int, str]) -> dict[str, list[int]]:
    kinds: dict[str, list[int]] = defaultdict(list)
    for rank, value in values.items():
        kinds[value].append(rank)
    return dict(kinds)


def _spell(kinds: Mapping[str, list[int]]) -> str:
    return ", ".join(
        f"{value} on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{' …' * (len(ranks) > 8)}"
        for value, ranks in kinds.items()
    )
