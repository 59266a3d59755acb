"""Score a model on evaluation sets over all ranks, and file the scores with every sample's counts.

    <run>/scores/val.json            the score that training took last
    <run>/scores/val-ris-v1.json     that of `coupalign eval`
    <run>/scores/val-ris-v1.csv      the rows of the newest of the two, see `evaluation.rows`

"val" is the name of the set, see `scoring.sets`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from coupalign.config.schema import Config, Source
from coupalign.data.batch import Batch
from coupalign.data.build import build_eval_loader
from coupalign.data.leak import TrainedOn, read_trained_on
from coupalign.data.loader import EvalLoader
from coupalign.data.table import RULES, Rule
from coupalign.data.tokenizer import Tokenizer
from coupalign.distributed.world import World, on_main
from coupalign.errors import RunError
from coupalign.evaluation.evaluator import Evaluation, evaluate, with_language_blind
from coupalign.evaluation.metrics import Score
from coupalign.evaluation.protocols import (
    PROTOCOLS,
    Protocol,
    describe_conditions,
    find_protocol,
)
from coupalign.evaluation.rows import Rows, rows_path, write_rows
from coupalign.files import write_json
from coupalign.report.pictures import save_pictures
from coupalign.scoring.sets import name_own_sets

Infer = Callable[[Batch], Tensor]
"""Maps a batch on the rank's device to logits, float [B, S, S]."""

Evaluations = dict[tuple[str, Rule], Evaluation]
"""Evaluations by (protocol name, sentence rule)."""


@dataclass(frozen=True)
class ScoreRequest:
    """What to score, beyond the configuration.

    Attributes:
        protocols: names of protocols. Empty: the configuration's.
        rules: which sentences of a ref are samples. Empty: those that the authors of each protocol
            score.
        language_blind: score a second time with the sentences shuffled among the samples, and
            attach that score to the first one.
        pictures: samples per group (best, median, worst, random) of which to draw pictures.
    """

    protocols: Sequence[str] = ()
    rules: Sequence[Rule] = ()
    language_blind: bool = False
    pictures: int = 0

    @classmethod
    def from_names(
        cls, protocol: str | None, sentences: str | None, *, language_blind: bool, pictures: int
    ) -> ScoreRequest:
        """Build a request from the names of the command line, where "all" stands for each of them.

        Args:
            protocol: None: the configuration's.
            sentences: None: those of each protocol's authors.
        """
        protocols = [protocol] if protocol else []
        rules = [sentences] if sentences else []
        return cls(
            protocols=list(PROTOCOLS) if protocol == "all" else protocols,
            rules=RULES if sentences == "all" else rules,
            language_blind=language_blind,
            pictures=pictures,
        )


@dataclass(frozen=True)
class ScoredSet:
    """The scoring of one evaluation set.

    Attributes:
        name: of the set, see `scoring.sets`.
        evaluations: in the order of the protocols and rules. Only rank 0 has scores.
        loader: knows the names and sentences of the samples.
    """

    name: str
    source: Source
    evaluations: Evaluations
    loader: EvalLoader

    @property
    def scores(self) -> dict[tuple[str, Rule], Score]:
        """The scores by (protocol name, sentence rule); empty on all ranks but rank 0."""
        return {
            key: evaluation.score
            for key, evaluation in self.evaluations.items()
            if evaluation.score is not None
        }

    def score_json(self, score: Score, **facts: Any) -> dict[str, Any]:
        """Return a score as JSON that says which set it is of, after other `facts`."""
        return {**facts, "name": self.name, "split": self.source.split, **score.to_json()}

    def write_rows(self, run: Path) -> None:
        """Write the rows of each score to <run>/scores/. Call it on rank 0."""
        for (protocol, rule), evaluation in self.evaluations.items():
            rows = Rows.from_integers(evaluation.rows, self.loader.names_and_sentences)
            path = rows_path(run, self.name, protocol, rule)
            write_rows(path, rows, find_protocol(protocol).iou_rule)


