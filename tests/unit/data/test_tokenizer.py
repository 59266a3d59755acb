"""Token numbers, and the ways to open a tokenizer."""

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


def test_vocabulary_begins_with_the_special_tokens(vocabulary: Path):
    tokenizer = Tokenizer.open(vocabulary)

    lines = vocabulary.read_text(encoding="utf-8").split("\n")
    assert lines[:5] == list(SPECIAL)
    assert len(tokenizer) == len(lines) - 1


def test_encode_frames_cuts_and_pads(vocabulary: Path):
    tokenizer = Tokenizer.open(vocabulary)
    too_long = "the man's box on the left of the upper right café"

    words, mask, cut = tokenizer.encode(["The RED box", "", too_long], 8)

    assert words.dtype == torch.int64 and mask.dtype == torch.bool
    assert words.shape == mask.shape == (3, 8)
    assert cut == [False, False, True]

    # Lower case is the same text.
    assert [tokenizer.vocabulary[n] for n in words[0, 1:4]] == ["the", "red", "box"]
    assert words[0].tolist() == tokenizer.encode(["the red box"], 8)[0][0].tolist()

    # [CLS] is 2, [SEP] is 3, [PAD] is 0.
    assert words[1].tolist() == [2, 3, 0, 0, 0, 0, 0, 0]
    assert mask[1].tolist() == [True] * 2 + [False] * 6
    assert mask[2].all() and words[2, 0] == 2 and words[2, -1] == 3


def test_sentence_of_exactly_the_limit_is_not_cut(vocabulary: Path):
    tokenizer = Tokenizer.open(vocabulary)

    _, _, cut_at_five = tokenizer.encode(["the red box"], 5)
    _, _, cut_at_four = tokenizer.encode(["the red box"], 4)

    assert cut_at_five == [False]
    assert cut_at_four == [True]


def test_sentence_without_a_known_word_is_unknown(vocabulary: Path):
    tokenizer = Tokenizer.open(vocabulary)
    sentences = ["红色的杯子", "日 box", "box", "", "日 日 box"]

    words, _, _ = tokenizer.encode(sentences, 4)

    # The last one is cut before its known word.
    assert tokenizer.unknown(words) == [True, False, False, True, True]


def test_unseen_word_is_spelled_and_foreign_letter_is_unknown(vocabulary: Path):
    tokenizer = Tokenizer.open(vocabulary)

    assert "".join(tokenizer.tokens("zyx9")).replace("##", "") == "zyx9"
    assert tokenizer.tokens("日") == ["[UNK]"]


def test_saved_tokenizer_opens_with_the_same_ids(vocabulary: Path, tmp_path: Path):
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


def test_transformers_opens_a_saved_tokenizer(vocabulary: Path, tmp_path: Path):
    from coupalign.compat import prepare_torchvision

    prepare_torchvision()
    from transformers import AutoTokenizer

    ours = Tokenizer.open(vocabulary)
    ours.save(tmp_path / "saved")
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "saved"))

    encoded = theirs(SENTENCES, padding="max_length", max_length=12, truncation=True)

    assert len(theirs) == len(ours)
    assert encoded["input_ids"] == ours.encode(SENTENCES, 12)[0].tolist()


@pytest.mark.parametrize("name", ["./nowhere", "a/b/vocab.txt"])
def test_missing_tokenizer_file_is_refused(name: str):
    with pytest.raises(InputError, match="no such file"):
        Tokenizer.open(name)


def test_unknown_hub_name_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    with pytest.raises(InputError, match="no-such-bert.*local folder"):
        Tokenizer.open("no-such-bert")


@pytest.mark.parametrize(
    "text, message",
    [
        ("[PAD]\n[UNK]\nred\nred\n", "'red' is listed twice"),
        ("red\nblue\n", r"\[UNK\] is missing"),
        ("[PAD]\n[UNK]\nred\n", r"\[CLS\], \[SEP\] not in"),
        ("[PAD]\n[UNK]\n[CLS]\n[SEP]\nred\n", "its vocabulary has only 5 entries"),
    ],
)
def test_broken_vocabulary_is_refused(tmp_path: Path, text: str, message: str):
    (tmp_path / "vocab.txt").write_text(text)

    with pytest.raises(InputError, match=message):
        Tokenizer.open(tmp_path)


def test_vocabulary_that_is_no_text_is_refused(tmp_path: Path):
    (tmp_path / "vocab.txt").write_bytes(b"[PAD]\n\xff\xfe\n")

    with pytest.raises(InputError, match="vocab.txt cannot be read"):
        Tokenizer.open(tmp_path)


def test_folder_without_a_tokenizer_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="neither tokenizer.json nor vocab.txt"):
        Tokenizer.open(tmp_path)


def test_broken_tokenizer_files_are_refused(vocabulary: Path):
    (vocabulary.parent / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match="tokenizer_config.json: cannot be read"):
        Tokenizer.open(vocabulary)

    (vocabulary.parent / "tokenizer_config.json").write_text("[]")
    with pytest.raises(InputError, match="tokenizer_config.json: expected an object"):
        Tokenizer.open(vocabulary)

    (vocabulary.parent / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="tokenizer.json cannot be read"):
        Tokenizer.open(vocabulary.parent)


def test_first_difference_names_the_first_other_token(vocabulary: Path, tmp_path: Path):
    tokenizer = Tokenizer.open(vocabulary)
    words = list(tokenizer.vocabulary)
    tokenizer.save(tmp_path / "saved")

    # The same one, however it was written.
    assert tokenizer.first_difference(Tokenizer.open(tmp_path / "saved")) is None

    number = words.index("right")
    words[number] = "rigHt"
    (tmp_path / "other.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    difference = tokenizer.first_difference(Tokenizer.open(tmp_path / "other.txt"))
    assert difference == f"token {number} was 'right', is 'rigHt'"

    (tmp_path / "shorter.txt").write_text(
        "".join(f"{word}\n" for word in tokenizer.vocabulary[:-1]), encoding="utf-8"
    )
    difference = tokenizer.first_difference(Tokenizer.open(tmp_path / "shorter.txt"))
    assert difference.startswith(f"token {len(words) - 1} was ") and difference.endswith("is ''")


def test_first_difference_notices_another_treatment_of_capitals(vocabulary: Path, tmp_path: Path):
    tokenizer = Tokenizer.open(vocabulary)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')

    difference = tokenizer.first_difference(Tokenizer.open(vocabulary))

    assert difference == "its vocabulary is the same, but it splits sentences in another way"
