"""Scores of a model on the evaluation splits of a config, over all ranks, with the rows kept as files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from coupalign.config.schema import Config, Source
from coupalign.data.batch import Batch
from coupalign.data.build import build_eval_loader
from coupalign.data.leak import read_trained_on
from coupalign.data.loader import EvalLoader
from coupalign.data.table import Rule
from coupalign.data.tokenizer import Tokenizer
from coupalign.distributed.world import World
from coupalign.evaluation.evaluator import Evaluation, evaluate, with_language_blind
from coupalign.evaluation.metrics import Score
from coupalign.evaluation.protocols import describe_conditions, find_protocol
from coupalign.evaluation.rows import Rows, rows_path, write_rows
from coupalign.report.pictures import save_pictures

Infer = Callable[[Batch], Tensor]


def score_splits(
    infer: Infer,
    config: Config,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    world: World,
    pictures: int = 0,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Score]:
    """Score each source by itself under the config's protocol, every sentence a sample; collective.

    Names -> scores on rank 0, which also draws so many `pictures` of each kind; empty elsewhere. Raises Stopped on every rank
    once `stopped`, which must agree on all of them, says so.
    """
    scores = {}
    for name, source in split_names(sources).items():
        [evaluation] = score_split(
            infer, config, name, source, tokenizer, world, pictures=pictures, stopped=stopped
        ).values()
        if evaluation.score is not None:
            scores[name] = evaluation.score
            if pictures:
                save_pictures(config.directory / "pictures" / name, evaluation, pictures)
    return scores


def score_split(
    infer: Infer,
    config: Config,
    name: str,
    source: Source,
    tokenizer: Tokenizer,
    world: World,
    *,
    protocols: Sequence[str] = (),
    rules: Sequence[Rule] = ("each",),
    language_blind: bool = False,
    pictures: int = 0,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[tuple[str, Rule], Evaluation]:
    """Score one source in one pass over the model and write its rows (see `evaluation.facts`) to `<run>/scores/`; collective.

    Args:
        infer: batch on `world.device` -> logits float [B, S, S].
        protocols: none: the config's.
        rules: which sentences of a ref are samples.
        language_blind: score a second time with the sentences shuffled among the samples, and keep it beside each score.
        pictures: samples of each kind (best, median, worst, random) that every rank keeps to look at.
        stopped: ends the scoring early, see `evaluate`.

    Returns:
        by (protocol, sentence rule), as `evaluate` does.
    """
    wanted = [find_protocol(protocol) for protocol in protocols or [config.evaluate.protocol]]
    limit = config.evaluate.limit

    def one_pass(shuffled: bool, shown: int) -> dict[tuple[str, Rule], Evaluation]:
        loader = build_eval_loader(
            config.data,
            [source],
            batch=config.evaluate.batch,
            world=world,
            tokenizer=tokenizer,
            limit=limit,
            shuffle_sentences=shuffled,
            images=shown > 0,
            rules=rules,
        )
        results = evaluate(
            lambda batch: infer(batch.to(world.device)),
            loader,
            wanted,
            world=world,
            bootstrap=config.evaluate.bootstrap,
            pictures=shown,
            conditions=lambda protocol, rule: describe_conditions(
                protocol, config.data, [source], limit=limit, rule=rule
            ),
            title=f"scoring {name}{' (sentences shuffled)' if shuffled else ''}",
            stopped=stopped,
        )
        if world.is_main and not shuffled:
            for (protocol, rule), evaluation in results.items():
                path = rows_path(config.directory, name, protocol, rule)
                write_rows(
                    path,
                    Rows.from_integers(evaluation.rows, loader.names_and_sentences),
                    find_protocol(protocol).empty,
                )
        return _with_leak(results, config.directory, loader)

    results = one_pass(False, pictures)
    if language_blind:
        blind = one_pass(True, 0)
        for key, evaluation in results.items():
            if evaluation.score is not None and (other := blind[key].score) is not None:
                results[key] = replace(
                    evaluation, score=with_language_blind(evaluation.score, other)
                )
    return results


def _with_leak(
    results: dict[tuple[str, Rule], Evaluation], run: Path, loader: EvalLoader
) -> dict[tuple[str, Rule], Evaluation]:
    """The scores with what is known of photographs that were trained on; on rank 0, the only one that has scores."""
    seen = (
        read_trained_on(run) if any(evaluation.score for evaluation in results.values()) else None
    )
    if seen is None:
        return results
    words = seen.leak_message(loader.photos)
    return {
        key: replace(evaluation, score=replace(evaluation.score, leak=words))
        for key, evaluation in results.items()
    }


def split_names(sources: Sequence[Source]) -> dict[str, Source]:
    """A short name for each source: its split, with the data set in front where two share a split."""
    splits = [source.split for source in sources]
    names = [
        source.split
        if splits.count(source.split) == 1
        else f"{source.dataset}-{source.split_by}-{source.split}"
        for source in sources
    ]
    assert len(set(names)) == len(names), f"the same source twice: {names}"
    return dict(zip(names, sources))
