"""Plan a training before you rent a GPU: memory by engine, bytes sent, micro-batch, accumulation.

docs/operations.md, "Plan", has the formulas; tests/cluster/test_memory.py compares them with what
ranks really hold and send. A number takes 4 bytes, because weights, gradients and their exchange
are fp32 in every engine (engine/base.py).

Legend: P trainable parameters, F frozen parameters, N ranks, a micro-batches per step,
r = (N - 1) / N.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from coupalign.config.schema import Config, DdpEngine
from coupalign.costs.footprint import Footprint, footprint
from coupalign.data.order import micro_batches
from coupalign.engine.optimizer import parameter_groups
from coupalign.errors import InputError
from coupalign.model.build import build_model
from coupalign.model.text import vocabulary_size

GIB = 2**30
BYTES = 4  # per weight, gradient or moment

# Estimates: the share of the peak FLOP/s that a step reaches; memory for the CUDA context, NCCL's
# buffers and the workspaces of cuDNN and cuBLAS; the share that the caching allocator cannot use.
ACHIEVED = 0.4
RESERVE = int(1.5 * GIB)
FRAGMENTED = 0.05

# DeepSpeed's numbers: MEMORY_OPT_ALLREDUCE_SIZE of deepspeed/runtime/engine.py, which no setting
# changes, and the defaults of stage3_max_live_parameters and stage3_max_reuse_distance.
STAGE0_BUCKET = 500_000_000
GATHERED = 1_000_000_000


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU, by its vendor's data sheet.

    Attributes:
        memory: bytes, as nvidia-smi shows them.
        half: FLOP/s of dense float16 products on tensor cores, with float32 accumulation.
        single: FLOP/s of float32 outside tensor cores.
        link: bytes/s in one direction between GPUs of a node: half of NVLink's sum, or PCIe.
    """

    memory: int
    half: float
    single: float
    link: float
    bf16: bool = True


# NVIDIA's data sheets: A100 (2021), H100 and H200 (SXM, 2024), V100 (SXM2, 2020). The RTX cards are
# from the white papers of the Ada and GA102 architectures; they communicate over PCIe 4.0 x16.
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
    """A way to spread the state of training over ranks.

    Attributes:
        stage: of ZeRO; None is DDP.
        offload: whether optimizer state and update are on the host.
    """

    name: str
    stage: int | None
    offload: bool = False


STRATEGIES = (
    Strategy("ddp", None),
    *(Strategy(f"zero{stage}", stage) for stage in range(4)),
    *(Strategy(f"zero{stage}+offload", stage, offload=True) for stage in (1, 2, 3)),
)


