"""Chat templates as lm-eval has them: prompts as turns, by the checkpoint's own template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

from fusecheck.errors import UsageError
from fusecheck.eval.config import read_json

Message = dict[str, str]


@dataclass(frozen=True)
class Chat:
    """How prompts are put, as lm-eval's options of the same names.

    Attributes:
        apply: through the checkpoint's chat template.
        multiturn: examples as turns of their own; counts with `apply` only.
        system: a system instruction before every prompt.
    """

    apply: bool = False
    multiturn: bool = True
    system: str | None = None

    def settings(self, folder: Path) -> dict[str, Any]:
        """What lm-eval's `build_all_requests` takes.

        Raises:
            UsageError: the checkpoint has no chat template, or a broken one.
        """
        if not self.apply:
            return {"system_instruction": self.system}
        template = ChatTemplate(folder)
        return {
            "system_instruction": self.system,
            "apply_chat_template": True,
            "fewshot_as_multiturn": self.multiturn,
            "chat_template": template.render,
            "tokenizer_name": folder.name,
        }


PLAIN = Chat()
"""Prompts as plain text."""


def read_template(folder: Path) -> tuple[str, dict[str, Any]]:
    """The checkpoint's chat template and its tokenizer_config.json.

    Raises:
        UsageError: there is none, it is no text, or there are several and none is called `default`.
    """
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    beside = folder / "chat_template.jinja"
    try:
        found = beside.read_text(encoding="utf-8") if beside.is_file() else config.get("chat_template")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{beside}: not readable text ({error}); copy the checkpoint again") from None
    if isinstance(found, list):
        found = next((t.get("template") for t in found if isinstance(t, dict) and t.get("name") == "default"), None)
    if not isinstance(found, str) or not found.strip():
        raise UsageError(f"--apply-chat-template: {folder} has no chat template; leave the option out")
    return found, config


class ChatTemplate:
    """A checkpoint's chat template, rendered in Jinja's sandbox as Hugging Face's tokenizers do.

    Attributes:
        text: the template.

    Raises:
        UsageError: there is none, or it is no Jinja template.
    """

    def __init__(self, folder: Path) -> None:
        from jinja2 import TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.text, config = read_template(folder)
        self._folder = folder
        place = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        place.globals |= {"raise_exception": _raise, "strftime_now": _now}
        place.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        self._marks = {name: _text_of(config.get(name)) for name in ("bos_token", "eos_token")}
        try:
            self._template = place.from_string(self.text)
        except TemplateSyntaxError as error:
            raise UsageError(f"{folder}: the chat template is broken ({error}); copy the checkpoint again") from None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:  # noqa: FBT001, FBT002
        """Put turns into one text; without a generation prompt the last turn is left open, to be continued.

        Raises:
            UsageError: the template refuses these turns.
        """
        try:
            text = self._template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, tools=None, **self._marks
            )
        except Exception as error:  # whatever a template does
            told = " ".join(f"{type(error).__name__}: {error}".split())
            roles = ", ".join(message["role"] for message in messages)
            raise UsageError(
                f"{self._folder}: the chat template refuses turns of {roles} ({told}); "
                "leave --apply-chat-template, --system-instruction or --fewshot-as-multiturn out"
            ) from None
        if add_generation_prompt:
            return text
        last = messages[-1]["content"].strip()
        end = text.rfind(last)
        return text[: end + len(last)] if end >= 0 else text


class _RaisedError(ValueError):
    """A template said no."""


def _raise(message: str) -> NoReturn:
    raise _RaisedError(message)


def _now(form: str) -> str:
    # The same text in every arm, whatever day each runs on.
    return datetime(2026, 1, 1, tzinfo=timezone.utc).strftime(form)


def _text_of(mark: Any) -> str:
    return str(mark.get("content", "")) if isinstance(mark, dict) else str(mark or "")
