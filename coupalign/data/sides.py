"""Left and right in sentences, for mirrored pictures.

A mirrored picture needs a mirrored sentence, and a wrong one teaches the model the wrong side. So a
sentence is mirrored only if every word in it that may name a side is one that is known to. People
type in haste ("rigth guy"), abbreviate ("rhs"), write another language, or mean another thing ("the
only one left", "that's right").
"""

from __future__ import annotations

import re
import string
from functools import lru_cache


def mirror_sentence(sentence: str) -> str | None:
    """Exchange left and right in a sentence, for the mirrored image.

    Exchanges whole words only ("leftmost", "left-hand", "topright", ...). A word that merely
    contains one ("bright", "leftover") stays.

    Returns:
        the sentence; or None if its meaning in a mirror is not certain: "right behind", "at 3
        o'clock", "guy on l", "rigth guy", "pizza left over", and any letters but those of English.
        Such a sample must not be mirrored.
    """
    if not is_english(sentence) or _is_unsure(_plain(sentence)):
        return None
    return _SIDE.sub(_opposite_side, sentence)


def names_side(sentence: str) -> bool:
    """Return whether a sentence names a side, perhaps misspelled or in another sense."""
    text = _plain(sentence)
    return _SIDE.search(text) is not None or _is_unsure(text)


def _plain(sentence: str) -> str:
    """Return a sentence in lower case, with one space between words and plain apostrophes."""
    return " ".join(sentence.lower().replace("\u2019", "'").split())


def is_english(sentence: str) -> bool:
    """Return whether a sentence has no letters and none of the little words of other languages."""
    if not sentence.isascii() and any(letter > "\x7f" and letter.isalpha() for letter in sentence):
        return False
    return _FOREIGN_WORDS.isdisjoint(_WORD.findall(sentence.lower()))


def _is_unsure(text: str) -> bool:
    words = _WORD.findall(text)
    if not _ABBREVIATIONS.isdisjoint(words) or _CLOCK_OR_MAP.search(text):
        return True
    if ("left" in text or "right" in text) and _OTHER_SENSE.search(text):
        return True
    return any(_may_be_a_side(word) for word in words)


@lru_cache(maxsize=100_000)
def _may_be_a_side(word: str) -> bool:
    """Whether a word may be a side in a form that is not known, as with a typing error."""
    if _SIDE.fullmatch(word) or _OTHER_WORD.fullmatch(word):
        return False

    without_repeats = re.sub(r"(.)\1+", r"\1", word)
    if any(side in text for side in ("left", "right") for text in (word, without_repeats)):
        return True

    core = _AFFIXES.sub("", word)
    return core in _MISSPELLED and not _OTHER_WORD.fullmatch(core)


def _opposite_side(match: re.Match[str]) -> str:
    """Replace the side in a match of `_SIDE`, in the same case."""
    before, side, after = match.group(1) or "", match.group(2), match.group(3) or ""
    opposite = {"left": "right", "right": "left"}[side.lower()]
    if side.isupper():
        opposite = opposite.upper()
    elif side[0].isupper():
        opposite = opposite.capitalize()
    return before + opposite + after


def _any_of(words: str) -> str:
    """Return a pattern that matches any of the words."""
    return "|".join(words.split())


def _one_error_away(word: str) -> set[str]:
    """Return what becomes of a word by one missing, wrong, additional or exchanged letter."""
    letters = string.ascii_lowercase + string.digits
    found = set()
    for place in range(len(word) + 1):
        before, after = word[:place], word[place:]
        found.add(before + after[1:])
        found.add(before + after[1:2] + after[:1] + after[2:])
        for letter in letters:
            found.add(before + letter + after)
            found.add(before + letter + after[1:])
    return found - {word}


# A word with a side in it: its first part, its side, its last part.
_BEFORE = _any_of("top bottom upper lower far front back mid middle center")
_AFTER = _any_of("most hand handed hander side sided ward wards er")
_SIDE = re.compile(rf"(?<![a-z0-9])({_BEFORE})?(left|right)({_AFTER})?(?![a-z0-9])", re.IGNORECASE)

