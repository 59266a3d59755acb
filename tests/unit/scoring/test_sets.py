"""Names of evaluation sets: no two share one, and only a run's own sets have short names."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coupalign.config.schema import Config, Source
from coupalign.errors import InputError
from coupalign.scoring import sets
from coupalign.scoring.sets import name_own_sets, name_set


def source(
    index: str, split: str = "val", dataset: str | None = None, split_by: str | None = None
) -> Source:
    return Source(index=index, dataset=dataset, split_by=split_by, split=split)


def run_with(*evaluated: Source) -> Config:
    data = Config().data.model_copy(update={"evaluate": evaluated})
    return Config().model_copy(update={"data": data})


@pytest.fixture(autouse=True)
def shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shard sets by location; those of the same fingerprint are copies."""
    fingerprints = {"ours": "a", "/copies/ours": "a", "theirs": "b", "others": "c"}

    def open_index(location: str) -> SimpleNamespace:
        if location not in fingerprints:
            raise InputError(f"{location}: no such file")
        return SimpleNamespace(name="photos", fingerprint=64 * fingerprints[location])

    monkeypatch.setattr(sets, "open_index", open_index)


def test_split_is_its_own_name_unless_two_sources_share_it() -> None:
    sources = [
        source("shards", "val", "refcoco", "unc"),
        source("shards", "val", "refcoco+", "unc"),
        source("shards", "testA", "refcoco", "unc"),
    ]

    names = name_own_sets(sources)

    assert list(names) == ["refcoco-unc-val", "refcoco+-unc-val", "testA"]
    assert list(names.values()) == sources


@pytest.mark.parametrize(
    "sources, names",
    [
        ([source("one"), source("two")], ["one-val", "two-val"]),
        ([source("/a/shards"), source("/b/shards")], ["a-shards-val", "b-shards-val"]),
        ([source("http://h/a"), source("s3://k/a/index.json")], ["h-a-val", "k-a-val"]),
        ([source("x"), source("x/")], ["x-val", "x-val-2"]),
        ([source("x", dataset="a"), source("y", dataset="a")], ["x-val", "y-val"]),
        ([source("x", dataset="a"), source("x")], ["a-val", "val"]),
        ([source("x", "a/b"), source("x", "a b"), source("x", "..")], ["a-b", "a-b-2", "set"]),
    ],
)
def test_name_says_what_tells_sets_apart(sources: list[Source], names: list[str]) -> None:
    assert list(name_own_sets(sources)) == names


PART = st.none() | st.sampled_from(["a", "b", "a/b", "é"])
SOURCES = st.builds(
    source, st.sampled_from(["a", "b", "/x/a", "/y/a", "a/", "s3://a"]), st.text(), PART, PART
)


@settings(deadline=None)
@given(st.lists(SOURCES, max_size=6, unique=True))
def test_names_are_different_and_safe_as_files(sources: list[Source]) -> None:
    names = name_own_sets(sources)

    assert list(names.values()) == sources
    assert all(re.fullmatch(r"[\w+][\w+.-]*", name) for name in names)


def test_repeated_source_is_refused() -> None:
    with pytest.raises(InputError, match="data.evaluate: split 'val' of x is listed 2 times"):
        name_own_sets([source("x"), source("y"), source("x")])


def test_own_set_keeps_its_name_wherever_its_shards_are() -> None:
    run = run_with(source("ours"), source("ours", "testA"))

    assert name_set(source("ours"), run) == "val"
    assert name_set(source("/copies/ours", "testA"), run) == "testA"


def test_other_split_of_own_shards_is_named_by_its_split() -> None:
    assert name_set(source("ours", "testB"), run_with(source("ours"))) == "testB"


def test_set_of_other_shards_is_named_by_them() -> None:
    run = run_with(source("ours"))

    names = [name_set(source(index), run) for index in ("theirs", "others")]

    assert names == ["photos-bbbbbbbb-val", "photos-cccccccc-val"]
    assert name_set(source("theirs"), run_with(source("gone"))) == "photos-bbbbbbbb-val"
    assert name_set(source("theirs"), run_with()) == "photos-bbbbbbbb-val"


def test_other_selection_of_own_shards_is_another_set() -> None:
    run = run_with(source("ours", "val", "refcoco", "unc"))

    assert name_set(source("ours"), run) == "photos-aaaaaaaa-val"
    assert name_set(source("ours", "val", "refcoco+"), run) == "photos-aaaaaaaa-refcoco+-val"