def score_splits(
    infer: Infer,
    config: Config,
    *,
    step: int,
    tokenizer: Tokenizer,
    world: World,
    pictures: int = 0,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Score]:
    """Score each source of data.evaluate under the config's protocol, and file it; collective.

    Args:
        step: of the training, after which the model is scored; written with each score.
        pictures: samples per group of which rank 0 draws pictures.
        stopped: asked before each batch; must return the same on every rank.

    Returns:
        scores by the name of the set, on rank 0; empty elsewhere.

    Raises:
        Stopped: on every rank, once `stopped` returned true.
        RunError: on every rank. The model gave NaN or infinity, or a file could not be written.
    """
    scores: dict[str, Score] = {}
    for name, source in name_own_sets(config.data.evaluate).items():
        scored = score_set(
            infer,
            config,
            name,
            source,
            tokenizer=tokenizer,
            world=world,
            request=ScoreRequest(pictures=pictures),
            stopped=stopped,
        )

        def file_score(scored: ScoredSet = scored) -> None:
            run = config.directory
            [(key, evaluation)] = scored.evaluations.items()
            with writing_scores(run):
                scored.write_rows(run)
                value = scored.score_json(scored.scores[key], step=step)
                write_json(run / "scores" / f"{scored.name}.json", value)
                if pictures:
                    save_pictures(run / "pictures" / scored.name, evaluation, pictures)

        on_main(file_score, world)
        for score in scored.scores.values():
            scores[name] = score
    return scores


@contextmanager
def writing_scores(run: Path) -> Iterator[None]:
    """Turn the OSError of a full or failing disk into a RunError that names the run."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{run}: the scores could not be written ({error}). Free some space, then run the same "
            "command again"
        ) from error


def score_set(
    infer: Infer,
    config: Config,
    name: str,
    source: Source,
    *,
    tokenizer: Tokenizer,
    world: World,
    request: ScoreRequest,
    trained_on: Path | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> ScoredSet:
    """Score one source; collective. Writes nothing.

    All protocols and sentence rules share one pass over the model.

    Args:
        name: of the set, see `scoring.sets`.
        trained_on: folder with the list of the photographs that the model has seen. Default: the
            run directory.
        stopped: see `score_splits`.

    Raises:
        Stopped: on every rank, once `stopped` returned true.
        RunError: on every rank, if the model gave NaN or infinity.
    """
    # Read it first: a damaged list must not cost the work of a scoring.
    seen = on_main(lambda: read_trained_on(trained_on or config.directory), world)
    protocols = [find_protocol(name) for name in request.protocols or [config.evaluate.protocol]]
    columns: list[tuple[str, Rule]] = []
    for protocol in protocols:
        columns += [(protocol.name, rule) for rule in request.rules or [protocol.sentences]]
    rules = list(dict.fromkeys(rule for _, rule in columns))

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
            rules=rules,
        )

        def conditions(protocol: Protocol, rule: Rule) -> Mapping[str, str]:
            return describe_conditions(
                protocol,
                config.data,
                [source],
                shards=loader.shards,
                limit=config.evaluate.limit,
                rule=rule,
            )

        evaluations = evaluate(
            lambda batch: infer(batch.to(world.device)),
            loader,
            protocols,
            world=world,
            bootstrap=config.evaluate.bootstrap,
            pictures=pictures,
            columns=columns,
            conditions=conditions,
            title=f"scoring {name} (sentences shuffled)" if shuffled else f"scoring {name}",
            stopped=stopped,
        )
        return loader, evaluations

    loader, evaluations = run_pass(shuffled=False, pictures=request.pictures)
    evaluations = _add_leak_message(evaluations, seen, loader)

    # The control: the same samples with other sentences. A model that reads must score less.
    if request.language_blind:
        _, blind = run_pass(shuffled=True, pictures=0)
        blind = _add_leak_message(blind, seen, loader)
        evaluations = _attach_language_blind(evaluations, blind)
    return ScoredSet(name, source, evaluations, loader)


def _add_leak_message(
    evaluations: Evaluations, trained_on: TrainedOn | None, loader: EvalLoader
) -> Evaluations:
    """Say with each score how many of its photographs were trained on, if that is known."""
    # Scores exist on rank 0 only.
    has_scores = any(evaluation.score for evaluation in evaluations.values())
    if trained_on is None or not has_scores:
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
