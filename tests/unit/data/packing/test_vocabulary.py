"""Training a WordPiece vocabulary on sentences."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coupalign.data.packing.vocabulary import (
    count_words,
    merge_pairs,
    split_characters,
    train_vocabulary,
)
from coupalign.data.tokenizer import Tokenizer
from coupalign.errors import InputError

SENTENCES = 3 * [
    "the red box on the left",
    "leftmost red boxes",
    "A man's Café – upper-left",
    "man on the right",
    "right box",
]


def test_bytes_do_not_depend_on_order_process_or_hash_seed(tmp_path: Path):
    train_vocabulary(SENTENCES, tmp_path / "expected.txt", 200)
    expected = (tmp_path / "expected.txt").read_bytes()
    code = (
        "import sys, json\n"
        "from pathlib import Path\n"
        "from coupalign.data.packing.vocabulary import train_vocabulary\n"
        "train_vocabulary(json.loads(sys.argv[1]), Path(sys.argv[2]), 200)"
    )

    for seed in range(2):
        shuffled = SENTENCES.copy()
        random.Random(seed).shuffle(shuffled)
        out = tmp_path / f"{seed}.txt"
        subprocess.run(
            [sys.executable, "-c", code, json.dumps(shuffled), str(out)],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": str(seed + 1)},
        )

        assert out.read_bytes() == expected


def merge_pairs_slowly(words: Counter[str], max_pieces: int) -> list[str]:
    """Byte-pair merging that counts every pair again before each merge."""
    spellings = {word: split_characters(word) for word in words}
    known = {piece for pieces in spellings.values() for piece in pieces}
    new_pieces: list[str] = []
    while len(new_pieces) < max_pieces:
        counts: Counter[tuple[str, str]] = Counter()
        for word, pieces in spellings.items():
            for pair in zip(pieces, pieces[1:]):
                counts[pair] += words[word]
        if not counts or max(counts.values()) < 2:
            break

        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merged = best[0] + best[1][2:]
        if merged not in known:
            known.add(merged)
            new_pieces.append(merged)

        for word, pieces in spellings.items():
            index, joined = 0, []
            while index < len(pieces):
                is_best = tuple(pieces[index : index + 2]) == best
                joined.append(merged if is_best else pieces[index])
                index += 2 if is_best else 1
            spellings[word] = joined
    return new_pieces


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text("abc", min_size=1, max_size=9), st.integers(1, 5), min_size=1, max_size=25
    ),
    st.integers(0, 40),
)
def test_merging_equals_counting_again_before_each_merge(words: dict[str, int], max_pieces: int):
    counts = Counter(words)
    known = {piece for word in words for piece in split_characters(word)}

    merged = merge_pairs(counts, known, max_pieces)

    assert merged == merge_pairs_slowly(counts, max_pieces)


def test_words_are_counted_in_lower_case_without_accents():
    assert count_words(["Café, café!", "cafe"])["cafe"] == 3


def test_empty_sentences_and_too_small_a_size_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="none of the sentences"):
        train_vocabulary(["", "  "], tmp_path / "vocab.txt")
    with pytest.raises(InputError, match="vocabulary_size 50 is too small"):
        train_vocabulary(SENTENCES, tmp_path / "vocab.txt", 50)

    assert not list(tmp_path.iterdir())


def test_vocabulary_covers_unseen_real_sentences(real_data: Path, tmp_path: Path):
    records = json.loads((real_data / "gref_google_val_gt.json").read_text())
    sentences = [record["sent"] for record in records]

    train_vocabulary(sentences[:4000], tmp_path / "vocab.txt", 2000)
    tokenizer = Tokenizer.open(tmp_path)
    tokens, mask, cut = tokenizer.encode(sentences[4000:], 20)

    assert len(tokenizer) == 2000
    assert ((tokens == 1) & mask).sum() / mask.sum() < 1e-3  # almost no [UNK]
    assert 0.01 < sum(cut) / len(cut) < 0.25  # some sentences are longer than 18 pieces