@dataclass(frozen=True)
class Sizes:
    """Parameter counts of a model.

    Attributes:
        trainable: P.
        frozen: F.
        largest: of its largest trainable parameter.
        largest_group: of the optimizer's largest parameter group.
    """

    trainable: int
    frozen: int
    largest: int
    largest_group: int


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank.

    `gradients` and `activations` exist together; `update` replaces them afterwards.

    Attributes:
        gradients: when the last backward pass ends.
        master: DeepSpeed's second copy of the weights, which the optimizer changes.
        update: gradients and their copies during the exchange and the update.
        host: of the host's memory, for this rank.
    """

    weights: float
    gradients: float
    master: float = 0.0
    moments: float = 0.0
    ema: float = 0.0
    buckets: float = 0.0
    update: float = 0.0
    host: float = 0.0
    activations: float = 0.0

    @property
    def total(self) -> float:
        """Peak on the GPU."""
        always = self.weights + self.master + self.moments + self.ema + self.buckets
        return always + max(self.gradients + self.activations, self.update)


def memory_of(
    strategy: Strategy,
    sizes: Sizes,
    ranks: int,
    *,
    ema: bool,
    bucket_mb: int,
    accumulates: bool,
) -> Memory:
    """Compute the state of training on one rank, without activations: docs/operations.md, "Plan".

    Args:
        accumulates: whether a step has more than one micro-batch.
    """
    whole = BYTES * sizes.trainable
    share = BYTES * sizes.trainable / ranks
    all_weights = BYTES * (sizes.trainable + sizes.frozen)
    largest = BYTES * sizes.largest
    group = BYTES * sizes.largest_group / ranks

    # A gradient larger than a bucket travels alone, and what travels is a copy.
    bucket = 1e6 * bucket_mb
    staged = max(bucket, largest)

    average = 0.0
    if ema:
        average = share if strategy.stage == 3 else whole

    # At stages 1 and 2, a parameter that the boundary between two ranks cuts is kept whole.
    kept = share + largest

    match strategy.stage:
        case None:
            # Gradients are views of DDP's buckets, but under no_sync they accumulate separately;
            # one of them is on its way into its bucket.
            copies = (whole * accumulates + largest) if ranks > 1 else 0
            return Memory(
                weights=all_weights,
                gradients=whole,
                moments=2 * whole,
                ema=average,
                buckets=copies,
                update=whole,
            )
        case 0:
            return Memory(
                weights=all_weights,
                gradients=whole,
                moments=2 * whole,
                ema=average,
                update=whole + BYTES * min(sizes.trainable, STAGE0_BUCKET),
            )
        case 1:
            weights = all_weights
            gradients, update = whole, whole + kept
            buckets = bucket + staged
        case 2:
            # With more than one micro-batch: the sum so far and that of the newest.
            weights = all_weights
            gradients, update = kept * (1 + accumulates), kept + group
            buckets = bucket + 3 * staged
        case _:
            gathered = BYTES * min(sizes.trainable + sizes.frozen, GATHERED)
            weights = all_weights / ranks + gathered
            gradients, update = share, share + group
            buckets = bucket + 2 * staged

    if not strategy.offload:
        return Memory(
            weights=weights,
            gradients=gradients,
            master=share,
            moments=2 * share,
            ema=average,
            buckets=buckets,
            update=update,
        )

    # The gradients of a share move to the host as they arrive. The host holds the master copy, two
    # moments and the gradient, and the weights on their way back (at stage 3 the sums instead,
    # which stage 2 adds if it accumulates).
    left = whole if strategy.stage == 1 else 0.0
    on_host = 6 if strategy.stage == 2 and accumulates else 5
    return Memory(
        weights=weights,
        gradients=left,
        ema=average,
        buckets=buckets,
        update=left,
        host=share * on_host,
    )


@dataclass(frozen=True)
class CommVolume:
    """Bytes that one rank sends: `once` per step, and `each` per micro-batch."""

    once: float
    each: float

    def per_step(self, micro_batches: int) -> float:
        """Return the bytes of a step of so many micro-batches."""
        return self.once + micro_batches * self.each


def comm_volume_of(strategy: Strategy, sizes: Sizes, ranks: int) -> CommVolume:
    """Compute the bytes sent, by a ring's cost.

    An all-reduce of n bytes sends 2 r n. An all-gather to, or a reduce-scatter from, n bytes sends
    r n."""
    ring = BYTES * (ranks - 1) / ranks
    trainable = ring * sizes.trainable
    every = ring * (sizes.trainable + sizes.frozen)

    match strategy.stage:
        case None | 0:
            # no_sync; DeepSpeed reduces at the boundary of accumulation.
            return CommVolume(once=2 * trainable, each=0)
        case 1:
            # use_multi_rank_bucket_allreduce: an all-reduce, not a reduce-scatter.
            return CommVolume(once=2 * trainable + trainable, each=0)
        case 2:
            # Every backward pass reduces its gradients; the update gathers weights.
            return CommVolume(once=trainable, each=2 * trainable)
        case _:
            # Gathered weights are kept from forward to backward if they fit, else gathered again.
            gathers = 1 if sizes.trainable + sizes.frozen <= GATHERED else 2
            return CommVolume(once=0, each=gathers * every + trainable)


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """One strategy in numbers, for the config's micro-batch.

    Attributes:
        largest_micro_batch: images; 0 if not even one fits.
        sent: bytes that a rank sends in a step of the config.
        break_even: micro-batches of the config's size from which sending takes less time than
            computing. None: never.
        break_even_images: the same as images of a single micro-batch.
    """

    strategy: str
    memory: Memory
    fits: bool
    largest_micro_batch: int
    sent: float
    sending_s: float
    break_even: int | None
    break_even_images: int

    def to_json(self) -> dict[str, Any]:
        """Convert to bytes and seconds under the names of `--json`."""
        return {
            "way": self.strategy,
            "memory": {**asdict(self.memory), "total": self.memory.total},
            "fits": self.fits,
            "largest_micro_batch": self.largest_micro_batch,
            "wire": self.sent,
            "wire_s": self.sending_s,
            "break_even": self.break_even,
            "break_even_images": self.break_even_images,
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that was computed, and from what.

    Attributes:
        engine: the strategy that the config names.
        usable: bytes of the GPU's memory.
        bandwidth: bytes/s of the ring, which is that of its slowest link.
        compute_s: estimate for one micro-batch.
    """

    gpu: str
    nodes: int
    ranks: int
    engine: str
    micro_batch: int
    accumulation: int
    sizes: Sizes
    footprint: Footprint
    usable: float
    bandwidth: float
    compute_s: float
    rows: tuple[PlanRow, ...]

    def to_json(self) -> dict[str, Any]:
        """Convert to bytes and seconds that JSON can hold."""
        return {
            **vars(self),
            "sizes": asdict(self.sizes),
            "footprint": {name: line._asdict() for name, line in vars(self.footprint).items()},
            "rows": [row.to_json() for row in self.rows],
        }

    def table(self) -> str:
        """Format for a terminal."""
        sizes = self.sizes
        head = (
            f"{sizes.trainable:,} trainable and {sizes.frozen:,} frozen parameters; "
            f"{self.ranks} ranks on {self.nodes} nodes of {self.gpu}; "
            f"micro-batches of {self.micro_batch}, {self.accumulation} per step and rank"
        )
        sections = [head, self._memory_table(), self._time_table(), "\n".join(self._notes())]
        return "\n\n".join(sections)

    def _memory_table(self) -> str:
        parts = ("weights", "gradients", "master", "moments", "ema", "buckets", "activations")
        columns = (*parts, "total", "host")
        rows = []
        for row in self.rows:
            numbers = {**vars(row.memory), "total": row.memory.total}
            gigabytes = [f"{numbers[column] / GIB:.2f}" for column in columns]
            fits = "yes" if row.fits else "NO"
            rows.append([self._marked(row), *gigabytes, fits, str(row.largest_micro_batch)])

        return _plain_table(["GiB per rank", *columns, "fits", "largest micro-batch"], rows)

    def _time_table(self) -> str:
        computing_ms = self.compute_s * self.accumulation * 1e3
        rows = []
        for row in self.rows:
            first = "never with" if row.break_even is None else str(row.break_even)
            condition = (
                f"{first} micro-batches of {self.micro_batch}, or one of {row.break_even_images}"
            )
            times = [f"{row.sending_s * 1e3:.1f}", f"{computing_ms:.1f}"]
            rows.append([self._marked(row), f"{row.sent / 1e9:.2f}", *times, condition])

        header = ["per step", "GB sent", "sending ms", "computing ms"]
        return _plain_table([*header, "computing takes longer from"], rows)

    def _marked(self, row: PlanRow) -> str:
        return f"{row.strategy} *" if row.strategy == self.engine else row.strategy

    def _notes(self) -> list[str]:
        saved, peak, flops = self.footprint.saved, self.footprint.peak, self.footprint.flops
        return [
            "* what the config asks for. Total: the peak, with either the activations or the "
            "update's copies of gradients.",
            f"activations, counted: {saved.slope / GIB:.3f} GiB per image + "
            f"{saved.base / GIB:.3f} kept for backward, {peak.slope / GIB:.3f} per image + "
            f"{peak.base / GIB:.3f} at the peak; {flops.slope / 1e12:.3f} TFLOP per image",
            f"usable memory: {self.usable / GIB:.1f} GiB, an estimate ({RESERVE / GIB} GiB for "
            f"CUDA and NCCL, {FRAGMENTED:.0%} fragmentation taken off)",
            f"computing: an estimate at {ACHIEVED:.0%} of the peak FLOP/s; sending: a ring at "
            f"{self.bandwidth / 1e9:.0f} GB/s, its slowest link, nothing overlapped",
        ]