_WORD = re.compile(r"[a-z0-9]+")
_AFFIXES = re.compile(rf"^(?:{_BEFORE})|(?:most|hand|handed|side|sided|wards?|est|ish)$")
_MISSPELLED = _one_error_away("left") | _one_error_away("right")

# English words that contain a side, or are one letter away from one.
_OTHER_WORD = re.compile(
    r"leftovers?|(?:b|f|up|copy|out|forth|birth|w|play|ship|cart|wheel|arkw|boatw)w?right\w*"
    rf"|{_any_of('let lift loft lent lest heft weft deft cleft')}"
    rf"|{_any_of('light night sight might fight tight eight wight bight')}"
)

# Before "left" and "right", these make it a side. Without them, "right next to" means "directly
# next to" and "pizza left on the plate" means what remains.
_MAKES_A_SIDE = "the on to at far furthest farthest top bottom upper lower".split()
_NO_SIDE = "".join(f"(?<!{word} )" for word in _MAKES_A_SIDE)
_NO_SIDE_AFTER = r"(?! (?:of|side|hand|handed|most|corner|half|end|edge|to right|and right))"

_OTHER_SENSE = re.compile(
    r"(?<!\w)(?:"
    # "right" in the sense of "directly".
    rf"{_NO_SIDE}right (?:next|behind|above|below|beneath|under|underneath|over|beside|near|by"
    r"|there|here|now|before|after|where|up|in|on top|at|away|through|against|between)"
    # "right" in the sense of "correct", which has no opposite on the other side.
    r"|all right|alright"
    r"|(?:that'?s|it's|(?:that|it|he|she|who|which) is|you'?re|you are) right"
    rf"{_NO_SIDE_AFTER}"
    rf"|{_NO_SIDE}right (?:answer|angle|size|amount|kind|idea|of way)"
    # "left" in the sense of "remaining" or "gone".
    rf"|{_NO_SIDE}left(?: |-)(?:overs?|behind|alone|out|open|off|unattended|empty|uneaten"
    r"|untouched|unfinished|in|on|for|by|with|after|the|a|an|his|her|their|my|it)"
    r"|(?:ones?|is|are|was|were|be|been|being|has|have|had|just|already|who|nothing|something"
    rf"|anything|what'?s|much|many|some|little) left{_NO_SIDE_AFTER}"
    rf"|(?:only|last|remaining|single|final) .*{_NO_SIDE}left{_NO_SIDE_AFTER}"
    r")(?!\w)"
)

# Directions on a clock, a map or a ship. "1200" is what remains of "12:00".
_CLOCK_OR_MAP = re.compile(
    r"(?<!\w)(?:"
    r"\d*o'? ?clock|(?:anti|counter)?-?clockwise|\d{1,2} ?: ?\d\d|at \d+"
    r"|(?:1[0-2]|0?[1-9])(?:00|15|30|45)"
    r"|(?:north|south)?-?(?:east|west)(?:ern|erly|wards?)?"
    r"|starboard|larboard|port ?side"
    r")(?!\w)"
)

_ABBREVIATIONS = frozenset("l r lt rt lft rgt rite lf lh rh lhs rhs ltr rtl nw ne sw se".split())

# Sides in other languages that are typed without accents, and the most frequent little words of
# these languages. "die", "den" and "van" are English, too.
_FOREIGN_WORDS = frozenset(
    """
    links linke linken linker linkes linkse rechts rechte rechten rechter rechtes
    gauche droite droit izquierda izquierdo derecha derecho sinistra sinistro destra destro
    esquerda esquerdo direita direito esquerra dreta stanga dreapta
    lewa lewy lewo lewej lewym prawa prawy prawo prawej prawym vlevo vpravo levo pravo levy pravy
    leva prava sleva sprava venstre vanster hoyre hojre hoger vasen oikea vasemmalla oikealla
    balra jobbra jobb sol sag solda sagda soldaki sagdaki kiri kanan hidari migi zuobian youbian
    kushoto kulia aristera dexia
    le la les une du des au aux el los las una il gli der das dem ein eine einen
    mit auf und het een och og jest dla
    """.split()
)
