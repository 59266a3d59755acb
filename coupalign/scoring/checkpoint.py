"""Score a finished checkpoint, on one process or on the ranks of a launcher: `coupalign eval`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from coupalign.config.load import override, parse_section
from coupalign.config.schema import Config, Source
from coupalign.data.table import Rule
from coupalign.distributed.stop import StopRequest
from coupalign.distributed.world import AgreedFlag, on_main, rank_session
from coupalign.engine.base import MixedPrecision, infer_logits
from coupalign.engine.open_checkpoint import find_checkpoint, open_checkpoint
from coupalign.errors import InputError
from coupalign.evaluation.metrics import Score
from coupalign.evaluation.rows import rows_path
from coupalign.files import require_writable, write_json
from coupalign.report.explanations import build_explainer
from coupalign.report.pictures import save_pictures
from coupalign.scoring.sets import home_source, name_own_sets, name_set
from coupalign.scoring.splits import ScoredSet, ScoreRequest, score_set, writing_scores

Scores = dict[tuple[str, Rule], Score]
"""Scores by (protocol name, sentence rule)."""


def score_checkpoint(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    splits: Sequence[str] = (),
    index: str | None = None,
    out: Path | None = None,
    request: ScoreRequest | None = None,
    stop: StopRequest | None = None,
    announce: Callable[[str, Scores], None] = lambda name, scores: None,
) -> dict[str, Scores]:
    """Score a checkpoint; write scores, rows and pictures into its run directory; collective.

    Each image and sentence goes through the model once, whatever the number of protocols and
    sentence rules. Each set is filed under its own name, see `scoring.sets`.

    Args:
        path: a run directory (its best checkpoint) or a checkpoint.
        overrides: changes of the checkpoint's configuration.
        splits: names of splits. Empty: those of the configuration.
        index: another shard directory to take the splits from.
        out: the folder to write to. Default: the run directory.
        request: protocols, sentence rules and pictures. Pictures are of the first protocol and
            rule. Default: the configuration's protocol, each sentence, no pictures.
        stop: ends the scoring early, if requested on any rank.
        announce: called on rank 0 with the name and the scores of each set, even if they could not
            be written.

    Returns:
        scores by the name of their set, on rank 0; empty elsewhere.

    Raises:
        InputError: there is no such checkpoint or split, or `out` cannot be written to.
        RunError: on every rank. The model gave NaN or infinity, or a file could not be written.
        Stopped: on every rank, if `stop` was requested.
    """
    request = request or ScoreRequest()
    with rank_session() as world:
        checkpoint = find_checkpoint(path)
        run = run_directory(checkpoint)
        target = out or run
        on_main(lambda: _require_writable(target), world)

        trained, model, tokenizer = open_checkpoint(checkpoint, world.device)
        config = override(trained, overrides)
        _refuse_without_effect(trained, config)
        config = config.model_copy(update={"run_dir": target})

        net = MixedPrecision(model, config.precision).eval()
        stopped = AgreedFlag(lambda: stop is not None and stop.name is not None, world)
        explain = build_explainer(model, tokenizer, config.data, device=world.device)
        sources = _choose_sources(config, splits, index)
        named = on_main(lambda: _name_sources(sources, trained, config), world)

        scores: dict[str, Scores] = {}
        for name, source in named.items():
            scored = score_set(
                partial(infer_logits, net),
                config,
                name,
                source,
                tokenizer=tokenizer,
                world=world,
                request=request,
                trained_on=run,
                stopped=stopped,
            )

            def file_scores(scored: ScoredSet = scored) -> None:
                is_own = scored.name in name_own_sets(trained.data.evaluate)
                try:
                    with writing_scores(target):
                        _write_scores(target, checkpoint, scored, is_own=is_own)
                        if request.pictures:
                            first = next(iter(scored.evaluations.values()))
                            folder = target / "pictures" / scored.name
                            save_pictures(folder, first, request.pictures, explain=explain)
                finally:
                    # A full disk must not cost the numbers.
                    announce(scored.name, scored.scores)

            on_main(file_scores, world)
            if world.is_main:
                scores[name] = scored.scores
        return scores


def run_directory(checkpoint: Path) -> Path:
    """Return the directory to which a checkpoint's scores belong.

    RUN/checkpoints/step-00000100 belongs to RUN. A checkpoint elsewhere is its own run directory.
    """
    resolved = checkpoint.resolve()
    return resolved.parent.parent if resolved.parent.name == "checkpoints" else resolved


def _refuse_without_effect(trained: Config, config: Config) -> None:
    """Refuse overrides of what the checkpoint decides: the scores would not be of the change.

    Raises:
        InputError: the message names the setting.
    """
    decided = {
        "model": (trained.model, config.model),
        "data.image_size": (trained.data.image_size, config.data.image_size),
        "data.tokenizer": (trained.data.tokenizer, config.data.tokenizer),
    }
    for name, (own, changed) in decided.items():
        if changed != own:
            raise InputError(
                f"{name}: is that of the checkpoint and cannot be changed for a score; leave the "
                "override out, or train a model with it"
            )
    if config.run_dir != trained.run_dir:
        raise InputError("run_dir: name the folder for the scores with --out")


def _require_writable(run: Path) -> None:
    """Raise InputError if scores cannot be written below a folder."""
    for name in ("scores", "pictures"):
        # Files of the same names there would be replaced.
        folder = run / name
        if folder.is_symlink() and not folder.resolve().is_relative_to(run.resolve()):
            raise InputError(
                f"{folder}: is a link that leads out of the run directory. Put a folder there, or "
                "name another place with --out"
            )
    for folder in (run, run / "scores"):
        require_writable(folder, "the scores", "Name a folder of your own with --out")


def _write_scores(run: Path, checkpoint: Path, scored: ScoredSet, *, is_own: bool) -> None:
    """Write each score of a set as JSON, and its rows.

    The first score of the run's own sets also goes to <run>/score.json. Until there is one, that
    of any set does.
    """
    scored.write_rows(run)
    values = []
    for score in scored.scores.values():
        value = scored.score_json(score, checkpoint=checkpoint.resolve().name)
        rows = rows_path(run, scored.name, score.protocol, score.sentences)
        write_json(rows.with_suffix(".json"), value)
        values.append(value)

    first = run / "score.json"
    if is_own or not first.exists():
        write_json(first, values[0])


def _name_sources(sources: Sequence[Source], trained: Config, config: Config) -> dict[str, Source]:
    """Name the sources to score, see `scoring.sets`.

    Args:
        trained: the configuration of the run.
        config: that of this scoring. A limit of its own goes into the names.
    """
    named: dict[str, Source] = {}
    limit = config.evaluate.limit
    for source in sources:
        name = name_set(source, trained)
        if limit not in (None, trained.evaluate.limit):
            name += f"-limit-{limit}"
        named[name] = source
    return named


def _choose_sources(config: Config, splits: Sequence[str], index: str | None) -> list[Source]:
    """List the sources to score: splits of `index`, named splits, or all of data.evaluate."""
    configured = config.data.evaluate
    if index is not None:
        if not splits:
            raise InputError("--index needs a --split")
        trees = [{"index": index, "split": split} for split in splits]
        return [parse_section(Source, tree, "--index") for tree in trees]
    if not splits:
        if not configured:
            raise InputError(
                "the configuration has no data.evaluate: name an --index and a --split"
            )
        return list(configured)

    # A split that the run did not evaluate comes from the shards that it did read.
    base = home_source(config)
    if base is None:
        raise InputError("the configuration names no shards: name an --index and a --split")
    chosen = [source for split in splits for source in configured if source.split == split]
    configured_splits = {source.split for source in configured}
    others = [split for split in splits if split not in configured_splits]
    return chosen + [base.model_copy(update={"split": split}) for split in others]
