"""Learning a vocabulary, numbering words, and the ways to open a tokenizer."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from coupalign.data.packing.vocabulary import train_vocabulary
from coupalign.data.tokenizer import SPECIAL, Tokenizer
from coupalign.errors import InputError

SENTENCES = 3 * [
    "the red box on the left",
    "leftmost red boxes",
    "A man's Café – upper-left",
    "man on the right",
    "right box",
]


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    train_vocabulary(SENTENCES, tmp_path / "vocab.txt", 200)
    return tmp_path / "vocab.txt"


def test_ids_of_the_special_tokens_and_frame(vocabulary: Path):
    tokenizer = Tokenizer.open(vocabulary)
    assert vocabulary.read_text(encoding="utf-8").split("\n")[:5] == list(SPECIAL)
    assert len(tokenizer) == len(vocabulary.read_text(encoding="utf-8").split("\n")) - 1
    words, mask, cut = tokenizer.encode(
        ["The RED box", "", "the man's box on the left of the upper right café"], 8
    )
    assert (
        words.dtype == torch.int64
        and mask.dtype == torch.bool
        and words.shape == mask.shape == (3, 8)
    )
    assert cut == [False, False, True]
    assert (
        words[1].tolist() == [2, 3, 0, 0, 0, 0, 0, 0]
        and mask[1].tolist() == [True] * 2 + [False] * 6
    )
    assert mask[2].all() and words[2, 0] == 2 and words[2, -1] == 3
    assert [tokenizer.vocabulary[n] for n in words[0, 1:4]] == ["the", "red", "box"]
    assert words[0].tolist() == tokenizer.encode(["the red box"], 8)[0][0].tolist()


def test_the_limit_itself_is_not_a_cut(vocabulary: Path):
    tokenizer = Tokenizer.open(vocabulary)
    assert tokenizer.encode(["the red box"], 5)[2] == [False] and tokenizer.encode(
        ["the red box"], 4
    )[2] == [True]


def test_a_word_never_seen_is_spelled_and_a_foreign_letter_unknown(vocabulary: Path):
    tokenizer = Tokenizer.open(vocabulary)
    assert "".join(tokenizer.tokens("zyx9")).replace("##", "") == "zyx9"
    assert tokenizer.tokens("日") == ["[UNK]"]


def test_saved_and_opened_gives_the_same_ids(vocabulary: Path, tmp_path: Path):
    from coupalign.compat import prepare_torchvision

    prepare_torchvision()
    from transformers import AutoTokenizer

    first = Tokenizer.open(vocabulary)
    first.save(tmp_path / "saved")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "vocab.txt").write_bytes((tmp_path / "saved" / "vocab.txt").read_bytes())
    others = [
        Tokenizer.open(tmp_path / "saved"),
        Tokenizer.open(tmp_path / "bare"),
        pickle.loads(pickle.dumps(first)),
    ]
    for other in others:
        assert other.fingerprint == first.fingerprint and len(other) == len(first)
        assert torch.equal(other.encode(SENTENCES, 12)[0], first.encode(SENTENCES, 12)[0])
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "saved"))
    assert len(theirs) == len(first)
    ids = theirs(SENTENCES, padding="max_length", max_length=12, truncation=True)["input_ids"]
    assert ids == first.encode(SENTENCES, 12)[0].tolist()


@pytest.mark.parametrize(
    "name, words", [("./nowhere", "no such file"), ("a/b/vocab.txt", "no such file")]
)
def test_a_missing_tokenizer_is_named(name: str, words: str):
    with pytest.raises(InputError, match=words):
        Tokenizer.open(name)


def test_a_hub_name_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="no-such-bert.*local folder"):
        Tokenizer.open("no-such-bert")


@pytest.mark.parametrize(
    "text, words",
    [
        ("[PAD]\n[UNK]\nred\nred\n", "'red' is listed twice"),
        ("red\nblue\n", r"\[UNK\] is missing"),
        ("[PAD]\n[UNK]\nred\n", r"\[CLS\], \[SEP\] not in"),
        ("[PAD]\n[UNK]\n[CLS]\n[SEP]\nred\n", "its vocabulary has only 5 entries"),
    ],
)
def test_a_broken_vocabulary_is_refused(tmp_path: Path, text: str, words: str):
    (tmp_path / "vocab.txt").write_text(text)
    with pytest.raises(InputError, match=words):
        Tokenizer.open(tmp_path)


def test_other_broken_tokenizers_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="neither tokenizer.json nor vocab.txt"):
        Tokenizer.open(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer.json cannot be read"):
        Tokenizer.open(tmp_path)
