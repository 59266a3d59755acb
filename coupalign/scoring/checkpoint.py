"""Scores of a finished checkpoint, alone or over the ranks of a launcher: `coupalign eval`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from coupalign.config.load import override
from coupalign.config.schema import Config, Source
from coupalign.data.batch import Batch
from coupalign.data.table import RULES
from coupalign.distributed.stop import StopRequest
from coupalign.distributed.world import AgreedFlag, rank_session
from coupalign.engine.base import MixedPrecision
from coupalign.engine.open_checkpoint import find_checkpoint, open_checkpoint
from coupalign.errors import InputError
from coupalign.evaluation.metrics import Score
from coupalign.evaluation.protocols import PROTOCOLS
from coupalign.evaluation.rows import rows_path
from coupalign.files import write_json
from coupalign.model.base import ReferringModel
from coupalign.report.explanations import build_explainer
from coupalign.report.pictures import save_pictures
from coupalign.scoring.splits import Infer, score_split, split_names
from coupalign.tracking import open_tracker


def score_checkpoint(
    path: Path,
    overrides: Sequence[str] = (),
    splits: Sequence[str] = (),
    index: str | None = None,
    protocol: str | None = None,
    sentences: str = "each",
    language_blind: bool = False,
    pictures: int = 0,
    stop: StopRequest | None = None,
) -> dict[str, dict[tuple[str, str], Score]]:
    """Score a checkpoint and keep scores, rows and pictures in its run directory; collective.

    Every (image, text) goes through the model once, whatever the number of protocols and sentence rules.

    Args:
        path: run directory (its best checkpoint) or a checkpoint.
        overrides: changes of the configuration that the checkpoint holds.
        splits: names of splits; none: those of the configuration.
        index: another shard directory to take the splits from.
        protocol: ris-v1, lavt, cris, all; none: the configuration's.
        sentences: each, first, concatenated, all.
        language_blind: also with the sentences shuffled among the samples.
        pictures: best, median, worst and random samples to draw, of each; under the first protocol and rule.
        stop: ends the scoring early, on any rank.

    Returns:
        by split the scores by (protocol, sentence rule); empty on ranks other than 0.

    Raises:
        Stopped: on every rank, where `stop` was asked for.
    """
    with rank_session() as world:
        checkpoint = find_checkpoint(path)
        config, model, tokenizer = open_checkpoint(checkpoint, world.device)
        config = override(config, overrides).model_copy(
            update={"run_dir": run_directory(checkpoint)}
        )
        score = partial(
            score_split,
            _inference(model.eval(), config.precision),
            config,
            tokenizer=tokenizer,
            world=world,
            protocols=list(PROTOCOLS)
            if protocol == "all"
            else [protocol or config.evaluate.protocol],
            rules=RULES if sentences == "all" else [sentences],
            language_blind=language_blind,
            pictures=pictures,
            stopped=AgreedFlag(lambda: stop is not None and stop.name is not None, world),
        )
        scores: dict[str, dict[tuple[str, str], Score]] = {}
        for split, source in split_names(_sources(config, splits, index)).items():
            evaluations = score(name=split, source=source)
            if not world.is_main:
                continue
            scores[split] = {
                key: evaluation.score
                for key, evaluation in evaluations.items()
                if evaluation.score is not None
            }
            for one in scores[split].values():
                _keep(config.directory, checkpoint, split, one)
            if pictures:
                explain = build_explainer(model, tokenizer, config.data, device=world.device)
                save_pictures(
                    config.directory / "pictures" / split,
                    next(iter(evaluations.values())),
                    pictures,
                    explain=explain,
                )
        if scores:
            split, first = next(
                (split, score) for split, found in scores.items() for score in found.values()
            )
            write_json(
                config.directory / "score.json",
                {"checkpoint": checkpoint.resolve().name, "split": split, **first.to_json()},
            )
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


def _inference(model: ReferringModel, precision: str) -> Infer:
    net = MixedPrecision(model, precision).eval()

    @torch.no_grad()
    def infer(batch: Batch) -> Tensor:
        return net(batch.image, batch.words, batch.word_mask).float()

    return infer


def _keep(run: Path, checkpoint: Path, split: str, score: Score) -> None:
    path = rows_path(run, split, score.protocol, score.sentences).with_suffix(".json")
    write_json(path, {"checkpoint": checkpoint.resolve().name, **score.to_json()})


def _sources(config: Config, splits: Sequence[str], index: str | None) -> list[Source]:
    known = config.data.evaluate
    if not splits and index is None:
        if not known:
            raise InputError(
                "the configuration has no data.evaluate: name an --index and a --split"
            )
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


def run_directory(checkpoint: Path) -> Path:
    """Where the scores of a checkpoint belong: …/checkpoints/step-00000100 -> …; one that lies elsewhere is its own run directory."""
    resolved = checkpoint.resolve()
    return resolved.parent.parent if resolved.parent.name == "checkpoints" else resolved
