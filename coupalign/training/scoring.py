"""Scores of a model on the evaluation splits of a config, over all ranks, with the rows kept as files."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from coupalign import dist
from coupalign.config.schema import Config, Source
from coupalign.data.batch import Batch
from coupalign.data.loader import build_eval_loader
from coupalign.data.tokenizer import Tokenizer
from coupalign.dist import World
from coupalign.evaluation.evaluator import Evaluation, evaluate, with_language_blind, write_rows
from coupalign.evaluation.metrics import Score
from coupalign.evaluation.protocols import describe_conditions, find_protocol

Infer = Callable[[Batch], Tensor]


def score_splits(infer: Infer, config: Config, sources: Sequence[Source], tokenizer: Tokenizer, world: World,
                 stopped: Callable[[], bool] = lambda: False) -> dict[str, Score]:
    """Score each source by itself under the config's protocol; collective. Names -> scores on rank 0, empty elsewhere.

    Raises Stopped on every rank once `stopped`, which must agree on all of them, says so.
    """
    scores = {}
    for name, source in split_names(sources).items():
        evaluation = score_split(infer, config, name, source, tokenizer, world, stopped=stopped)
        if evaluation.score is not None:
            scores[name] = evaluation.score
    return scores


def score_split(infer: Infer, config: Config, name: str, source: Source, tokenizer: Tokenizer, world: World, *,
                protocol: str | None = None, language_blind: bool = False, pictures: int = 0,
                stopped: Callable[[], bool] = lambda: False) -> Evaluation:
    """Score one source and write its rows to `<run>/scores/<name>-<protocol>.csv`; collective.

    Args:
        infer: batch on `world.device` -> logits float [B, S, S].
        protocol: none: the config's.
        language_blind: score a second time with the sentences shuffled among the samples, and keep it beside the score.
        pictures: samples of each kind (best, median, worst, random) that every rank keeps to look at.
        stopped: ends the scoring early, see `evaluate`.
    """
    rules = find_protocol(protocol or config.evaluate.protocol)
    conditions = describe_conditions(rules, config.data, [source], config.evaluate.limit)

    def one_pass(shuffled: bool, shown: int) -> Evaluation:
        loader = build_eval_loader(config.data, [source], config.evaluate.batch, world.rank, world.size, tokenizer,
                                   limit=config.evaluate.limit, shuffle_sentences=shuffled, images=shown > 0)
        evaluation = evaluate(infer, loader, rules, gather=partial(dist.gather_rows, world=world), rank=world.rank,
                              device=world.device, bootstrap=config.evaluate.bootstrap, pictures=shown, conditions=conditions,
                              title=f"scoring {name}{' (sentences shuffled)' if shuffled else ''}", stopped=stopped)
        if world.is_main and not shuffled:
            write_rows(config.directory / "scores" / f"{name}-{rules.name}.csv", evaluation.rows, loader.names, rules.empty)
        return evaluation

    evaluation = one_pass(False, pictures)
    if not language_blind:
        return evaluation
    blind = one_pass(True, 0)
    if evaluation.score is None or blind.score is None:
        return evaluation
    return Evaluation(with_language_blind(evaluation.score, blind.score), evaluation.rows, evaluation.pictures)


def split_names(sources: Sequence[Source]) -> dict[str, Source]:
    """A short name for each source: its split, with the data set in front where two share a split."""
    splits = [source.split for source in sources]
    names = [source.split if splits.count(source.split) == 1 else f"{source.dataset}-{source.split_by}-{source.split}"
             for source in sources]
    assert len(set(names)) == len(names), f"the same source twice: {names}"
    return dict(zip(names, sources))
