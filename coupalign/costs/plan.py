"""What a training would need, before a GPU is rented: memory by engine, bytes on the wire, the micro-batch, the accumulation.

The formulas are those of docs/operations.md, "Plan"; tests/cluster/test_memory.py holds them against what ranks really
hold and send. Bytes are 4 a number: weights, gradients and their exchange are fp32 in every engine (engine/base.py).

Legend: P trainable parameters, F frozen ones, N ranks, a micro-batches a step, r = (N - 1) / N.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from coupalign.config.schema import Config, DdpEngine
from coupalign.costs.footprint import Footprint, footprint
from coupalign.data.order import micro_batches
from coupalign.engine.optimizer import parameter_groups
from coupalign.errors import InputError
from coupalign.model.build import build_model
from coupalign.model.text import vocabulary_of

GIB = 2**30
BYTES = 4  # of a weight, a gradient, a moment
ACHIEVED = 0.4  # estimate: the share of the peak FLOP/s that a training step reaches
RESERVE = int(1.5 * GIB)  # estimate: CUDA context, NCCL's buffers, workspaces of cuDNN and cuBLAS
FRAGMENTED = 0.05  # estimate: the share of a GPU's memory that the caching allocator cannot use
STAGE0_BUCKET = 500_000_000  # numbers: MEMORY_OPT_ALLREDUCE_SIZE of deepspeed/runtime/engine.py, which no setting changes
GATHERED = (
    1_000_000_000  # numbers: DeepSpeed's stage3_max_live_parameters and stage3_max_reuse_distance
)


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, by its vendor's data sheet; FLOP/s are dense, with float32 accumulation."""

    memory: int  # bytes, as nvidia-smi shows them
    half: float  # FLOP/s of float16 products on tensor cores
    single: float  # FLOP/s of float32 outside tensor cores
    link: float  # bytes/s in one direction between GPUs of a node: half of NVLink's sum, or PCIe
    bf16: bool = True


# NVIDIA's data sheets: A100 (2021), H100 and H200 (SXM, 2024), V100 (SXM2, 2020); the white papers of the Ada and GA102 architectures
# for the RTX cards, which talk over PCIe 4.0 x16.
GPUS = {
    "a100-40": Gpu(40 * GIB, 312e12, 19.5e12, 300e9),
    "a100-80": Gpu(80 * GIB, 312e12, 19.5e12, 300e9),
    "h100": Gpu(80 * GIB, 989.4e12, 67e12, 450e9),
    "h200": Gpu(140 * GIB, 989.4e12, 67e12, 450e9),
    "rtx4090": Gpu(24 * GIB, 165.2e12, 82.6e12, 32e9),
    "rtx3090": Gpu(24 * GIB, 71e12, 35.6e12, 32e9),
    "v100-32": Gpu(32 * GIB, 125e12, 15.7e12, 150e9, bf16=False),
}


@dataclass(frozen=True)
class Strategy:
    """A way to spread the state of training over ranks."""

    name: str
    stage: int | None  # of ZeRO; None is DDP
    offload: bool = False  # optimizer state and update on the host


WAYS = (
    Strategy("ddp", None),
    *(Strategy(f"zero{stage}", stage) for stage in range(4)),
    *(Strategy(f"zero{stage}+offload", stage, True) for stage in (1, 2, 3)),
)


