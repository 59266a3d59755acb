"""What the distributed tests run on every rank."""

from __future__ import annotations

from collections.abc import Sequence
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
from coupalign.model.build import build_model
from coupalign.model.weights.load import write_weights

SIZE, WORDS, VOCABULARY = 64, 8, 40

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
    f"data.max_tokens={WORDS}",
]


def tiny(*changes: str) -> Config:
    """A configuration small enough for a test: accumulation, clipping and a moving average are on."""
    return override(Config(), [*TINY, *changes])


def engines(*kinds: str) -> list[Config]:
    """ "ddp", "zero0" … "zero3", "zero1 offload" … -> their configurations."""
    return [
        tiny()
        if kind == "ddp"
        else tiny(
            "engine.kind=deepspeed",
            f"engine.stage={kind[4]}",
            f"engine.offload={'offload' in kind}",
        )
        for kind in kinds
    ]


def make_engine(config: Config, world: World) -> Engine:
    torch.manual_seed(config.seed)
    model = build_model(config.model, VOCABULARY, SIZE).to(world.device)
    return build_engine(model, build_optimizer(model, config.optim), config, world)


def micro_batches(step: int, world: World, config: Config) -> list[Batch]:
    """This rank's share of a step's random global batch, cut into micro-batches."""
    generator = torch.Generator().manual_seed(100 + step)
    total, cut = (
        config.train.global_batch,
        config.train.max_micro_batch or config.train.global_batch,
    )
    image = torch.randint(0, 256, (total, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    words = torch.randint(5, VOCABULARY, (total, WORDS), generator=generator)
    mask = torch.arange(WORDS)[None] < torch.randint(3, WORDS + 1, (total, 1), generator=generator)
    target = image[:, 0] > 128 + 8 * (words[:, :1, None] % 3)
    share = total // world.size
    cut = min(cut, share)
    starts = range(world.rank * share, (world.rank + 1) * share, cut)
    batches = [
        Batch(
            image=image[at : at + cut],
            words=words[at : at + cut],
            word_mask=mask[at : at + cut],
            target=target[at : at + cut],
            info=(),
        )
        for at in starts
    ]
    return [batch.to(world.device) for batch in batches]


def steps(engine: Engine, config: Config, world: World, span: range) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    numbers = []
    for step in span:
        seed_step(config.seed, step, world.rank)
        stats = engine.train_step(micro_batches(step, world, config), 1.0 - step / 100)
        numbers.append((stats.losses["loss"], stats.grad_norm))
    return numbers


def curves(world: World, configs: Sequence[Config], count: int) -> list[dict[str, Any]]:
    """For each engine in turn: its loss curve, the weights and their average after `count` steps, and logits of the average."""
    results = []
    for config in configs:
        engine = make_engine(config, world)
        numbers = steps(engine, config, world, range(count))
        probe = micro_batches(999, World(0, 1, 0, 1, world.device), config)[0]
        with engine.averaged():
            logits = engine.infer(probe)
        numbers += steps(
            engine, config, world, range(count, count + 2)
        )  # the average was taken out again
        results.append(
            {
                "numbers": numbers,
                "weights": engine.export(),
                "ema": engine.export(averaged=True),
                "logits": logits.cpu(),
            }
        )
    return results


def interrupted(
    world: World, configs: Sequence[Config], folder: Path, first: int, count: int
) -> list[list[tuple[float, float]]]:
    """Loss and norm of each step, for each engine: train `first` steps, save, build everything anew, load, train up to `count`."""
    results = []
    for place, config in enumerate(configs):
        numbers, counters = begun(world, config, folder / str(place), first)
        again = make_engine(
            config.model_copy(update={"seed": config.seed + 1}), world
        )  # another random start
        again.load(folder / str(place), counters)
        results.append(numbers + steps(again, config, world, range(first, count)))
    return results


def begun(
    world: World, config: Config, folder: Path, first: int
) -> tuple[list[tuple[float, float]], dict[str, float]]:
    """Train `first` steps and save into a new folder: loss and norm of each step, and the engine's counters."""
    engine = make_engine(config, world)
    numbers = steps(engine, config, world, range(first))
    weights, averages = engine.export(), engine.export(averaged=True)
    if world.is_main:
        folder.mkdir()
        write_weights(folder / "weights.safetensors", weights)
        write_weights(folder / "ema.safetensors", averages)
    wait_for_all(world)
    engine.save(folder)
    wait_for_all(world)
    return numbers, engine.counters()


def begin_all(
    world: World, configs: Sequence[Config], folder: Path, first: int
) -> list[dict[str, float]]:
    """`begun` for each configuration, in folders 0, 1, …; the counters."""
    return [
        begun(world, config, folder / str(place), first)[1] for place, config in enumerate(configs)
    ]


def adopted(
    world: World,
    moves: Sequence[tuple[int, Config]],
    folder: Path,
    counters: Sequence[dict[str, float]],
    span: range,
) -> list[dict[str, Any]]:
    """Each move is a checkpoint of `begin_all` and who takes it over: loss and norm of the steps in `span`, weights after them."""
    if world.is_main:
        for place in range(len(counters)):
            make_universal(folder / str(place), print)
    wait_for_all(world)
    results = []
    for place, config in moves:
        engine = make_engine(config.model_copy(update={"seed": config.seed + 1}), world)
        engine.adopt(
            folder / str(place), open_optimizer_state(folder / str(place)), counters[place]
        )
        numbers = steps(engine, config, world, span)
        results.append(
            {"numbers": numbers, "weights": engine.export(), "ema": engine.export(averaged=True)}
        )
    return results


def poisoned(world: World, configs: Sequence[Config]) -> list[dict[str, Any]]:
    """For each engine in turn: a good step, one with a NaN in the last rank's loss, a good step."""
    results = []
    for config in configs:
        engine = make_engine(config, world)
        steps(engine, config, world, range(1))
        before = engine.export()
        hook = engine.model.register_forward_hook(_poison) if world.rank == world.size - 1 else None
        stats = engine.train_step(micro_batches(1, world, config), 1.0)
        if hook:
            hook.remove()
        after = engine.export()
        numbers = steps(engine, config, world, range(2, 3))
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


def _poison(
    module: torch.nn.Module, inputs: Any, losses: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    return {**losses, "loss": losses["loss"] * float("nan")}
