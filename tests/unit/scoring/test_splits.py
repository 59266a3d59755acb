"""Names of splits, and requests from the command line."""

from __future__ import annotations

from coupalign.config.schema import Source
from coupalign.data.table import RULES
from coupalign.evaluation.protocols import PROTOCOLS
from coupalign.scoring.splits import ScoreRequest, name_splits


def source(dataset: str, split: str) -> Source:
    return Source(index="shards", dataset=dataset, split_by="unc", split=split)


def test_split_is_its_own_name_unless_two_sources_share_it() -> None:
    sources = [
        source("refcoco", "val"),
        source("refcoco+", "val"),
        source("refcoco", "testA"),
    ]

    names = name_splits(sources)

    assert list(names) == ["refcoco-unc-val", "refcoco+-unc-val", "testA"]
    assert list(names.values()) == sources


def test_all_stands_for_every_protocol_and_sentence_rule() -> None:
    request = ScoreRequest.from_names("all", "all", language_blind=False, pictures=0)

    assert request.protocols == list(PROTOCOLS) and request.rules == RULES


def test_no_protocol_means_the_one_of_the_configuration() -> None:
    request = ScoreRequest.from_names(None, "first", language_blind=True, pictures=3)

    assert request == ScoreRequest(protocols=[], rules=["first"], language_blind=True, pictures=3)