def _plain_table(header: list[str], rows: list[list[str]]) -> str:
    numbers = ["right"] * (len(header) - 2)
    last = "left" if header[-1].startswith("computing") else "right"
    return tabulate(
        rows,
        header,
        tablefmt="plain",
        disable_numparse=True,
        colalign=("left", *numbers, last),
    )


def plan(
    config: Config, gpu: str, nodes: int = 1, ranks_per_node: int = 8, network: float = 50.0
) -> Plan:
    """Plan a training.

    Args:
        config: the whole configuration.
        gpu: a key of GPUS.
        network: GB/s (1e9 bytes) in one direction between nodes, all adapters of a node together.

    Raises:
        InputError: the GPU cannot run the precision, or the ranks cannot share the batch.
    """
    device = GPUS[gpu]
    if min(nodes, ranks_per_node) < 1 or network <= 0:
        raise InputError("--nodes and --ranks-per-node must be at least 1, --network more than 0")
    if config.precision == "bf16" and not device.bf16:
        raise InputError(f"--gpu {gpu} has no bfloat16: set precision=fp16")

    ranks = nodes * ranks_per_node
    accumulation, micro_batch = micro_batches(
        config.train.global_batch, config.train.max_micro_batch, ranks
    )

    model = _build_on_meta(config)
    sizes = measure_sizes(model, config)
    cost = footprint(model, config)

    flop_per_s = device.single if config.precision == "fp32" else device.half
    job = _Job(
        config=config,
        ranks=ranks,
        micro_batch=micro_batch,
        accumulation=accumulation,
        sizes=sizes,
        cost=cost,
        usable=device.memory * (1 - FRAGMENTED) - RESERVE,
        bandwidth=device.link if nodes == 1 else min(device.link, 1e9 * network),
        compute_s=cost.flops.at(micro_batch) / (ACHIEVED * flop_per_s),
    )
    return Plan(
        gpu=gpu,
        nodes=nodes,
        ranks=ranks,
        engine=strategy_of(config).name,
        micro_batch=micro_batch,
        accumulation=accumulation,
        sizes=sizes,
        footprint=cost,
        usable=job.usable,
        bandwidth=job.bandwidth,
        compute_s=job.compute_s,
        rows=tuple(_plan_row(strategy, job) for strategy in STRATEGIES),
    )


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What all strategies of a plan have in common."""

    config: Config
    ranks: int
    micro_batch: int
    accumulation: int
    sizes: Sizes
    cost: Footprint
    usable: float
    bandwidth: float
    compute_s: float


def _plan_row(strategy: Strategy, job: _Job) -> PlanRow:
    options = {"ema": job.config.train.ema is not None, "bucket_mb": job.config.engine.bucket_mb}

    # As configured, and with accumulation, which the largest micro-batch must leave room for.
    state = memory_of(strategy, job.sizes, job.ranks, accumulates=job.accumulation > 1, **options)
    memory = replace(state, activations=job.cost.peak.at(job.micro_batch))
    accumulating = memory_of(strategy, job.sizes, job.ranks, accumulates=True, **options)

    volume = comm_volume_of(strategy, job.sizes, job.ranks)
    sent = volume.per_step(job.accumulation)
    image_s = job.compute_s / job.micro_batch
    return PlanRow(
        strategy=strategy.name,
        memory=memory,
        fits=memory.total <= job.usable,
        largest_micro_batch=largest_micro_batch(accumulating, job.cost, job.usable),
        sent=sent,
        sending_s=sent / job.bandwidth,
        break_even=break_even(volume, job.bandwidth, job.compute_s),
        break_even_images=max(1, math.ceil(volume.per_step(1) / job.bandwidth / image_s)),
    )


def strategy_of(config: Config) -> Strategy:
    """Find the strategy that a config names."""
    match config.engine:
        case DdpEngine():
            return STRATEGIES[0]
        case engine:
            wanted = (engine.stage, engine.offload)
            return next(s for s in STRATEGIES if (s.stage, s.offload) == wanted)


def measure_sizes(model: nn.Module, config: Config) -> Sizes:
    """Count the parameters of a model, which must be whole, on any device."""
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]

    groups = []
    for group in parameter_groups(model, config.optim):
        groups.append(sum(parameter.numel() for parameter in group["params"]))

    return Sizes(
        trainable=sum(trainable),
        frozen=total - sum(trainable),
        largest=max(trainable),
        largest_group=max(groups),
    )


def largest_micro_batch(memory: Memory, cost: Footprint, usable: float) -> int:
    """Find the images of the largest micro-batch that fits next to `memory`; 0 if none does."""
    if memory.total > usable:
        return 0
    held = memory.total - max(memory.gradients, memory.update) + memory.gradients
    return max(0, math.floor((usable - held - cost.peak.base) / cost.peak.slope))


def break_even(volume: CommVolume, bandwidth: float, compute_s: float) -> int | None:
    """Find the fewest micro-batches per step for which sending takes no longer than computing.

    Returns None if no number is enough.
    """
    gain = compute_s - volume.each / bandwidth
    if gain <= 0:
        return 1 if volume.per_step(1) == 0 else None
    return max(1, math.ceil(volume.once / bandwidth / gain))


def _build_on_meta(config: Config) -> nn.Module:
    vocabulary = vocabulary_size(config.model.text)
    with torch.device("meta"):
        return build_model(config.model, vocabulary, config.data.image_size).train()
