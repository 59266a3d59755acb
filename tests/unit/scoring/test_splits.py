"""Requests from the command line."""

from __future__ import annotations

from coupalign.data.table import RULES
from coupalign.evaluation.protocols import PROTOCOLS
from coupalign.scoring.splits import ScoreRequest


def test_all_stands_for_every_protocol_and_sentence_rule() -> None:
    request = ScoreRequest.from_names("all", "all", language_blind=False, pictures=0)

    assert request.protocols == list(PROTOCOLS) and request.rules == RULES


def test_no_protocol_means_the_one_of_the_configuration() -> None:
    request = ScoreRequest.from_names(None, "first", language_blind=True, pictures=3)

    assert request == ScoreRequest(protocols=[], rules=["first"], language_blind=True, pictures=3)


def test_no_sentence_rule_means_the_one_of_each_protocol() -> None:
    request = ScoreRequest.from_names("all", None, language_blind=False, pictures=0)

    assert request.rules == []
