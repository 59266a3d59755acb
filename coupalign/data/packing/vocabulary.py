"""Train a WordPiece vocabulary on the packed sentences.

The trainer is byte-pair merging over counted words, with ties broken alphabetically. Its output
depends on the multiset of sentences only: not on their order, on a hash seed or on the number of
processes. The trainer of the `tokenizers` library iterates over hash maps, so it makes no such
promise.
"""

from __future__ import annotations

import heapq
import string
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from tokenizers import normalizers, pre_tokenizers

from coupalign.data.tokenizer import MAX_WORD_CHARACTERS, SPECIAL
from coupalign.errors import InputError
from coupalign.files import whole_file

CONTINUATION = "##"  # opens a piece that does not start a word
MAX_RARE_CHARACTERS = 1000  # besides ASCII letters and digits; rarer ones become [UNK]
MIN_PAIR_COUNT = 2  # a pair that occurs only once is not merged

Pair = tuple[str, str]


def train_vocabulary(sentences: Iterable[str], path: Path, size: int = 8000) -> None:
    """Train a lower-case WordPiece vocabulary of at most `size` entries and write it to `path`.

    The same multiset of sentences gives the same bytes. [PAD] is line 0. The vocabulary contains
    every ASCII letter and digit, both at the start of a word and as a continuation, so an unseen
    word can still be spelled.

    Raises:
        InputError: no sentence contains a word, or `size` is too small for the single characters.
    """
    words = count_words(sentences)
    if not words:
        raise InputError(f"cannot train the vocabulary {path}: none of the sentences has a word")

    characters = choose_characters(words)
    required = len(SPECIAL) + len(characters)
    if size < required:
        raise InputError(
            f"vocabulary_size {size} is too small: special tokens and single characters alone "
            f"need {required}"
        )

    merged = merge_pairs(words, known=set(characters), max_pieces=size - required)
    with whole_file(Path(path), "w") as file:
        file.writelines(f"{piece}\n" for piece in (*SPECIAL, *characters, *merged))


def count_words(sentences: Iterable[str]) -> Counter[str]:
    """Count the words as the tokenizer splits them: lower case, without accents."""
    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()

    counts: Counter[str] = Counter()
    for sentence, times in Counter(sentences).items():
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(sentence)):
            if len(word) <= MAX_WORD_CHARACTERS:
                counts[word] += times
    return counts


def choose_characters(words: Counter[str]) -> list[str]:
    """Choose the single-character pieces: ASCII letters and digits plus the most frequent others.

    The result is sorted. A character at the start of a word and the same one inside a word (`##x`)
    are two pieces.
    """
    counts: Counter[str] = Counter()
    for word, times in words.items():
        for piece in split_characters(word):
            counts[piece] += times

    ascii_characters = string.ascii_lowercase + string.digits
    always = {*ascii_characters, *(CONTINUATION + character for character in ascii_characters)}
    others = sorted(counts.keys() - always, key=lambda piece: (-counts[piece], piece))
    return sorted(always.union(others[:MAX_RARE_CHARACTERS]))


def split_characters(word: str) -> list[str]:
    """Spell a word in single-character pieces: "red" -> ["r", "##e", "##d"]."""
    return [word[0], *(CONTINUATION + character for character in word[1:])]


def merge_pairs(words: Counter[str], known: set[str], max_pieces: int) -> list[str]:
    """Return the first `max_pieces` new pieces of byte-pair merging.

    Each merge takes the most frequent pair, and among equals the alphabetically first.

    Args:
        words: how often each word occurs.
        known: pieces that are in the vocabulary already.
        max_pieces: stop after this many new pieces.
    """
    corpus = _Corpus(words)
    heap = [(-count, pair) for pair, count in corpus.counts.items()]
    heapq.heapify(heap)

    vocabulary = set(known)
    new_pieces: list[str] = []
    while heap and len(new_pieces) < max_pieces:
        negative_count, pair = heapq.heappop(heap)
        if -negative_count != corpus.counts[pair]:
            continue  # an outdated entry: the count changed after it was pushed
        if -negative_count < MIN_PAIR_COUNT:
            break

        piece = pair[0] + pair[1].removeprefix(CONTINUATION)
        if piece not in vocabulary:
            vocabulary.add(piece)
            new_pieces.append(piece)

        # Push the new counts; the old entries of these pairs are outdated now.
        for changed in corpus.merge(pair, piece):
            if corpus.counts[changed] > 0:
                heapq.heappush(heap, (-corpus.counts[changed], changed))
    return new_pieces


class _Corpus:
    """The words in their current pieces, with the count of every pair of neighboring pieces."""

    def __init__(self, words: Counter[str]) -> None:
        self.spellings = [(split_characters(word), words[word]) for word in sorted(words)]
        self.counts: Counter[Pair] = Counter()
        self.words_with: defaultdict[Pair, set[int]] = defaultdict(set)  # indexes of `spellings`
        for index, (pieces, times) in enumerate(self.spellings):
            for pair in zip(pieces, pieces[1:]):
                self.counts[pair] += times
                self.words_with[pair].add(index)

    def merge(self, pair: Pair, piece: str) -> set[Pair]:
        """Replace `pair` by `piece` in every word; return the other pairs whose count changed."""
        changed: set[Pair] = set()
        for index in self.words_with.pop(pair):
            pieces, times = self.spellings[index]
            joined = _join(pieces, pair, piece)
            self.spellings[index] = (joined, times)

            for old in zip(pieces, pieces[1:]):
                self.counts[old] -= times
                changed.add(old)
            for new in zip(joined, joined[1:]):
                self.counts[new] += times
                self.words_with[new].add(index)
                changed.add(new)

        self.counts[pair] = 0
        changed.discard(pair)
        return changed


def _join(pieces: list[str], pair: Pair, piece: str) -> list[str]:
    """Replace each occurrence of `pair` by `piece`, from the left."""
    joined: list[str] = []
    for current in pieces:
        if joined and (joined[-1], current) == pair:
            joined[-1] = piece
        else:
            joined.append(current)
    return joined
