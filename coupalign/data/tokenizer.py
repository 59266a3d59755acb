"""Words to numbers: the text encoder's own WordPiece tokenizer, or one whose vocabulary is learned at pack time.

The learned vocabulary is byte-pair merging over the counted words, ties broken by the alphabet, so that its bytes depend
on nothing but the multiset of sentences: not on their order, on a hash seed or on the number of processes. (The trainer
of the `tokenizers` library walks hash maps; it gives no such promise.)
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from coupalign.errors import InputError
from coupalign.files import whole_file, write_json

if TYPE_CHECKING:
    import torch

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MAX_WORD_CHARACTERS = 100  # characters; WordPiece calls anything longer unknown


# ------------------------------------------------------------------------------------------------------ learning


# ------------------------------------------------------------------------------------------------------- reading


class Tokenizer:
    """A WordPiece tokenizer that frames a sentence as [CLS] … [SEP]; it can be pickled."""

    def __init__(self, backend: tokenizers.Tokenizer, source: str) -> None:
        backend.no_truncation()
        backend.no_padding()
        ids = [backend.token_to_id(token) for token in SPECIAL[:4]]
        missing = [token for token, number in zip(SPECIAL, ids) if number is None]
        if missing:
            raise InputError(
                f"tokenizer {source}: {', '.join(missing)} not in the vocabulary; it is no BERT tokenizer"
            )
        if backend.get_vocab_size() < 10:
            raise InputError(
                f"tokenizer {source}: a vocabulary of {backend.get_vocab_size()} is none; is vocab.txt whole?"
            )
        self.source = source
        self._backend = backend
        self._pad, self._unknown, self._start, self._end = ids

    @classmethod
    def open(cls, name: str | Path) -> Tokenizer:
        """Read a folder (tokenizer.json, else vocab.txt), a vocabulary file, or a Hugging Face hub name.

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
        if (
            source.startswith(("/", "./", "../", "~"))
            or source.count("/") > 1
            or path.suffix in (".txt", ".json")
        ):
            raise InputError(f"tokenizer {source}: no such file or folder")
        return cls(_fetch_backend(source), source)

    def encode(
        self, sentences: Sequence[str], max_tokens: int
    ) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
        """Number the words of `sentences`.

        Returns:
            words int64 [B, max_tokens], padded with [PAD]; mask bool [B, max_tokens], true up to [SEP]; for each
            sentence, whether it was longer and has been cut (its [SEP] is kept).
        """
        import torch

        numbers = [
            self._backend.encode(sentence, add_special_tokens=False).ids for sentence in sentences
        ]
        rows = [[self._start, *ids[: max_tokens - 2], self._end] for ids in numbers]
        words = torch.tensor(
            [row + [self._pad] * (max_tokens - len(row)) for row in rows], dtype=torch.int64
        ).view(-1, max_tokens)
        mask = (
            torch.arange(max_tokens)
            < torch.tensor([len(row) for row in rows], dtype=torch.int64)[:, None]
        )
        cut = [len(ids) > max_tokens - 2 for ids in numbers]
        return words, mask, cut

    def tokens(self, sentence: str) -> list[str]:
        """The pieces of `sentence`, without [CLS] and [SEP]."""
        return self._backend.encode(sentence, add_special_tokens=False).tokens

    def __len__(self) -> int:
        return self._backend.get_vocab_size()

    @property
    def vocabulary(self) -> list[str]:
        """Every token, by its number; a number without a token is the empty string."""
        ids = self._backend.get_vocab()
        listed = [""] * (max(ids.values()) + 1)
        for token, number in ids.items():
            listed[number] = token
        return listed

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the vocabulary in the order of its numbers, hex."""
        return hashlib.sha256("\n".join(self.vocabulary).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, vocab.txt and tokenizer_config.json, which `open` and `transformers` both read."""
        folder = Path(folder)
        with whole_file(folder / "vocab.txt", "w") as file:
            file.write("".join(f"{token}\n" for token in self.vocabulary))
        with whole_file(folder / "tokenizer.json", "w") as file:
            file.write(self._backend.to_str(pretty=True))
        lower = (
            self._backend.normalizer is None or self._backend.normalizer.normalize_str("A") == "a"
        )
        write_json(
            folder / "tokenizer_config.json",
            {"tokenizer_class": "BertTokenizer", "do_lower_case": lower},
        )


def _read_backend(file: Path) -> tokenizers.Tokenizer:
    if file.suffix == ".json":
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises a bare Exception
            raise InputError(f"tokenizer {file} cannot be read: {error}") from error
    tokens = file.read_text(encoding="utf-8").split("\n")
    tokens = tokens[:-1] if tokens[-1] == "" else tokens
    numbers = {token: number for number, token in enumerate(tokens)}
    if len(numbers) != len(tokens):
        twice = next(token for token, times in Counter(tokens).items() if times > 1)
        raise InputError(
            f"vocabulary {file}: {twice!r} is listed twice; the numbers after it would be wrong"
        )
    if "[UNK]" not in numbers:
        raise InputError(
            f"vocabulary {file}: [UNK] is missing; it is no BERT vocabulary (one token a line)"
        )
    config = file.with_name("tokenizer_config.json")
    lower = json.loads(config.read_text()).get("do_lower_case", True) if config.is_file() else True
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
    """The tokenizer of that name on the Hugging Face hub, or in its local cache."""
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
