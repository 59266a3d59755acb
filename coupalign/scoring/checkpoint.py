"""Score a finished checkpoint, on one process or on the ranks of a launcher: `coupalign eval`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from coupalign.config.load import override
from coupalign.config.schema import Config, Source
from coupalign.data.table import Rule
from coupalign.distributed.stop import StopRequest
from coupalign.distributed.world import AgreedFlag, rank_session
from coupalign.engine.base import MixedPrecision, infer_logits
from coupalign.engine.open_checkpoint import find_checkpoint, open_checkpoint
from coupalign.errors import InputError
from coupalign.evaluation.metrics import Score
from coupalign.evaluation.rows import rows_path
from coupalign.files import write_json
from coupalign.report.explanations import build_explainer
from coupalign.report.pictures import save_pictures
from coupalign.scoring.splits import Evaluations, ScoreRequest, name_splits, score_split

Scores = dict[tuple[str, Rule], Score]
"""Scores by (protocol name, sentence rule)."""


def score_checkpoint(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    splits: Sequence[str] = (),
    index: str | None = None,
    request: ScoreRequest | None = None,
    stop: StopRequest | None = None,
) -> dict[str, Scores]:
    """Score a checkpoint; write scores, rows and pictures into its run directory; collective.

    Each image and sentence goes through the model once, whatever the number of protocols and
    sentence rules.

    Args:
        path: a run directory (its best checkpoint) or a checkpoint.
        overrides: changes of the checkpoint's configuration.
        splits: names of splits. Empty: those of the configuration.
        index: another shard directory to take the splits from.
        request: protocols, sentence rules and pictures. Pictures are of the first protocol and
            rule. Default: the configuration's protocol, each sentence, no pictures.
        stop: ends the scoring early, if requested on any rank.

    Returns:
        scores by split, on rank 0; empty elsewhere.

    Raises:
        InputError: there is no such checkpoint or split.
        Stopped: on every rank, if `stop` was requested.
    """
    request = request or ScoreRequest()
    with rank_session() as world:
        checkpoint = find_checkpoint(path)
        config, model, tokenizer = open_checkpoint(checkpoint, world.device)
        config = override(config, overrides)
        config = config.model_copy(update={"run_dir": run_directory(checkpoint)})

        net = MixedPrecision(model, config.precision).eval()
        stopped = AgreedFlag(lambda: stop is not None and stop.name is not None, world)
        scores: dict[str, Scores] = {}
        for split, source in name_splits(_choose_sources(config, splits, index)).items():
            evaluations = score_split(
                partial(infer_logits, net),
                config,
                split,
                source,
                tokenizer=tokenizer,
                world=world,
                request=request,
                stopped=stopped,
            )

            # Scores exist on rank 0 only.
            if not world.is_main:
                continue
            scores[split] = _write_scores(config, checkpoint, split, evaluations)
            if request.pictures:
                first = next(iter(evaluations.values()))
                explain = build_explainer(model, tokenizer, config.data, device=world.device)
                folder = config.directory / "pictures" / split
                save_pictures(folder, first, request.pictures, explain=explain)

        if scores:
            _write_first_score(config, checkpoint, scores)
        return scores


def run_directory(checkpoint: Path) -> Path:
    """Return the directory to which a checkpoint's scores belong.

    RUN/checkpoints/step-00000100 belongs to RUN. A checkpoint elsewhere is its own run directory.
    """
    resolved = checkpoint.resolve()
    return resolved.parent.parent if resolved.parent.name == "checkpoints" else resolved


def _write_scores(config: Config, checkpoint: Path, split: str, evaluations: Evaluations) -> Scores:
    """Write each score of a split as JSON next to its rows."""
    scores: Scores = {}
    for key, evaluation in evaluations.items():
        score = evaluation.score
        if score is None:
            continue
        rows = rows_path(config.directory, split, score.protocol, score.sentences)
        write_json(
            rows.with_suffix(".json"), {"checkpoint": checkpoint.resolve().name, **score.to_json()}
        )
        scores[key] = score
    return scores


def _write_first_score(config: Config, checkpoint: Path, scores: dict[str, Scores]) -> None:
    """Write the first score as <run>/score.json."""
    for split, scores_of_split in scores.items():
        for score in scores_of_split.values():
            names = {"checkpoint": checkpoint.resolve().name, "split": split}
            write_json(config.directory / "score.json", {**names, **score.to_json()})
            return


def _choose_sources(config: Config, splits: Sequence[str], index: str | None) -> list[Source]:
    """List the sources to score: splits of `index`, named splits, or all of data.evaluate."""
    configured = config.data.evaluate
    if index is not None:
        if not splits:
            raise InputError("--index needs a --split")
        return [Source(index=index, split=split) for split in splits]
    if not splits:
        if not configured:
            raise InputError(
                "the configuration has no data.evaluate: name an --index and a --split"
            )
        return list(configured)

    # A split that the run did not evaluate comes from the shards that it did read.
    base = (configured or config.data.train)[0]
    chosen = [source for split in splits for source in configured if source.split == split]
    configured_splits = {source.split for source in configured}
    others = [split for split in splits if split not in configured_splits]
    return chosen + [base.model_copy(update={"split": split}) for split in others]
