"""Examine a job on all its ranks: do they meet, agree and reach each other, and what should change.

Each check is one function that returns a `Finding`. All of them together take less than a minute.
"""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
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
from coupalign.version import git_revision

PATIENCE_S = 10.0  # how long to wait for a file that another machine wrote
CLOCK_S = 1.0  # tolerated difference of two clocks
FREE_GB = 20.0  # wanted in the run directory

# Rules of thumb for an all-reduce: a 1 Gb/s network, and half of a 100 Gb/s one.
SLOW_GB_PER_S = {"gloo": 0.1, "nccl": 5.0}

_VARIABLES = (
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "OMP_NUM_THREADS",
    "MASTER_ADDR",
    "MASTER_PORT",
)
_SAME_ON_ALL_RANKS = (
    "coupalign",
    "python",
    "torch",
    "triton",
    "timm",
    "transformers",
    "deepspeed",
)


@dataclass(frozen=True)
class Finding:
    """The result of one check, and what to change if it is not ok."""

    check: str
    verdict: Literal["ok", "warn", "FAIL"]
    found: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Rank:
    """What a rank knows about itself.

    Attributes:
        address: what its host's name resolves to.
        environment: the variables of the environment that matter here.
    """

    rank: int
    local_rank: int
    local_size: int
    host: str
    address: str
    interfaces: tuple[str, ...]
    environment: dict[str, str]
    cores: int
    gpu: str
    versions: dict[str, str]


def examine_job(run_dir: Path, world: World, joined_s: float) -> list[Finding]:
    """Run all checks; collective. Returns the same findings on every rank.

    Args:
        run_dir: a directory that all ranks should share. It is created if it is missing.
        joined_s: seconds that joining the process group took on this rank.
    """
    ranks: list[Rank] = gather_objects(_describe_rank(world), world)
    slowest_join_s = max(gather_objects(joined_s, world))
    findings = [
        _check_rendezvous(ranks, slowest_join_s),
        _check_interface(ranks),
        _check_devices(ranks),
        _check_threads(ranks),
        _check_versions(ranks),
        _check_clock(ranks, world),
        _check_shared_directory(run_dir, ranks, world),
        _check_free_disk(run_dir, world),
        _check_bandwidth(world),
    ]
    return from_main(findings, world)


