"""What the distributed tests run on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from coupalign.config.load import override
from coupalign.config.schema import Config
from coupalign.data.batch import Batch
from coupalign.distributed.world import World, wait_for_all
from coupalign.engine.base import Engine, seed_step
from coupalign.engine.build import build_engine
from coupalign.engine.optimizer import build_optimizer
from coupalign.engine.optimizer_state import make_universal, open_optimizer_state
from coupalign.errors import InputError
from coupalign.model.build import build_model
from coupalign.model.weights.load import write_weights
from tests.hostile import RunsCode

SIZE, TOKENS, VOCABULARY = 64, 8, 40

TINY = [
    "precision=fp32",
    "model.image.kind=small",
    "model.image.widths=[8, 16, 16, 24]",
    "model.text.kind=small",
    "model.text.width=16",
    "model.decoder.width=16",
    "model.proposals.count=4",
    "model.proposals.layers=1",
    "model.proposals.heads=2",
    "model.proposals.ffn=32",
    "optim.lr=1e-3",
    "optim.lr_image=1e-3",
    "optim.lr_text=5e-4",
    "optim.clip_norm=0.5",
    "train.global_batch=8",
    "train.max_micro_batch=2",
    "train.ema.decay=0.9",
    "optim.eps=1e-5",
    f"data.image_size={SIZE}",
    f"data.max_tokens={TOKENS}",
]

Numbers = list[tuple[float, float]]
"""(loss, gradient norm) of each step."""


def tiny(*changes: str) -> Config:
    """A configuration small enough for a test, with accumulation, clipping and a moving average."""
    return override(Config(), [*TINY, *changes])


def engine_configs(*kinds: str) -> list[Config]:
    """Configurations of engines: "ddp", "zero0" … "zero3", "zero1 offload" …"""
    return [_engine_config(kind) for kind in kinds]


def _engine_config(kind: str) -> Config:
    if kind == "ddp":
        return tiny()
    stage, offload = kind[len("zero")], "offload" in kind
    return tiny("engine.kind=deepspeed", f"engine.stage={stage}", f"engine.offload={offload}")


def make_engine(config: Config, world: World) -> Engine:
    torch.manual_seed(config.seed)
    model = build_model(config.model, VOCABULARY, SIZE).to(world.device)
    return build_engine(model, build_optimizer(model, config.optim), config, world)


def make_differently_seeded_engine(config: Config, world: World) -> Engine:
    """An engine whose random start differs, so that a load must replace all of it."""
    return make_engine(config.model_copy(update={"seed": config.seed + 1}), world)


def micro_batches(step: int, world: World, config: Config) -> list[Batch]:
    """This rank's share of a step's random global batch, cut into micro-batches."""
    total = config.train.global_batch
    generator = torch.Generator().manual_seed(100 + step)
    image = torch.randint(0, 256, (total, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    words = torch.randint(5, VOCABULARY, (total, TOKENS), generator=generator)
    lengths = torch.randint(3, TOKENS + 1, (total, 1), generator=generator)
    word_mask = torch.arange(TOKENS)[None] < lengths
    target = image[:, 0] > 128 + 8 * (words[:, :1, None] % 3)

    share = total // world.size
    size = min(config.train.max_micro_batch or total, share)
    batches = []
    for start in range(world.rank * share, (world.rank + 1) * share, size):
        samples = slice(start, start + size)
        batch = Batch(
            image=image[samples],
            words=words[samples],
            word_mask=word_mask[samples],
            target=target[samples],
            info=(),
        )
        batches.append(batch.to(world.device))
    return batches


def train_steps(engine: Engine, config: Config, world: World, steps: range) -> Numbers:
    numbers = []
    for step in steps:
        seed_step(config.seed, step, world.rank)
        stats = engine.train_step(micro_batches(step, world, config), 1.0 - step / 100)
        numbers.append((stats.losses["loss"], stats.grad_norm))
    return numbers


def train_each(world: World, configs: Sequence[Config], steps: int) -> list[dict[str, Any]]:
    """Train every engine in turn.

    Returns:
        for each, "numbers" of `steps` + 2 steps; "weights", their average "ema" and the "logits" of
        the average after `steps` steps.
    """
    results = []
    for config in configs:
        engine = make_engine(config, world)
        numbers = train_steps(engine, config, world, range(steps))

        probe = micro_batches(999, World(0, 1, 0, 1, world.device), config)[0]
        with engine.averaged():
            logits = engine.infer(probe)

        # These steps show that the average was taken out again.
        numbers += train_steps(engine, config, world, range(steps, steps + 2))
        results.append(
            {
                "numbers": numbers,
                "weights": engine.export(),
                "ema": engine.export(averaged=True),
                "logits": logits.cpu(),
            }
        )
    return results


def train_with_restart(
    world: World, configs: Sequence[Config], folder: Path, before: int, steps: int
) -> list[Numbers]:
    """Train every engine `before` steps, save, build a new one, load, train up to `steps`."""
    results = []
    for index, config in enumerate(configs):
        checkpoint = folder / str(index)
        numbers, counters = train_and_save(world, config, checkpoint, before)
        restarted = make_differently_seeded_engine(config, world)
        restarted.load(checkpoint, counters)
        results.append(numbers + train_steps(restarted, config, world, range(before, steps)))
    return results


def train_and_save(
    world: World, config: Config, checkpoint: Path, steps: int
) -> tuple[Numbers, dict[str, float]]:
    """Train and save into a new folder; returns the numbers and the engine's counters."""
    engine = make_engine(config, world)
    numbers = train_steps(engine, config, world, range(steps))

    weights, averages = engine.export(), engine.export(averaged=True)
    if world.is_main:
        checkpoint.mkdir()
        write_weights(checkpoint / "weights.safetensors", weights)
        write_weights(checkpoint / "ema.safetensors", averages)
    wait_for_all(world)
    engine.save(checkpoint)
    wait_for_all(world)
    return numbers, engine.counters()


