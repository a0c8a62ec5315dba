"""The vocabulary in a GGUF file as a tokenizer.json and a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fusecheck.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_TEXTS = frozenset({"<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "</s>"})
"""Tokens that end a text or a turn in the families that are read."""

CONTROL, USER_DEFINED = 3, 4
"""GGUF's kinds of token that are not made by merging."""

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {"qwen2": _WORDS.format(digits=""), "llama-bpe": _WORDS.format(digits="{1,3}")}
"""How text is cut before merging, by `tokenizer.ggml.pre`."""


class Fields(Protocol):
    """What is asked of a file."""

    path: Path

    def field(self, name: str, default: Any = None) -> Any:
        """The value of a metadata field."""
        ...


def write_tokenizer(file: Fields, out: Path, given: Path | None, vocabulary: int) -> None:
    """Write tokenizer.json and, where the file has a chat template, tokenizer_config.json.

    Args:
        file: an open GGUF file.
        out: the folder.
        given: a tokenizer.json to take instead of the file's own vocabulary.
        vocabulary: rows of the embedding.

    Raises:
        UsageError: a vocabulary that is not converted here, or none, or one of another model.
    """
    from fusecheck.eval.tokens import read_tokenizer

    if given is None:
        convert(file).save(str(out / "tokenizer.json"))
    elif given.is_file():
        (out / "tokenizer.json").write_bytes(read_tokenizer(given, vocabulary)[1])
    else:
        raise UsageError(f"--tokenizer {given}: no such file; give the tokenizer.json of the original checkpoint")
    texts = file.field("tokenizer.ggml.tokens") or []
    config = {
        f"{kind}_token": texts[index]
        for kind in ("bos", "eos")
        if (index := file.field(f"tokenizer.ggml.{kind}_token_id")) is not None and index < len(texts)
    }
    if template := file.field("tokenizer.chat_template"):
        config["chat_template"] = template
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def convert(file: Fields) -> Tokenizer:
    """The byte-level tokenizer of a GGUF file.

    Raises:
        UsageError: it is of another kind, or lacks its tokens or merges.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    kind, cut = file.field("tokenizer.ggml.model"), file.field("tokenizer.ggml.pre")
    advice = "give --tokenizer FILE, the tokenizer.json of the original checkpoint"
    if kind != "gpt2" or cut not in SPLITS:
        known = " or ".join(f"gpt2/{name}" for name in SPLITS)
        raise UsageError(f"{file.path}: tokenizer {kind}/{cut}, expected {known}; {advice}")
    texts, merges = file.field("tokenizer.ggml.tokens"), file.field("tokenizer.ggml.merges")
    kinds = file.field("tokenizer.ggml.token_type") or []
    if not texts or not merges or len(kinds) != len(texts):
        raise UsageError(f"{file.path}: has no whole vocabulary (tokens, their types, merges); {advice}")
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    vocabulary = {text: index for index, text in enumerate(texts)}
    made = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=cut == "llama-bpe"))
    if cut == "qwen2":
        made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLITS[cut]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    special = [
        AddedToken(t, special=k == CONTROL, normalized=False)
        for t, k in zip(texts, kinds, strict=True)
        if k in (CONTROL, USER_DEFINED)
    ]
    made.add_tokens(special)
    _begin_with(made, file, texts)
    return made


def _begin_with(made: Tokenizer, file: Fields, texts: list[str]) -> None:
    """Put the begin token before every text, where the file asks for it."""
    from tokenizers import processors

    first = file.field("tokenizer.ggml.bos_token_id")
    if file.field("tokenizer.ggml.add_bos_token") and first is not None:
        made.post_processor = processors.TemplateProcessing(
            single=f"{texts[first]} $A", pair=f"{texts[first]} $A $B", special_tokens=[(texts[first], first)]
        )
