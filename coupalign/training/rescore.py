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
from coupalign.engine.stop import StopRequest
from coupalign.errors import InputError
from coupalign.evaluation.evaluator import Evaluation
from coupalign.evaluation.metrics import Score
from coupalign.evaluation.pictures import keep_pictures
from coupalign.evaluation.protocols import PROTOCOLS
from coupalign.files import write_json
from coupalign.model.coupalign import CoupAlign
from coupalign.tracking import open_tracker
from coupalign.training.scoring import Infer, score_split, split_names


def rescore(path: Path, overrides: Sequence[str] = (), splits: Sequence[str] = (), index: str | None = None,
            protocol: str | None = None, language_blind: bool = False, pictures: int = 0,
            stop: StopRequest | None = None) -> dict[str, Score]:
    """Score a checkpoint and keep scores, rows and pictures in its run directory; collective.

    Args:
        path: run directory (its best checkpoint) or a checkpoint.
        overrides: changes of the configuration that the checkpoint holds.
        splits: names of splits; none: those of the configuration.
        index: another shard directory to take the splits from.
        protocol: ris-v1, lavt, cris, all; none: the configuration's.
        language_blind: also with the sentences shuffled among the samples.
        pictures: best, median, worst and random samples to draw, of each.
        stop: ends the scoring early, on any rank.

    Returns:
        scores by "<split>" or, under several protocols, "<split> <protocol>"; empty on ranks other than 0.

    Raises:
        Stopped: on every rank, where `stop` was asked for.
    """
    with dist.session() as world:
        checkpoint = find_checkpoint(path)
        config, model, tokenizer = open_checkpoint(checkpoint, world.device)
        config = override(config, overrides).model_copy(update={"run_dir": _run_directory(checkpoint)})
        infer = _inference(model.eval(), config.precision)
        scores: dict[str, Score] = {}
        protocols = list(PROTOCOLS) if protocol == "all" else [protocol or config.evaluate.protocol]
        for split, source in split_names(_sources(config, splits, index)).items():
            for rules in protocols:
                first = rules == protocols[0]
                evaluation = score_split(infer, config, split, source, tokenizer, world, protocol=rules,
                                         language_blind=language_blind and first, pictures=pictures if first else 0,
                                         stopped=lambda: dist.any_rank(stop is not None and stop.name is not None, world))
                if evaluation.score is not None:
                    scores[split if len(protocols) == 1 else f"{split} {rules}"] = evaluation.score
                    _keep(config.directory, checkpoint, split, evaluation, pictures if first else 0)
        if scores:
            name, score = next(iter(scores.items()))
            write_json(config.directory / "score.json", {"checkpoint": checkpoint.resolve().name, "split": name, **score.to_json()})
            publish_scores(config)
        return scores


def publish_scores(config: Config) -> None:
    """Show the scores, rows, pictures and page of a tracked run in its MLflow run; rank 0 only."""
    if not (config.directory / "tracking.json").is_file():
        return
    with open_tracker(config.tracking, config.directory, config.name, rank=0) as tracker:
        for name in ("score.json", "report.html"):
            if (config.directory / name).is_file():
                tracker.artifact(config.directory / name)
        for name in ("scores", "pictures"):
            if (config.directory / name).is_dir():
                tracker.artifact(config.directory / name, name)


def _inference(model: CoupAlign, precision: str) -> Infer:
    @torch.no_grad()
    def infer(batch: Batch) -> Tensor:
        with torch.autocast(batch.image.device.type, DTYPES[precision], enabled=precision != "fp32"):
            return model(batch.image, batch.words, batch.word_mask).float()
    return infer


def _keep(run: Path, checkpoint: Path, split: str, evaluation: Evaluation, pictures: int) -> None:
    assert evaluation.score is not None
    write_json(run / "scores" / f"{split}-{evaluation.score.protocol}.json",
               {"checkpoint": checkpoint.resolve().name, **evaluation.score.to_json()})
    if pictures:
        keep_pictures(run / "pictures" / split, evaluation, pictures)


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
