"""Sentences to token numbers, with a WordPiece tokenizer.

The tokenizer is the text encoder's own, or one whose vocabulary `coupalign pack` trained on the
packed sentences (see `data/packing/vocabulary.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from coupalign.errors import InputError
from coupalign.files import read_json, whole_file, write_json

if TYPE_CHECKING:
    import torch

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MIN_VOCABULARY = 10  # tokens
MAX_WORD_CHARACTERS = 100  # WordPiece calls a longer word unknown


class Tokenizer:
    """A WordPiece tokenizer that frames a sentence as [CLS] … [SEP]. It can be pickled.

    Attributes:
        source: the file, folder or hub name that it was opened from.
    """

    def __init__(self, backend: tokenizers.Tokenizer, source: str) -> None:
        backend.no_truncation()
        backend.no_padding()

        needed = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
        missing = [token for token in needed if backend.token_to_id(token) is None]
        if missing:
            raise InputError(
                f"tokenizer {source}: {', '.join(missing)} not in the vocabulary; "
                "it is no BERT tokenizer"
            )
        if backend.get_vocab_size() < MIN_VOCABULARY:
            raise InputError(
                f"tokenizer {source}: its vocabulary has only {backend.get_vocab_size()} entries. "
                "Is vocab.txt truncated?"
            )

        self.source = source
        self._backend = backend
        self._pad = backend.token_to_id("[PAD]")
        self._unknown = backend.token_to_id("[UNK]")
        self._start = backend.token_to_id("[CLS]")
        self._end = backend.token_to_id("[SEP]")

    @classmethod
    def open(cls, name: str | Path) -> Tokenizer:
        """Open a tokenizer.

        Args:
            name: a folder (its tokenizer.json, else its vocab.txt), a vocabulary file, or a name on
                the Hugging Face hub.

        Raises:
            InputError: there is nothing of that name, or it is no BERT tokenizer.
        """
        path, source = Path(name).expanduser(), str(name)
        if path.is_file():
            return cls(_read_backend(path), source)
        if path.is_dir():
            for file in (path / "tokenizer.json", path / "vocab.txt"):
                if file.is_file():
                    return cls(_read_backend(file), source)
            raise InputError(f"tokenizer folder {path} holds neither tokenizer.json nor vocab.txt")

        # Do not ask the hub for what is meant as a path.
        is_path = (
            source.startswith(("/", "./", "../", "~"))
            or source.count("/") > 1
            or path.suffix in (".txt", ".json")
        )
        if is_path:
            raise InputError(f"tokenizer {source}: no such file or folder")
        return cls(_fetch_backend(source), source)

    def encode(
        self, sentences: Sequence[str], max_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
        """Tokenize sentences, and cut or pad them to one length.

        Returns:
            words: int64 [B, max_tokens], token numbers, padded with [PAD].
            mask: bool [B, max_tokens], true up to and including [SEP].
            cut: for each sentence, whether it was longer and has been cut. Its [SEP] is kept.
        """
        import torch

        max_pieces = max_tokens - 2  # besides [CLS] and [SEP]
        rows, lengths, cut = [], [], []
        for sentence in sentences:
            pieces = self._backend.encode(sentence, add_special_tokens=False).ids
            framed = [self._start, *pieces[:max_pieces], self._end]
            rows.append(framed + [self._pad] * (max_tokens - len(framed)))
            lengths.append(len(framed))
            cut.append(len(pieces) > max_pieces)

        words = torch.tensor(rows, dtype=torch.int64).view(-1, max_tokens)
        mask = torch.arange(max_tokens) < torch.tensor(lengths, dtype=torch.int64)[:, None]
        return words, mask, cut

    def unknown(self, words: torch.Tensor) -> list[bool]:
        """Tell for each sentence whether none of its tokens is in the vocabulary.

        All such sentences are the same to the model.

        Args:
            words: int64 [B, T], of `encode`.
        """
        import torch

        without_meaning = torch.tensor([self._pad, self._start, self._end, self._unknown])
        return torch.isin(words, without_meaning).all(dim=1).tolist()

    def tokens(self, sentence: str) -> list[str]:
        """Split a sentence into tokens, without [CLS] and [SEP]."""
        return self._backend.encode(sentence, add_special_tokens=False).tokens

    def __len__(self) -> int:
        return self._backend.get_vocab_size()

    @property
    def vocabulary(self) -> list[str]:
        """Every token, by its number. A number without a token is the empty string."""
        ids = self._backend.get_vocab()
        listed = [""] * (max(ids.values()) + 1)
        for token, number in ids.items():
            listed[number] = token
        return listed

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary in the order of its numbers, in hex."""
        return hashlib.sha256("\n".join(self.vocabulary).encode()).hexdigest()

    def first_difference(self, other: Tokenizer) -> str | None:
        """Say how `other` differs from this tokenizer, for people. None: it gives equal tokens."""
        before, after = self._backend.get_vocab(), other._backend.get_vocab()
        changed = before.items() ^ after.items()
        if changed:
            number = min(number for _, number in changed)
            was, now = (
                next(
                    (token for token, its_number in vocabulary.items() if its_number == number), ""
                )
                for vocabulary in (before, after)
            )
            return f"token {number} was {was[:40]!r}, is {now[:40]!r}"

        if self._rules() != other._rules():
            return "its vocabulary is the same, but it splits sentences in another way"
        return None

    def _rules(self) -> list[Any]:
        """What decides, besides the vocabulary, how a sentence becomes tokens."""
        definition = json.loads(self._backend.to_str())
        model = {key: value for key, value in definition["model"].items() if key != "vocab"}
        names = ("normalizer", "pre_tokenizer", "added_tokens")
        return [model, *(definition[name] for name in names)]

    def save(self, folder: Path) -> None:
        """Write a folder that `open` and `transformers` both read.

        It holds tokenizer.json, vocab.txt and tokenizer_config.json.
        """
        folder = Path(folder)
        with whole_file(folder / "vocab.txt", "w") as file:
            file.write("".join(f"{token}\n" for token in self.vocabulary))
        with whole_file(folder / "tokenizer.json", "w") as file:
            file.write(self._backend.to_str(pretty=True))

        normalizer = self._backend.normalizer
        lower = normalizer is None or normalizer.normalize_str("A") == "a"
        write_json(
            folder / "tokenizer_config.json",
            {"tokenizer_class": "BertTokenizer", "do_lower_case": lower},
        )


