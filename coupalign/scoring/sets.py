"""The names of evaluation sets: under them, scores, rows and pictures are filed.

A run's own sets, those of data.evaluate, are named by their split, "val". Where two of them share a
split, the name also says what tells them apart: "refcoco-unc-val", "photos-val". Any other set is
named by its shards and a part of their fingerprint, "photos-0f3a52c1-val", so that its scores never
replace those of the run's own sets.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from urllib.parse import urlsplit

from coupalign.config.schema import Config, Source
from coupalign.data.shards import open_index
from coupalign.errors import InputError

_FINGERPRINT_DIGITS = 8
_LONGEST_PART = 60


def name_own_sets(sources: Sequence[Source]) -> dict[str, Source]:
    """Name the sources of data.evaluate, each differently.

    Raises:
        InputError: two sources are the same.
    """
    for source, times in Counter(sources).items():
        if times > 1:
            raise InputError(
                f"data.evaluate: split {source.split!r} of {source.index} is listed {times} times; "
                "remove the repetitions"
            )

    splits = Counter(source.split for source in sources)
    named: dict[str, Source] = {}
    for source in sources:
        rivals = [other for other in sources if other.split == source.split]
        name = _join(source.split) if splits[source.split] == 1 else _speaking_name(source, rivals)
        named[_unused(name, named)] = source
    return named


def name_set(source: Source, config: Config) -> str:
    """Name any source that a run is scored on.

    Args:
        config: the run's own, before any change for this scoring.

    Raises:
        InputError: the index of the source cannot be opened.
    """
    own = name_own_sets(config.data.evaluate)
    for name, own_source in own.items():
        if _same_set(source, own_source):
            return name

    # Another split of the shards that the run reads.
    home = home_source(config)
    if home is not None and _same_set(source, home.model_copy(update={"split": source.split})):
        return _unused(_join(source.split), own)

    index = open_index(source.index)
    parts = [index.name, index.fingerprint[:_FINGERPRINT_DIGITS], source.dataset, source.split_by]
    return _unused(_join(*filter(None, parts), source.split), own)


def home_source(config: Config) -> Source | None:
    """The source whose shards hold the splits that are asked for by name alone."""
    sources = config.data.evaluate or config.data.train
    return sources[0] if sources else None


def _speaking_name(source: Source, rivals: Sequence[Source]) -> str:
    """Name a source by the fewest facts that differ from those of all `rivals` of its split."""
    longest = max(len(_path_parts(rival)) for rival in rivals)
    lengths = range(1, longest + 1)
    ways = [(0, True), *product(lengths, (False,)), *product(lengths, (True,))]
    for path_parts, with_dataset in ways:
        names = [_name_by(rival, path_parts, with_dataset) for rival in rivals]
        if len(set(names)) == len(names):
            break
    return _name_by(source, path_parts, with_dataset)


def _name_by(source: Source, path_parts: int, with_dataset: bool) -> str:
    """Name a source by the end of its shards' path, its data set or both, and its split."""
    parts = _path_parts(source)[-path_parts:] if path_parts else []
    if with_dataset:
        parts = [*parts, *filter(None, [source.dataset, source.split_by])]
    return _join(*parts, source.split)


def _path_parts(source: Source) -> list[str]:
    address = urlsplit(source.index)
    path = (address.hostname or "") + address.path.rstrip("/").removesuffix("/index.json")
    return [part for part in path.split("/") if part not in ("", ".", "..")]


def _join(*parts: str) -> str:
    """Join parts to a name that is also a file name and a part of a metric's name."""
    cleaned = [re.sub(r"[^\w+.]+", "-", part).strip("-.")[:_LONGEST_PART] for part in parts]
    return "-".join(filter(None, cleaned)) or "set"


def _unused(name: str, names: Mapping[str, Source]) -> str:
    """Number a name that is taken."""
    number = 1
    candidate = name
    while candidate in names:
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def _same_set(source: Source, own: Source) -> bool:
    """Whether two sources select the same samples of the same shards, wherever these are."""

    def selection(of: Source) -> tuple[str | None, ...]:
        return of.dataset, of.split_by, of.split

    if selection(source) != selection(own):
        return False
    if source.index == own.index:
        return True

    fingerprint = open_index(source.index).fingerprint
    try:
        return open_index(own.index).fingerprint == fingerprint
    except InputError:
        # The run's own shards are not on this machine.
        return False
