"""Train a WordPiece vocabulary on the packed sentences."""

from __future__ import annotations

import heapq
import string
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import normalizers, pre_tokenizers

from coupalign.data.tokenizer import _LONGEST_WORD, SPECIAL
from coupalign.errors import InputError
from coupalign.files import whole_file

if TYPE_CHECKING:
    pass

_LARGEST_ALPHABET = 1000  # characters; rarer ones become [UNK]


def train_vocabulary(sentences: Iterable[str], path: Path, size: int = 8000) -> None:
    """Write a lower-case WordPiece vocabulary of at most `size` lines to `path`.

    The same multiset of sentences gives the same bytes. [PAD] is line 0; every ASCII letter and digit is in it, alone
    and as a continuation, so that a word never seen is still spelled.

    Raises:
        InputError: no sentence holds a word, or `size` leaves no room beside the letters.
    """
    words = _count_words(sentences)
    if not words:
        raise InputError(f"cannot learn the vocabulary {path}: none of the sentences holds a word")
    alphabet = _alphabet(words)
    room = size - len(SPECIAL) - len(alphabet)
    if room < 0:
        raise InputError(
            f"a vocabulary of {size} is too small: its letters alone need {len(SPECIAL) + len(alphabet)}"
        )
    with whole_file(Path(path), "w") as file:
        file.write(
            "".join(
                f"{piece}\n" for piece in (*SPECIAL, *alphabet, *_merge(words, set(alphabet), room))
            )
        )


def _count_words(sentences: Iterable[str]) -> Counter[str]:
    normalizer, splitter = (
        normalizers.BertNormalizer(lowercase=True),
        pre_tokenizers.BertPreTokenizer(),
    )
    counts: Counter[str] = Counter()
    for sentence, times in Counter(sentences).items():
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(sentence)):
            counts[word] += times
    return Counter({word: times for word, times in counts.items() if len(word) <= _LONGEST_WORD})


def _alphabet(words: Counter[str]) -> list[str]:
    """Characters at the start of a word and, with ##, inside one; the most frequent ones, in the order of the alphabet."""
    counts: Counter[str] = Counter()
    for word, times in words.items():
        for piece in _spell(word):
            counts[piece] += times
    always = {
        mark + letter for letter in string.ascii_lowercase + string.digits for mark in ("", "##")
    }
    frequent = sorted(counts.keys() - always, key=lambda piece: (-counts[piece], piece))
    return sorted(always.union(frequent[:_LARGEST_ALPHABET]))


def _spell(word: str) -> list[str]:
    return [word[0], *("##" + letter for letter in word[1:])]


def _merge(words: Counter[str], known: set[str], room: int) -> list[str]:
    """The first `room` new pieces of byte-pair merging: always the most frequent pair, then the first in the alphabet."""
    spelled = [(_spell(word), words[word]) for word in sorted(words)]
    counts: Counter[tuple[str, str]] = Counter()
    places: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for place, (pieces, times) in enumerate(spelled):
        for pair in zip(pieces, pieces[1:]):
            counts[pair] += times
            places[pair].add(place)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    merged: list[str] = []
    while heap and len(merged) < room:
        count, pair = heapq.heappop(heap)
        if -count != counts[pair]:
            continue  # an old entry: the pair was counted again since
        if -count < 2:
            break  # what occurs once is not worth a line
        whole = pair[0] + pair[1][2:]
        if whole not in known:
            known.add(whole)
            merged.append(whole)
        for changed in _replace(pair, whole, spelled, counts, places):
            if counts[changed] > 0:
                heapq.heappush(heap, (-counts[changed], changed))
    return merged


def _replace(
    pair: tuple[str, str],
    whole: str,
    spelled: list[tuple[list[str], int]],
    counts: Counter[tuple[str, str]],
    places: defaultdict[tuple[str, str], set[int]],
) -> set[tuple[str, str]]:
    """Write `whole` for `pair` in every word that has it; return the pairs whose count changed."""
    changed: set[tuple[str, str]] = set()
    for place in places.pop(pair):
        pieces, times = spelled[place]
        joined: list[str] = []
        for piece in pieces:
            if joined and (joined[-1], piece) == pair:
                joined[-1] = whole
            else:
                joined.append(piece)
        for old in zip(pieces, pieces[1:]):
            counts[old] -= times
            changed.add(old)
        for new in zip(joined, joined[1:]):
            counts[new] += times
            places[new].add(place)
            changed.add(new)
        spelled[place] = (joined, times)
    counts[pair] = 0
    changed.discard(pair)
    return changed
