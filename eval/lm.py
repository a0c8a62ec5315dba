"""The evaluated model as lm-eval sees it: one forward per distinct context, full-vocabulary log-probabilities kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from numpy.typing import NDArray

from fusecheck.errors import UsageError
from fusecheck.eval.engine import Engine, Next
from fusecheck.eval.tokens import Tokens

Floats = NDArray[np.float32]

NEW_TOKENS = 256
"""Longest answer where a task names none; lm-eval's default."""


class EngineLM(TemplateLM):  # type: ignore[misc]
    """An lm-eval model on an `Engine`, which has an arm open.

    Attributes:
        kept: by context, the log-probabilities at the answer position (folded) and the position's row in its batch.
        truncated: contexts whose answer was cut at the token limit.
    """

    def __init__(self, engine: Engine, tokens: Tokens, *, end_ids: Sequence[int], max_length: int) -> None:
        super().__init__()
        self.engine, self.tokens = engine, tokens
        self._end_ids, self._max_length = frozenset(end_ids), max_length
        self.kept: dict[str, tuple[Floats, int]] = {}
        self.truncated: list[str] = []

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return min(self._end_ids, default=0)

    @property
    def max_length(self) -> int:
        """The longest text in tokens; longer prompts lose their beginning."""
        return self._max_length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:  # noqa: FBT001
        """Encode a text as the tokenizer does by itself, unless told otherwise."""
        return self.tokens.encode(string, special=add_special_tokens is not False)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:  # noqa: FBT001, FBT002
        """Score continuations; where all are single tokens, one forward per distinct context serves them all."""
        pairs: list[tuple[str, str]] = [request.args for request in requests]
        single = self._single_tokens(pairs)
        if single is None:
            answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
            return answers
        contexts = list(dict.fromkeys(context for context, _ in pairs))
        rows = [ids[-self._max_length :] for ids in self.tokens.encode_all(contexts)]
        wanted: dict[str, dict[str, int]] = {}
        for context, continuation in pairs:
            wanted.setdefault(context, {})[continuation] = single[continuation]
        found: dict[tuple[str, str], tuple[float, bool]] = {}

        def keep(i: int, after: Next) -> None:
            context = contexts[i]
            self.kept[context] = (after.table, after.row)
            for (continuation, token), score in zip(wanted[context].items(), after.scores.tolist(), strict=True):
                found[context, continuation] = (score, token == after.best)

        self.engine.last(rows, [list(wanted[context].values()) for context in contexts], keep)
        return [found[pair] for pair in pairs]

    def _single_tokens(self, pairs: Sequence[tuple[str, str]]) -> dict[str, int] | None:
        """Return each continuation's token if all are single tokens and joining moves no boundary, else None."""
        continuations = dict.fromkeys(continuation for _, continuation in pairs)
        ids = {c: self.tokens.encode(c, special=False) for c in continuations}
        if any(len(tokens) != 1 for tokens in ids.values()) or any(not c or c[-1:].isspace() for c, _ in pairs):
            return None
        once = list(dict(pairs).items())
        return {c: tokens[0] for c, tokens in ids.items()} if self.tokens.stay_apart(once) else None

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Score token continuations of any length, one forward per request."""
        rows, begins, targets = [], [], []
        for _pair, context, continuation in requests:
            # The last token is scored but not read: a full window of context comes before it, as in lm-eval's HFLM.
            row = (context + continuation)[-(self._max_length + 1) :]
            rows.append(row)
            begins.append(max(1, len(row) - len(continuation)))
            targets.append(row[begins[-1] :])
        scored = self.engine.spans(rows, begins)
        return [
            (float(scores.astype(np.float64).sum()), top.tolist() == target)
            for (scores, top), target in zip(scored, targets, strict=True)
        ]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:  # noqa: FBT001, FBT002
        """Score whole texts in windows of the longest length."""
        totals = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tokens.encode(text, special=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._max_length - 1,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            totals.append(sum(score for score, _ in self._loglikelihood_tokens(parts)))
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:  # noqa: FBT001, FBT002
        """Generate greedily until a stop string, the end of the text, or the token limit.

        Raises:
            UsageError: a task asks for sampling.
        """
        answers: list[str] = [""] * len(requests)
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for i, (_, settings) in enumerate(request.args for request in requests):
            if settings.get("do_sample") or settings.get("temperature"):
                raise UsageError(
                    f"a task asks for sampling ({settings}), expected greedy decoding; choose another task"
                )
            until = settings.get("until") or []
            until = [until] if isinstance(until, str) else until
            groups.setdefault((int(settings.get("max_gen_toks", NEW_TOKENS)), tuple(until)), []).append(i)
        for (limit, until), members in groups.items():
            self._generate([requests[i].args[0] for i in members], limit, until, members, answers)
        return answers

    def _generate(
        self, contexts: list[str], limit: int, until: tuple[str, ...], members: list[int], answers: list[str]
    ) -> None:
        rows = [ids[-(self._max_length - limit) :] for ids in self.tokens.encode_all(contexts)]

        def stops(tokens: list[int]) -> bool:
            if not self._end_ids.isdisjoint(tokens):
                return True
            text = self.tokens.decode(tokens)
            return any(stop in text for stop in until)

        for i, context, answer in zip(members, contexts, self.engine.generate(rows, limit, stops), strict=True):
            answers[i] = self._cut(answer.tokens, until)
            if answer.truncated:
                self.truncated.append(context)

    def _cut(self, tokens: list[int], until: tuple[str, ...]) -> str:
        end = next((k for k, token in enumerate(tokens) if token in self._end_ids), len(tokens))
        text = self.tokens.decode(tokens[:end])
        for stop in until:
            text = text.split(stop)[0]
        return text

    def force(self, texts: Sequence[tuple[str, str]]) -> list[tuple[Floats, NDArray[np.int64]]]:
        """Score given answers, as (context, answer): each answer token's log-probability, and the likeliest token."""
        whole = self.tokens.encode_all([context + answer for context, answer in texts])
        apart = self.tokens.encode_all([context for context, _ in texts])
        rows = [ids[-self._max_length :] for ids in whole]
        begins = [max(1, len(row) - (len(w) - len(a))) for row, w, a in zip(rows, whole, apart, strict=True)]
        return self.engine.spans(rows, begins)