def findings_table(findings: list[Finding]) -> str:
    """Format findings for a terminal, each remedy below its finding."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.verdict:<4}  {finding.check:<{width}}  {finding.found}")
        if finding.remedy:
            lines.append(f"{'':<4}  {'':<{width}}  -> {finding.remedy}")
    return "\n".join(lines)


def to_json(findings: list[Finding]) -> list[dict[str, Any]]:
    """Convert findings to values that JSON can hold."""
    return [asdict(finding) for finding in findings]


def versions_here() -> dict[str, str]:
    """Collect the versions that must be equal on all ranks."""
    report = examine()
    versions = {name: report[name] for name in _SAME_ON_ALL_RANKS}
    versions["revision"] = git_revision(Path(coupalign.__file__).parent)
    versions["cuda"] = torch.version.cuda or "none"
    versions["nccl"] = "none"
    if torch.cuda.is_available():
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return versions


def _describe_rank(world: World) -> Rank:
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        address = "unknown"

    gpu = "none"
    if world.device.type == "cuda":
        gpu = torch.cuda.get_device_name(world.device)

    return Rank(
        rank=world.rank,
        local_rank=world.local_rank,
        local_size=world.local_size,
        host=host,
        address=address,
        interfaces=tuple(name for _, name in socket.if_nameindex()),
        environment={name: os.environ[name] for name in _VARIABLES if name in os.environ},
        cores=os.cpu_count() or 1,
        gpu=gpu,
        versions=versions_here(),
    )


def _check_rendezvous(ranks: list[Rank], joined_s: float) -> Finding:
    by_host: dict[str, list[Rank]] = defaultdict(list)
    for rank in ranks:
        by_host[rank.host].append(rank)

    first_hosts = [f"{host} ({len(local)})" for host, local in list(by_host.items())[:16]]
    hosts = ", ".join(first_hosts)
    met = f"{launcher_name()}: {len(ranks)} ranks met in {joined_s:.1f} s on {hosts}"

    for host, local in by_host.items():
        uses = Counter(rank.local_rank for rank in local)
        repeated = sorted(local_rank for local_rank, times in uses.items() if times > 1)
        if repeated:
            return Finding(
                "rendezvous",
                "FAIL",
                f"{met}; local rank {repeated} exists twice on {host}",
                "two jobs share a node, or two hosts share a name: "
                "each rank of a host needs its own local rank",
            )
    return Finding("rendezvous", "ok", met)


def _check_interface(ranks: list[Rank]) -> Finding:
    variable = "NCCL_SOCKET_IFNAME" if ranks[0].gpu != "none" else "GLOO_SOCKET_IFNAME"
    several_hosts = len({rank.host for rank in ranks}) > 1
    offered = ", ".join(name for name in ranks[0].interfaces if name != "lo") or "none but lo"

    for rank in ranks:
        name = rank.environment.get(variable, "")

        # NCCL takes patterns, gloo takes the name of one interface.
        if variable.startswith("GLOO") and name and name not in rank.interfaces:
            return Finding(
                "interface",
                "FAIL",
                f"{variable}={name}, and {rank.host} has no such interface",
                f"choose one that every node has ({rank.host}: {', '.join(rank.interfaces)}) "
                "in slurm/env.sh or .deepspeed_env",
            )

        if several_hosts and not name and rank.address.startswith("127."):
            return Finding(
                "interface",
                "FAIL",
                f"{rank.host} resolves its own name to {rank.address} and {variable} is not set: "
                "other nodes cannot reach that address",
                f"set {variable} to the interface between the nodes (here: {offered})",
            )

    chosen = {rank.environment.get(variable, "") for rank in ranks}
    if several_hosts and chosen == {""}:
        return Finding(
            "interface",
            "warn",
            f"{variable} is not set; the host names resolved to addresses that work",
            f"name the fast one (here: {offered}), or a slow network may be used",
        )
    setting = "/".join(sorted(chosen)) or "not set, one host"
    return Finding("interface", "ok", f"{variable}={setting}")


def _check_devices(ranks: list[Rank]) -> Finding:
    ranks_by_gpu = _ranks_by_value({rank.rank: rank.gpu for rank in ranks})
    if len(ranks_by_gpu) > 1:
        return Finding(
            "devices",
            "warn",
            _format_groups(ranks_by_gpu),
            "the slowest decides the speed: use nodes of one kind",
        )

    if ranks[0].gpu == "none":
        return Finding("devices", "ok", "no GPU: gloo on the processor")
    return Finding("devices", "ok", ranks[0].gpu)


def _check_threads(ranks: list[Rank]) -> Finding:
    for rank in ranks:
        threads = int(rank.environment.get("OMP_NUM_THREADS") or 0)
        if threads * rank.local_size > rank.cores:
            return Finding(
                "threads",
                "warn",
                f"{rank.host}: OMP_NUM_THREADS={threads} for each of {rank.local_size} ranks "
                f"on {rank.cores} cores",
                f"set OMP_NUM_THREADS={max(1, rank.cores // rank.local_size)}",
            )

    first = ranks[0]
    setting = first.environment.get("OMP_NUM_THREADS", "not set")
    return Finding(
        "threads",
        "ok",
        f"OMP_NUM_THREADS={setting}, {first.local_size} ranks on {first.cores} cores",
    )


def _check_versions(ranks: list[Rank]) -> Finding:
    differences = []
    for name in ranks[0].versions:
        ranks_by_version = _ranks_by_value({rank.rank: rank.versions[name] for rank in ranks})
        if len(ranks_by_version) > 1:
            differences.append(f"{name}: {_format_groups(ranks_by_version)}")

    if differences:
        return Finding(
            "versions",
            "FAIL",
            "; ".join(differences),
            "start all ranks from one environment (slurm/env.sh); "
            "constraints.txt lists the versions tested together",
        )
    versions = [f"{name} {value}" for name, value in ranks[0].versions.items() if value != "none"]
    return Finding("versions", "ok", ", ".join(versions))


def _check_clock(ranks: list[Rank], world: World) -> Finding:
    rounds = []
    for _ in range(5):
        wait_for_all(world)
        now = torch.tensor([time.time()], dtype=torch.float64, device=world.device)
        rounds.append(gather_vector(now, world)[:, 0])
    times = torch.stack(rounds)  # [rounds, ranks]

    ahead = times - times[:, :1]  # seconds ahead of rank 0
    typical = ahead.median(0).values
    worst = int(typical.abs().argmax())
    difference = float(typical[worst])

    # The spread over the rounds is how unequally the ranks leave a barrier.
    error = float((ahead[:, worst].max() - ahead[:, worst].min()) / 2)
    message = (
        f"rank {worst} on {ranks[worst].host} is the furthest: {difference:+.3f} s from rank 0 "
        f"(within {error:.3f} s)"
    )
    if abs(difference) > CLOCK_S:
        return Finding(
            "clock",
            "warn",
            message,
            "synchronize the nodes' clocks (chrony, ntpd), or times in logs and MLflow mislead",
        )
    return Finding("clock", "ok", message)


def _check_shared_directory(run_dir: Path, ranks: list[Rank], world: World) -> Finding:
    token = from_main(uuid.uuid4().hex, world)
    files = [run_dir / f".preflight-{token}-{rank}" for rank in range(world.size)]
    mine = files[world.rank]

    # Write as a checkpoint is written: next to the target, flushed to disk, renamed.
    error_message = ""
    try:
        with whole_file(mine, "w") as file:
            file.write(token)
    except OSError as error:
        error_message = str(error)
    write_errors = gather_objects(error_message, world)

    # Every rank then looks for the files of all ranks that could write.
    expected = {rank: file for rank, file in enumerate(files) if not write_errors[rank]}
    missing_by_rank = gather_objects(_wait_for_files(expected, token), world)
    mine.unlink(missing_ok=True)

    for rank, message in enumerate(write_errors):
        if message:
            return Finding(
                "run directory",
                "FAIL",
                f"rank {rank} on {ranks[rank].host} cannot write: {message}",
                "make it writable, or choose another run_dir",
            )
    for rank, missing in enumerate(missing_by_rank):
        if missing:
            writer = ranks[missing[0]]
            return Finding(
                "run directory",
                "FAIL",
                f"rank {rank} on {ranks[rank].host} does not see what rank {writer.rank} "
                f"on {writer.host} wrote to {run_dir}",
                "it must be one directory on a file system that all nodes share",
            )
    return Finding(
        "run directory",
        "ok",
        f"{run_dir.resolve()}: every rank sees the files of all others; rename and fsync work",
    )


def _wait_for_files(expected: dict[int, Path], content: str) -> list[int]:
    """Wait up to PATIENCE_S for the files of other ranks.

    Returns the ranks whose file is missing.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        expected = {rank: path for rank, path in expected.items() if not _holds(path, content)}
        if not expected or time.monotonic() > deadline:
            return list(expected)
        time.sleep(0.1)


