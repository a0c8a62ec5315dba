"""The checkpoint's tokenizer, read from tokenizer.json."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from fusecheck.errors import UsageError
from fusecheck.eval.config import Shape

Ints = NDArray[np.int32]

BLOCK = 1000
"""Texts that are encoded at once: the library keeps much more of each than its tokens."""


def read_tokenizer(path: Path, vocabulary: int) -> tuple[Tokenizer, bytes]:
    """A tokenizer.json, and its content.

    Raises:
        UsageError: there is none, a broken one, or one with more tokens than the embedding has rows.
    """
    try:
        content = path.read_bytes()
        read: Tokenizer = Tokenizer.from_buffer(content)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; the checkpoint must come with its tokenizer") from None
    except Exception as error:  # the library raises Exception itself
        raise UsageError(f"{path}: not a tokenizer ({' '.join(str(error).split())}); copy it again") from None
    largest = max(read.get_vocab(with_added_tokens=True).values(), default=-1)
    if not 0 <= largest < vocabulary:
        raise UsageError(
            f"{path}: token ids go up to {largest}, but the embedding has {vocabulary} rows; "
            "this tokenizer belongs to another model"
        )
    return read, content


class Tokens:
    """Text to tokens and back; every distinct prompt is encoded once for all arms.

    Attributes:
        digest: SHA-256 of tokenizer.json.
    """

    def __init__(self, folder: Path, shape: Shape) -> None:
        """Read the tokenizer and check that it fits the model.

        Raises:
            UsageError: no tokenizer.json, a broken one, or one with more tokens than the embedding has rows.
        """
        path = folder / "tokenizer.json"
        self._tokenizer, content = read_tokenizer(path, shape.vocabulary)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.digest = hashlib.sha256(content).hexdigest()
        self._before = tuple(self._tokenizer.encode("").ids)
        self._known: dict[str, Ints] = {}
        self._apart: set[tuple[str, str]] = set()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Encode a text, with the tokens that the tokenizer puts before every text unless `special` is off."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        return self._begun_once(ids) if special else ids

    def encode_all(self, texts: Sequence[str]) -> list[Ints]:
        """Encode texts in one go, each distinct one once; int32 [tokens] each."""
        fresh = [text for text in dict.fromkeys(texts) if text not in self._known]
        for start in range(0, len(fresh), BLOCK):
            block = fresh[start : start + BLOCK]
            for text, encoding in zip(block, self._tokenizer.encode_batch(block), strict=True):
                self._known[text] = np.array(self._begun_once(encoding.ids), np.int32)
        return [self._known[text] for text in texts]

    def stay_apart(self, pairs: Sequence[tuple[str, str]]) -> bool:
        """Say whether each (text, continuation) encodes as the text's tokens and then the continuation's.

        Joining two texts can merge tokens across the boundary. A pair is looked at once, for all arms.
        """
        fresh = [pair for pair in dict.fromkeys(pairs) if pair not in self._apart]
        for start in range(0, len(fresh), BLOCK):
            block = fresh[start : start + BLOCK]
            whole = self._tokenizer.encode_batch([text + continuation for text, continuation in block])
            heads = self.encode_all([text for text, _ in block])
            for (_, continuation), joined, head in zip(block, whole, heads, strict=True):
                if self._begun_once(joined.ids) != [*head.tolist(), *self.encode(continuation, special=False)]:
                    return False
        self._apart.update(fresh)
        return True

    def _begun_once(self, ids: list[int]) -> list[int]:
        """Without the tokens before every text where the text has them already, as a chat template writes them."""
        size = len(self._before)
        return ids[size:] if size and tuple(ids[: 2 * size]) == self._before * 2 else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of these tokens, without special tokens."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text