def _read_backend(file: Path) -> tokenizers.Tokenizer:
    """Read a tokenizer.json, or a vocabulary with one token per line."""
    if file.suffix == ".json":
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises a bare Exception
            raise InputError(f"tokenizer {file} cannot be read: {error}") from error

    try:
        tokens = file.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"vocabulary {file} cannot be read: {error}") from None
    if tokens[-1] == "":  # after the last newline
        tokens = tokens[:-1]
    numbers = {token: number for number, token in enumerate(tokens)}

    if len(numbers) != len(tokens):
        repeated = next(token for token, times in Counter(tokens).items() if times > 1)
        raise InputError(
            f"vocabulary {file}: {repeated!r} is listed twice; the numbers after it would be wrong"
        )
    if "[UNK]" not in numbers:
        raise InputError(
            f"vocabulary {file}: [UNK] is missing; it is no BERT vocabulary (one token per line)"
        )

    config = file.with_name("tokenizer_config.json")
    lower = True
    if config.is_file():
        settings = read_json(config, "the settings of a tokenizer")
        if not isinstance(settings, dict):
            raise InputError(f"{config}: expected an object with the settings of a tokenizer")
        lower = settings.get("do_lower_case", True)
    return _build_backend(numbers, lower)


def _build_backend(numbers: dict[str, int], lower: bool) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(
        models.WordPiece(numbers, unk_token="[UNK]", max_input_chars_per_word=MAX_WORD_CHARACTERS)
    )
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def _fetch_backend(name: str) -> tokenizers.Tokenizer:
    """Fetch a tokenizer from the Hugging Face hub, or from its local cache."""
    from coupalign.compat import prepare_torchvision

    prepare_torchvision()
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, use_fast=True).backend_tokenizer
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"tokenizer {name}: no such folder, and the Hugging Face hub does not give it "
            f"({str(error).splitlines()[0]}); name a local folder with vocab.txt"
        ) from error
