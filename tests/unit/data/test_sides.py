"""Left and right in sentences: exchanged where that is certain, else the sample is not mirrored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coupalign.data.sides import is_english, mirror_sentence, names_side


@pytest.mark.parametrize(
    "sentence, mirrored",
    [
        ("the left man", "the right man"),
        ("leftmost zebra", "rightmost zebra"),
        ("right-most", "left-most"),
        ("left-hand side, right hand side", "right-hand side, left hand side"),
        ("lefthand man", "righthand man"),
        ("Left guy ON THE RIGHT", "Right guy ON THE LEFT"),
        ("upper-left, topright", "upper-right, topleft"),
        ("second from the left.", "second from the right."),
        ("left's", "right's"),
        ("man on the right behind her", "man on the left behind her"),
        ("leftover pizza in bright light", "leftover pizza in bright light"),
        ("copyright uprights", "copyright uprights"),
        ("", ""),
    ],
)
def test_mirror_exchanges_left_and_right_as_whole_words(sentence: str, mirrored: str):
    assert mirror_sentence(sentence) == mirrored
    assert mirror_sentence(mirrored) == sentence


@pytest.mark.parametrize(
    "sentence",
    [
        "man right next to her",
        "cup right behind",
        "at 3 o'clock",
        "guy on l",
        "lft guy",
        "all right",
        "clockwise second",
        "r side",
    ],
)
def test_sentence_of_uncertain_meaning_is_not_mirrored(sentence: str):
    assert mirror_sentence(sentence) is None


@pytest.mark.parametrize(
    "sentence",
    [
        # Typing errors.
        *("rigth guy", "guy on rihgt", "letf one", "lefft woman", "leftt guy", "righ person"),
        *("leeeft", "riiight one", "elft guy", "rgiht", "riht", "reight car", "lef car", "lwft"),
        *("lefmost", "rigthmost", "toprigth", "frontlefft", "left2", "3rdleft", "rights", "l3ft"),
        # Abbreviations and forms that are not exchanged.
        *("rhs car", "LHS", "leftest", "leftish", "RH side", "L/R", "rightful", "lefty", "lt guy"),
        # Other languages.
        *("左边的人", "homme à gauche", "homme a gauche", "der linke Mann", "la silla izquierda"),
        *(
            "il ragazzo a destra",
            "человек слева",
            "男性の右",
            "mężczyzna po lewej",
            "mand til venstre",
        ),
        *("links", "Mann rechts", "der Mann", "сlock", "le chat noir"),
        # What remains, and what is correct.
        *("left over pizza", "left-over pizza", "the only one left", "last slice left"),
        *("pizza left on the plate", "what's left", "the man who left", "nothing left", "is left"),
        *("bag left unattended", "left behind bag", "half that is left", "they have left"),
        *("that's right", "that’s right", "thats right", "you're right", "it is right", "alright"),
        *("right size", "right there", "right  next to her", "right up front"),
        # A clock and a map.
        *("10:00", "at 12 : 30", "sandwich half at 1200", "3 o’clock", "10 oclock", "at 9"),
        *("northeast corner", "north-west", "NE", "starboard", "western side", "eastward"),
    ],
)
def test_sentence_that_may_name_a_side_is_not_mirrored(sentence: str):
    assert mirror_sentence(sentence) is None


@pytest.mark.parametrize(
    "sentence",
    [
        *("light blue shirt", "night stand", "the tall building", "bright light", "eight people"),
        *("letter on the wall", "fight", "tights", "height", "weight lifter", "loft bed"),
        *("brighter one", "upright bottle", "lifted arm", "delight", "lightning", "slight man"),
        *("second from top", "leftover cake", "3 people", "number 23", "belt", "felt hat", "gift"),
        *("cat – sleeping", "“big” dog", "lefse", "melted cheese", "soft toy", "sleigh", "raft"),
        *("the only man", "last one", "has been eaten", "is standing", "port of call", "ship"),
    ],
)
def test_sentence_without_a_side_stays(sentence: str):
    assert mirror_sentence(sentence) == sentence


@pytest.mark.parametrize(
    ("sentence", "mirrored"),
    [
        ("man on left over there", "man on right over there"),
        ("who is left of the tree", "who is right of the tree"),
        ("the only man on the left", "the only man on the right"),
        ("bag furthest left on the shelf", "bag furthest right on the shelf"),
        ("that is right of the dog", "that is left of the dog"),
        ("left light", "right light"),
        ("the bottom right thing", "the bottom left thing"),
    ],
)
def test_plain_side_beside_an_ambiguous_word_is_exchanged(sentence: str, mirrored: str):
    assert mirror_sentence(sentence) == mirrored


@given(st.text())
def test_mirroring_twice_gives_the_sentence_back(sentence: str):
    mirrored = mirror_sentence(sentence)

    if mirrored is not None:
        assert mirror_sentence(mirrored) in (sentence, None)
        assert len(mirrored) - len(sentence) == mirrored.lower().count("right") - (
            sentence.lower().count("right")
        )


@given(
    st.sampled_from(["left", "right"]),
    st.integers(0, 5),
    st.sampled_from("abcdefghijklmnopqrstuvwxyz"),
    st.sampled_from(["drop", "swap", "change", "add"]),
)
def test_no_single_typing_error_passes_as_a_word_without_a_side(
    side: str, place: int, letter: str, error: str
):
    place = min(place, len(side) - 1)
    word = {
        "drop": side[:place] + side[place + 1 :],
        "swap": side[:place] + side[place + 1 : place + 2] + side[place] + side[place + 2 :],
        "change": side[:place] + letter + side[place + 1 :],
        "add": side[:place] + letter + side[place:],
    }[error]

    mirrored = mirror_sentence(f"{word} man")

    # Words that are English keep their meaning.
    english = (
        "let lift loft lent lest heft weft deft cleft light night sight might fight tight eight"
    )
    english += " wight bight bright fright wright"
    if word in (*english.split(), "left", "right"):
        assert mirrored is not None
    else:
        assert mirrored is None


def test_few_sentences_of_real_people_are_not_mirrored(real_data: Path):
    records = json.loads((real_data / "gref_google_val_gt.json").read_text())
    sentences = [record["sent"] for record in records]

    kept = [sentence for sentence in sentences if mirror_sentence(sentence) is None]

    assert len(kept) < 0.005 * len(sentences)
    assert {"lefft guy sitting", "the phone to the righ"} <= {*kept}


def test_names_side_sees_misspelled_sides_but_no_other_language():
    assert names_side("left man") and names_side("rigth man") and names_side("guy on l")
    assert not names_side("the café") and not names_side("red light")
    assert is_english("plain – text") and not is_english("the café")