@dataclass(frozen=True)
class Sizes:
    """Numbers of a model."""

    trainable: int  # P
    frozen: int  # F
    largest: int  # trainable numbers of its largest parameter
    largest_group: int  # of the optimizer's largest parameter group


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. `gradients` and `activations` are there together, `update` in their place afterwards."""

    weights: float
    gradients: float  # when the last backward pass ends
    master: float  # DeepSpeed's second copy of the weights, which the optimizer changes
    moments: float
    ema: float
    buckets: float
    update: float  # gradients and their copies during the exchange and the update
    host: float  # of the host, for this rank
    activations: float = 0.0

    @property
    def total(self) -> float:
        """The most at once on the GPU."""
        return (
            self.weights
            + self.master
            + self.moments
            + self.ema
            + self.buckets
            + max(self.gradients + self.activations, self.update)
        )


def memory_of(
    way: Strategy, sizes: Sizes, ranks: int, *, ema: bool, bucket_mb: int, accumulates: bool
) -> Memory:
    """The state of training on one rank, without activations: docs/operations.md, "Plan".

    Args:
        accumulates: whether a step has more than one micro-batch.
    """
    whole, share, group = (
        BYTES * sizes.trainable,
        BYTES * sizes.trainable / ranks,
        BYTES * sizes.largest_group / ranks,
    )
    every = BYTES * (sizes.trainable + sizes.frozen)
    bucket = 1e6 * bucket_mb
    staged = max(
        bucket, BYTES * sizes.largest
    )  # a gradient larger than a bucket travels alone; what travels is a copy
    average = (share if way.stage == 3 else whole) if ema else 0.0
    kept = (
        share + BYTES * sizes.largest
    )  # at stages 1 and 2 a parameter that the cut divides is kept whole
    match way.stage:
        case None:
            # Gradients are views of DDP's buckets, but under no_sync they gather beside them; one is on its way into its bucket.
            beside = (whole * accumulates + BYTES * sizes.largest) if ranks > 1 else 0
            return Memory(every, whole, 0, 2 * whole, average, beside, whole, 0)
        case 0:
            return Memory(
                every,
                whole,
                0,
                2 * whole,
                average,
                0,
                whole + BYTES * min(sizes.trainable, STAGE0_BUCKET),
                0,
            )
        case 1:
            weights, gradients, update, buckets = every, whole, whole + kept, bucket + staged
        case 2:
            # Where there is more than one micro-batch: the sum so far and the newest one's.
            weights, gradients, update, buckets = (
                every,
                kept * (1 + accumulates),
                kept + group,
                bucket + 3 * staged,
            )
        case _:
            gathered = BYTES * min(sizes.trainable + sizes.frozen, GATHERED)
            weights, gradients, update, buckets = (
                every / ranks + gathered,
                share,
                share + group,
                bucket + 2 * staged,
            )
    if not way.offload:
        return Memory(weights, gradients, share, 2 * share, average, buckets, update, 0)
    left = whole if way.stage == 1 else 0.0  # a share's gradients move to the host as they arrive
    # Master copy, two moments, gradient; the weights on their way back, at stage 3 the sums instead, which stage 2 adds if it must.
    host = share * (6 if way.stage == 2 and accumulates else 5)
    return Memory(weights, left, 0, 0, average, buckets, left, host)


@dataclass(frozen=True)
class CommVolume:
    """Bytes that one rank sends in a step: once, and again with each micro-batch."""

    once: float
    each: float

    def of(self, count: int) -> float:
        """Of a step of `count` micro-batches."""
        return self.once + count * self.each


def comm_volume_of(way: Strategy, sizes: Sizes, ranks: int) -> CommVolume:
    """By a ring's cost: an all-reduce of n bytes sends 2 r n, an all-gather or a reduce-scatter to or from n bytes sends r n."""
    ring = BYTES * (ranks - 1) / ranks
    trainable, every = ring * sizes.trainable, ring * (sizes.trainable + sizes.frozen)
    match way.stage:
        case None | 0:
            return CommVolume(
                2 * trainable, 0
            )  # no_sync; DeepSpeed reduces at the boundary of accumulation
        case 1:
            return CommVolume(
                2 * trainable + trainable, 0
            )  # use_multi_rank_bucket_allreduce: an all-reduce, not a reduce-scatter
        case 2:
            return CommVolume(
                trainable, 2 * trainable
            )  # every backward pass reduces its gradients, the update gathers weights
        case _:
            gathers = (
                1 if sizes.trainable + sizes.frozen <= GATHERED else 2
            )  # kept from forward to backward, or gathered again
            return CommVolume(0, gathers * every + trainable)


@dataclass(frozen=True)
class PlanRow:
    """One way in numbers, for the config's micro-batch."""

    way: str
    memory: Memory
    fits: bool
    largest_micro_batch: int  # 0: not even one image
    wire: float  # bytes a rank sends in a step of the config
    wire_s: float
    break_even: (
        int | None
    )  # micro-batches of the config's size from which sending takes less time than computing; None: never
    break_even_images: int  # the same as images of a single micro-batch


