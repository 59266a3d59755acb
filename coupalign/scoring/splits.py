"""Score a model on evaluation splits over all ranks, and keep every sample's counts as files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from coupalign.config.schema import Config, Source
from coupalign.data.batch import Batch
from coupalign.data.build import build_eval_loader
from coupalign.data.leak import read_trained_on
from coupalign.data.loader import EvalLoader
from coupalign.data.table import RULES, Rule
from coupalign.data.tokenizer import Tokenizer
from coupalign.distributed.world import World
from coupalign.evaluation.evaluator import Evaluation, evaluate, with_language_blind
from coupalign.evaluation.metrics import Score
from coupalign.evaluation.protocols import (
    PROTOCOLS,
    Protocol,
    describe_conditions,
    find_protocol,
)
from coupalign.evaluation.rows import Rows, rows_path, write_rows
from coupalign.report.pictures import save_pictures

Infer = Callable[[Batch], Tensor]
"""Maps a batch on the rank's device to logits, float [B, S, S]."""

Evaluations = dict[tuple[str, Rule], Evaluation]
"""Evaluations by (protocol name, sentence rule)."""


@dataclass(frozen=True)
class ScoreRequest:
    """What to score, beyond the configuration.

    Attributes:
        protocols: names of protocols. Empty: the configuration's.
        rules: which sentences of a ref are samples.
        language_blind: score a second time with the sentences shuffled among the samples, and
            attach that score to the first one.
        pictures: samples per group (best, median, worst, random) of which to draw pictures.
    """

    protocols: Sequence[str] = ()
    rules: Sequence[Rule] = ("each",)
    language_blind: bool = False
    pictures: int = 0

    @classmethod
    def from_names(
        cls, protocol: str | None, sentences: str, *, language_blind: bool, pictures: int
    ) -> ScoreRequest:
        """Build a request from the names of the command line, where "all" stands for each of them.

        Args:
            protocol: None: the configuration's.
        """
        protocols = [protocol] if protocol else []
        return cls(
            protocols=list(PROTOCOLS) if protocol == "all" else protocols,
            rules=RULES if sentences == "all" else [sentences],
            language_blind=language_blind,
            pictures=pictures,
        )


def score_splits(
    infer: Infer,
    config: Config,
    *,
    tokenizer: Tokenizer,
    world: World,
    pictures: int = 0,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Score]:
    """Score each source of data.evaluate under the config's protocol; collective.

    Args:
        pictures: samples per group of which rank 0 draws pictures.
        stopped: asked before each batch; must return the same on every rank.

    Returns:
        scores by split, on rank 0; empty elsewhere.

    Raises:
        Stopped: on every rank, once `stopped` returned true.
    """
    request = ScoreRequest(pictures=pictures)
    scores = {}
    for split, source in name_splits(config.data.evaluate).items():
        evaluations = score_split(
            infer,
            config,
            split,
            source,
            tokenizer=tokenizer,
            world=world,
            request=request,
            stopped=stopped,
        )
        [evaluation] = evaluations.values()
        if evaluation.score is not None:
            scores[split] = evaluation.score
            if pictures:
                save_pictures(config.directory / "pictures" / split, evaluation, pictures)
    return scores


def score_split(
    infer: Infer,
    config: Config,
    split: str,
    source: Source,
    *,
    tokenizer: Tokenizer,
    world: World,
    request: ScoreRequest,
    stopped: Callable[[], bool] = lambda: False,
) -> Evaluations:
    """Score one source and write its rows (see `evaluation.rows`) to <run>/scores/; collective.

    All protocols and sentence rules share one pass over the model.

    Args:
        split: short name of the source, as in `name_splits`.
        stopped: see `score_splits`.

    Returns:
        Evaluations in the order of the protocols and rules. Only rank 0 has scores.

    Raises:
        Stopped: on every rank, once `stopped` returned true.
    """
    protocols = [find_protocol(name) for name in request.protocols or [config.evaluate.protocol]]

    def conditions(protocol: Protocol, rule: Rule) -> Mapping[str, str]:
        return describe_conditions(
            protocol, config.data, [source], limit=config.evaluate.limit, rule=rule
        )

    def run_pass(*, shuffled: bool, pictures: int) -> tuple[EvalLoader, Evaluations]:
        loader = build_eval_loader(
            config.data,
            [source],
            batch=config.evaluate.batch,
            world=world,
            tokenizer=tokenizer,
            limit=config.evaluate.limit,
            shuffle_sentences=shuffled,
            images=pictures > 0,
            rules=request.rules,
        )
        evaluations = evaluate(
            lambda batch: infer(batch.to(world.device)),
            loader,
            protocols,
            world=world,
            bootstrap=config.evaluate.bootstrap,
            pictures=pictures,
            conditions=conditions,
            title=f"scoring {split} (sentences shuffled)" if shuffled else f"scoring {split}",
            stopped=stopped,
        )
        return loader, evaluations

    loader, evaluations = run_pass(shuffled=False, pictures=request.pictures)
    if world.is_main:
        _write_rows(config, split, evaluations, loader)
    evaluations = _add_leak_message(evaluations, config, loader)

    # The control: the same samples with other sentences. A model that reads must score less.
    if request.language_blind:
        loader, blind = run_pass(shuffled=True, pictures=0)
        blind = _add_leak_message(blind, config, loader)
        evaluations = _attach_language_blind(evaluations, blind)
    return evaluations


def name_splits(sources: Sequence[Source]) -> dict[str, Source]:
    """Give each source a short name: its split.

    If two sources share a split, the data set comes first: "refcoco-unc-val".
    """
    splits = [source.split for source in sources]
    names = {}
    for source in sources:
        name = source.split
        if splits.count(name) > 1:
            name = f"{source.dataset}-{source.split_by}-{source.split}"
        assert name not in names, f"the same source twice: {name}"
        names[name] = source
    return names


def _write_rows(config: Config, split: str, evaluations: Evaluations, loader: EvalLoader) -> None:
    for (protocol, rule), evaluation in evaluations.items():
        rows = Rows.from_integers(evaluation.rows, loader.names_and_sentences)
        path = rows_path(config.directory, split, protocol, rule)
        write_rows(path, rows, find_protocol(protocol).empty)


def _add_leak_message(evaluations: Evaluations, config: Config, loader: EvalLoader) -> Evaluations:
    """Say with each score how many of its photographs were trained on, if that is known."""
    # Scores exist on rank 0 only.
    if not any(evaluation.score for evaluation in evaluations.values()):
        return evaluations
    trained_on = read_trained_on(config.directory)
    if trained_on is None:
        return evaluations

    message = trained_on.leak_message(loader.photos)
    return {
        key: replace(evaluation, score=replace(evaluation.score, leak=message))
        for key, evaluation in evaluations.items()
    }


def _attach_language_blind(evaluations: Evaluations, blind: Evaluations) -> Evaluations:
    """Attach the scores with shuffled sentences to those with the right ones."""
    attached = {}
    for key, evaluation in evaluations.items():
        blind_score = blind[key].score
        if evaluation.score is not None and blind_score is not None:
            score = with_language_blind(evaluation.score, blind_score)
            evaluation = replace(evaluation, score=score)
        attached[key] = evaluation
    return attached
