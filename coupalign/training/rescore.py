"""Scores of a finished checkpoint, alone or over the ranks of a launcher: `coupalign eval`."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from coupalign import dist
from coupalign.config.load import override
from coupalign.config.schema import Config, Source
from coupalign.data.batch import Batch
from coupalign.engine.base import DTYPES
from coupalign.engine.restore import find_checkpoint, open_checkpoint
from coupalign.errors import InputError
from coupalign.evaluation.metrics import Score
from coupalign.evaluation.pictures import keep_pictures
from coupalign.evaluation.protocols import PROTOCOLS
from coupalign.files import write_json
from coupalign.training.scoring import score_split, split_names


def rescore(path: Path, overrides: Sequence[str] = (), splits: Sequence[str] = (), index: str | None = None,
            protocol: str | None = None, language_blind: bool = False, pictures: int = 0) -> dict[str, Score]:
    """Score a checkpoint and keep scores, rows and pictures in its run directory; collective.

    Args:
        path: run directory (its best checkpoint) or a checkpoint.
        overrides: changes of the configuration that the checkpoint holds.
        splits: names of splits; none: those of the configuration.
        index: another shard directory to take the splits from.
        protocol: ris-v1, lavt, cris, all; none: the configuration's.
        language_blind: also with the sentences shuffled among the samples.
        pictures: best, median, worst and random samples to draw, of each.

    Returns:
        scores by "<split>" or, under several protocols, "<split> <protocol>"; empty on ranks other than 0.
    """
    with dist.session() as world:
        checkpoint = find_checkpoint(path)
        config, model, tokenizer = open_checkpoint(checkpoint)
        config = override(config, overrides).model_copy(update={"run_dir": _run_directory(checkpoint)})
        model = model.to(world.device).eval()

        @torch.no_grad()
        def infer(batch: Batch) -> Tensor:
            with torch.autocast(world.device.type, DTYPES[config.precision], enabled=config.precision != "fp32"):
                return model(batch.image, batch.words, batch.word_mask).float()

        scores: dict[str, Score] = {}
        protocols = list(PROTOCOLS) if protocol == "all" else [protocol or config.evaluate.protocol]
        for split, source in split_names(_sources(config, splits, index)).items():
            for place, rules in enumerate(protocols):
                first = place == 0
                evaluation = score_split(infer, config, split, source, tokenizer, world, protocol=rules,
                                         language_blind=language_blind and first, pictures=pictures if first else 0)
                if world.is_main and evaluation.score is not None:
                    scores[split if len(protocols) == 1 else f"{split} {rules}"] = evaluation.score
                    write_json(config.directory / "scores" / f"{split}-{rules}.json",
                               {"checkpoint": checkpoint.resolve().name, **evaluation.score.to_json()})
                    if pictures and first:
                        keep_pictures(config.directory / "pictures" / split, evaluation, pictures)
        if scores:
            write_json(config.directory / "score.json", {"checkpoint": checkpoint.resolve().name, "split": next(iter(scores)),
                                                         **next(iter(scores.values())).to_json()})
        return scores


def _sources(config: Config, splits: Sequence[str], index: str | None) -> list[Source]:
    known = config.data.evaluate
    if not splits and index is None:
        if not known:
            raise InputError("the configuration has no data.evaluate: name an --index and a --split")
        return list(known)
    if index is not None and not splits:
        raise InputError("--index needs a --split")
    if index is not None:
        return [Source(index=index, split=split) for split in splits]
    chosen = [source for split in splits for source in known if source.split == split]
    # A split that the run did not watch lies in the shard set that it did watch.
    base = known or config.data.train
    missing = [split for split in splits if split not in {source.split for source in known}]
    return chosen + [base[0].model_copy(update={"split": split}) for split in missing]


def _run_directory(checkpoint: Path) -> Path:
    """…/checkpoints/step-00000100 -> …; a checkpoint that lies elsewhere is its own run directory."""
    resolved = checkpoint.resolve()
    return resolved.parent.parent if resolved.parent.name == "checkpoints" else resolved