@dataclass(frozen=True)
class Plan:
    """Everything that was computed, and from what."""

    gpu: str
    nodes: int
    ranks: int
    engine: str  # the way that the config names
    micro_batch: int
    accumulation: int
    sizes: Sizes
    footprint: Footprint
    usable: float  # bytes of the GPU's memory
    bandwidth: float  # bytes/s of the ring, the slowest link on it
    compute_s: float  # estimate: of one micro-batch
    rows: tuple[PlanRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers for `--json`: bytes and seconds."""
        rows = [
            {**asdict(row), "memory": {**asdict(row.memory), "total": row.memory.total}}
            for row in self.rows
        ]
        lines = {name: line._asdict() for name, line in vars(self.footprint).items()}
        return {**vars(self), "sizes": asdict(self.sizes), "footprint": lines, "rows": rows}

    def table(self) -> str:
        """The same for people."""
        parts = (
            "weights",
            "gradients",
            "master",
            "moments",
            "ema",
            "buckets",
            "activations",
            "total",
            "host",
        )
        lines = [
            f"{self.sizes.trainable:,} trainable and {self.sizes.frozen:,} frozen parameters; {self.ranks} ranks on {self.nodes} "
            f"nodes of {self.gpu}; micro-batches of {self.micro_batch}, {self.accumulation} a step and rank",
            "",
            f"GiB of a rank    {''.join(f'{part:>12}' for part in parts)}  fits  largest micro-batch",
        ]
        for row in self.rows:
            numbers = "".join(
                f"{(row.memory.total if part == 'total' else vars(row.memory)[part]) / GIB:>12.2f}"
                for part in parts
            )
            lines.append(
                f"{'* ' if row.way == self.engine else '  '}{row.way:<15}{numbers}  {'yes' if row.fits else 'NO':<4}"
                f"{row.largest_micro_batch:>21}"
            )
        lines += [
            "",
            f"{'of a step':<17}{'GB sent':>12}{'sending ms':>12}{'computing ms':>14}  computing takes longer from",
        ]
        for row in self.rows:
            start = "never with" if row.break_even is None else str(row.break_even)
            lines.append(
                f"{'* ' if row.way == self.engine else '  '}{row.way:<15}{row.wire / 1e9:>12.2f}{row.wire_s * 1e3:>12.1f}"
                f"{self.compute_s * self.accumulation * 1e3:>14.1f}  {start} micro-batches of {self.micro_batch}, "
                f"or one of {row.break_even_images}"
            )
        return "\n".join([*lines, "", *self._notes()])

    def _notes(self) -> list[str]:
        saved, peak, flops = self.footprint.saved, self.footprint.peak, self.footprint.flops
        return [
            "* what the config asks for. Total: the most at once, with either the activations or the update's copies of gradients.",
            f"activations, counted: {saved.slope / GIB:.3f} GiB an image + {saved.base / GIB:.3f} kept for backward, "
            f"{peak.slope / GIB:.3f} an image + {peak.base / GIB:.3f} at the peak; {flops.slope / 1e12:.3f} TFLOP an image",
            f"usable memory: {self.usable / GIB:.1f} GiB, an estimate ({RESERVE / GIB} GiB for CUDA and NCCL, "
            f"{FRAGMENTED:.0%} fragmentation taken off)",
            f"computing: an estimate at {ACHIEVED:.0%} of the peak FLOP/s; sending: a ring at {self.bandwidth / 1e9:.0f} GB/s, "
            "the slowest link of it, nothing overlapped",
        ]


def plan(
    config: Config, gpu: str, nodes: int = 1, ranks_per_node: int = 8, network: float = 50.0
) -> Plan:
    """Plan a training.

    Args:
        config: the whole of it.
        gpu: a key of GPUS.
        network: GB/s (1e9 bytes) in one direction between nodes, all adapters of a node together.

    Raises:
        InputError: the GPU cannot run the precision, or the ranks cannot share the batch.
    """
    made, ranks = GPUS[gpu], nodes * ranks_per_node
    if min(nodes, ranks_per_node) < 1 or network <= 0:
        raise InputError("--nodes and --ranks-per-node must be at least 1, --network more than 0")
    if config.precision == "bf16" and not made.bf16:
        raise InputError(f"--gpu {gpu} has no bfloat16: set precision=fp16")
    accumulation, micro_batch = micro_batches(
        config.train.global_batch, config.train.max_micro_batch, ranks
    )
    model = _model(config)
    sizes, cost = measure_sizes(model, config), footprint(model, config)
    usable = made.memory * (1 - FRAGMENTED) - RESERVE
    compute_s = cost.flops.at(micro_batch) / (
        ACHIEVED * (made.single if config.precision == "fp32" else made.half)
    )
    bandwidth = made.link if nodes == 1 else min(made.link, 1e9 * network)
    rows = tuple(
        _row(way, config, sizes, cost, ranks, accumulation, usable, bandwidth, compute_s)
        for way in WAYS
    )
    return Plan(
        gpu,
        nodes,
        ranks,
        strategy_of(config).name,
        micro_batch,
        accumulation,
        sizes,
        cost,
        usable,
        bandwidth,
        compute_s,
        rows,
    )


def strategy_of(config: Config) -> Strategy:
    """The way that a config names."""
    engine = config.engine
    if isinstance(engine, DdpEngine):
        return WAYS[0]
    return next(way for way in WAYS if way.stage == engine.stage and way.offload == engine.offload)


def measure_sizes(model: nn.Module, config: Config) -> Sizes:
    """Numbers of a model whose parameters are whole, on any device."""
    trainable = [p.numel() for p in model.parameters() if p.requires_grad]
    groups = [
        sum(p.numel() for p in group["params"]) for group in parameter_groups(model, config.optim)
    ]
    return Sizes(
        sum(trainable),
        sum(p.numel() for p in model.parameters()) - sum(trainable),
        max(trainable),
        max(groups),
    )


def largest_micro_batch(memory: Memory, cost: Footprint, usable: float) -> int:
    """Images of the largest micro-batch that fits beside `memory`; 0 where none does."""
    if memory.total > usable:
        return 0
    held = memory.total - max(memory.gradients, memory.update) + memory.gradients
    return max(0, math.floor((usable - held - cost.peak.base) / cost.peak.slope))


def break_even(wire: CommVolume, bandwidth: float, compute_s: float) -> int | None:
    """The fewest micro-batches a step for which `wire` takes no longer than computing; None where no number is enough."""
    gain = compute_s - wire.each / bandwidth
    if gain <= 0:
        return 1 if wire.of(1) == 0 else None
    return max(1, math.ceil(wire.once / bandwidth / gain))


def _row(
    way: Strategy,
    config: Config,
    sizes: Sizes,
    cost: Footprint,
    ranks: int,
    accumulation: int,
    usable: float,
    bandwidth: float,
    compute_s: float,
) -> PlanRow:
    micro_batch = config.train.global_batch // ranks // accumulation
    options = {"ema": config.train.ema is not None, "bucket_mb": config.engine.bucket_mb}
    state = memory_of(way, sizes, ranks, accumulates=accumulation > 1, **options)
    memory = Memory(**{**vars(state), "activations": cost.peak.at(micro_batch)})
    largest = largest_micro_batch(
        memory_of(way, sizes, ranks, accumulates=True, **options), cost, usable
    )
    wire = comm_volume_of(way, sizes, ranks)
    image_s = compute_s / micro_batch
    return PlanRow(
        way.name,
        memory,
        memory.total <= usable,
        largest,
        wire.of(accumulation),
        wire.of(accumulation) / bandwidth,
        break_even(wire, bandwidth, compute_s),
        max(1, math.ceil(wire.of(1) / bandwidth / image_s)),
    )


def _model(config: Config) -> nn.Module:
    vocabulary = vocabulary_of(config.model.text)
    with torch.device("meta"):
        return build_model(config.model, vocabulary, config.data.image_size).train()