def train_and_save_each(
    world: World, configs: Sequence[Config], folder: Path, steps: int
) -> list[dict[str, float]]:
    """`train_and_save` for each configuration, in folders 0, 1, …; returns the counters."""
    all_counters = []
    for index, config in enumerate(configs):
        _, counters = train_and_save(world, config, folder / str(index), steps)
        all_counters.append(counters)
    return all_counters


def adopt_each(
    world: World,
    moves: Sequence[tuple[int, Config]],
    folder: Path,
    counters: Sequence[dict[str, float]],
    steps: range,
) -> list[dict[str, Any]]:
    """Let engines adopt checkpoints of other engines, and train on.

    Args:
        moves: each is the number of a checkpoint of `train_and_save_each` and who adopts it.

    Returns:
        for each, "numbers" of the steps, and "weights" and "ema" after them.
    """
    if world.is_main:
        for index in range(len(counters)):
            make_universal(folder / str(index), print)
    wait_for_all(world)

    results = []
    for index, config in moves:
        checkpoint = folder / str(index)
        engine = make_differently_seeded_engine(config, world)
        engine.adopt(checkpoint, open_optimizer_state(checkpoint), counters[index])
        numbers = train_steps(engine, config, world, steps)
        results.append(
            {"numbers": numbers, "weights": engine.export(), "ema": engine.export(averaged=True)}
        )
    return results


def load_hostile_shares(
    world: World, configs: Sequence[Config], folder: Path, marker: Path
) -> list[str]:
    """Load and convert shares of which one file would run code; returns the errors' texts."""
    errors = []
    for index, config in enumerate(configs):
        checkpoint = folder / str(index)
        _, counters = train_and_save(world, config, checkpoint, 1)
        engine = make_engine(config, world)

        for kind in ("model", "optim"):
            [file] = (checkpoint / "deepspeed").glob(f"*{kind}_states.pt")
            whole = file.read_bytes()
            state = torch.load(file, weights_only=False)
            torch.save({**state, "note": RunsCode(marker)}, file)

            loads = (
                partial(engine.load, checkpoint, counters),
                partial(make_universal, checkpoint, print),
            )
            for load in loads:
                try:
                    load()
                except InputError as error:
                    errors.append(str(error))
            file.write_bytes(whole)
    return errors


def follow_loss_scale(
    world: World, configs: Sequence[Config], scales: Sequence[float]
) -> list[list[float]]:
    """For each engine, take a step at each loss scale; returns the scales that DeepSpeed used."""
    used = []
    for config in configs:
        engine = make_engine(config, world)
        used.append([])
        for step, scale in enumerate(scales):
            engine.loss_scale.scale = scale
            train_steps(engine, config, world, range(step, step + 1))
            used[-1].append(engine.engine.optimizer.loss_scale)
    return used


def train_poisoned(world: World, configs: Sequence[Config]) -> list[dict[str, Any]]:
    """For each engine: a good step, one with a NaN in the last rank's loss, a good step."""
    results = []
    for config in configs:
        engine = make_engine(config, world)
        train_steps(engine, config, world, range(1))
        before = engine.export()

        is_poisoned = world.rank == world.size - 1
        hook = engine.model.register_forward_hook(_poison) if is_poisoned else None
        stats = engine.train_step(micro_batches(1, world, config), 1.0)
        if hook:
            hook.remove()
        after = engine.export()

        numbers = train_steps(engine, config, world, range(2, 3))
        results.append(
            {
                "stats": stats,
                "before": before,
                "after": after,
                "numbers": numbers,
                "later": engine.export(),
            }
        )
    return results


def stop_while_averaged(world: World, configs: Sequence[Config]) -> list[dict[str, Any]]:
    """Stop in the middle of an evaluation, for every engine; the weights before and after."""
    results = []
    for config in configs:
        engine = make_engine(config, world)
        train_steps(engine, config, world, range(3))
        before = engine.export()

        probe = micro_batches(999, World(0, 1, 0, 1, world.device), config)[0]
        with suppress(StopIteration), engine.averaged():
            engine.infer(probe)
            raise StopIteration

        results.append({"before": before, "after": engine.export()})
    return results


def _poison(
    module: torch.nn.Module, inputs: Any, losses: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    return {**losses, "loss": losses["loss"] * float("nan")}