def _holds(path: Path, content: str) -> bool:
    try:
        return path.read_text("utf-8") == content
    except OSError:
        return False


def _check_free_disk(run_dir: Path, world: World) -> Finding:
    def free_gb() -> float:
        folder = run_dir if run_dir.exists() else run_dir.parent
        return shutil.disk_usage(folder).free / 1e9

    gigabytes = on_main(free_gb, world)
    if gigabytes < FREE_GB:
        return Finding(
            "room",
            "warn",
            f"{gigabytes:.1f} GB are free",
            "a checkpoint of a large model with its optimizer takes several GB",
        )
    return Finding("room", "ok", f"{gigabytes:,.0f} GB are free")


def _check_bandwidth(world: World) -> Finding:
    """Measure the bus bandwidth of an all-reduce, 2 (N - 1) / N x bytes / time.

    The definition is that of NVIDIA's nccl-tests.
    """
    if world.size == 1:
        return Finding("all-reduce", "ok", "one rank: nothing to exchange")

    backend, sizes_mb = "gloo", (1, 16)
    if world.device.type == "cuda":
        backend, sizes_mb = "nccl", (1, 64)

    rates = {}
    for megabytes in sizes_mb:
        tensor = torch.ones(megabytes * 250_000, device=world.device)
        seconds = statistics.median(_time_all_reduce(tensor, world) for _ in range(5))
        slowest = max(gather_objects(seconds, world))
        rates[megabytes] = 2 * (world.size - 1) / world.size * megabytes * 1e6 / slowest / 1e9

    measured = ", ".join(f"{rate:.2f} GB/s at {size} MB" for size, rate in rates.items())
    wanted = SLOW_GB_PER_S[backend]
    if max(rates.values()) < wanted:
        return Finding(
            "all-reduce",
            "warn",
            f"{backend}: {measured}; as a rule of thumb at least {wanted} GB/s",
            "look at the interface above; with GPUs, NCCL_DEBUG=INFO shows which network is used",
        )
    return Finding("all-reduce", "ok", f"{backend}: {measured}")


def _time_all_reduce(tensor: torch.Tensor, world: World) -> float:
    wait_for_all(world)
    start = time.perf_counter()
    sum_over_ranks(tensor, world)
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _ranks_by_value(values: Mapping[int, str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for rank, value in values.items():
        groups[value].append(rank)
    return dict(groups)


def _format_groups(groups: Mapping[str, list[int]]) -> str:
    """Format which ranks have which value: "2.1 on rank 0, 2.0 on ranks 1, 2"."""
    texts = []
    for value, ranks in groups.items():
        numbers = ", ".join(map(str, ranks[:8]))
        plural = "s" if len(ranks) > 1 else ""
        more = " …" if len(ranks) > 8 else ""
        texts.append(f"{value} on rank{plural} {numbers}{more}")
    return ", ".join(texts)
