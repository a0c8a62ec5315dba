"""Prompts as turns: the checkpoint's own template, lm-eval's own options, and templates that will not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusecheck.errors import UsageError
from fusecheck.eval import data
from fusecheck.eval.chat import Chat, ChatTemplate
from fusecheck.eval.tasks import prepare
from fusecheck.property_tests.accuracy.console import call
from fusecheck.property_tests.accuracy.tiny_models import GOLDEN, write_checkpoint

CHATML = (
    "{%- if messages[0]['role'] != 'system' %}\n{{- '<|im_start|>system\nBe helpful.<|im_end|>\n' }}\n{%- endif %}\n"
    "{%- for message in messages %}\n{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n{{- '<|im_start|>assistant\n' }}\n{%- endif %}\n"
)
"""Qwen's manner: a system turn where none is given."""
HEADERS = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<|head|>' + message['role'] + '<|/head|>\n\n' + message['content'] | trim + '<|eot|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|head|>assistant<|/head|>\n\n' }}{%- endif %}"
)
"""Llama 3's manner: the begin token, and content without the spaces around it."""
STRICT = (
    "{%- if messages[0]['role'] == 'system' %}{{- raise_exception('no system turns here') }}{%- endif %}"
    "{%- for message in messages %}{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('turns must alternate') }}{%- endif %}{{- '[' + message['content'] + ']' }}{%- endfor %}"
)
"""Mistral's manner: it raises."""

TURNS = [
    {"role": "user", "content": " What is 2 + 2?\nAnswer:"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And <|im_start|> 3 + 3?"},
]


def write_template(folder: Path, template: object, **fields: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": template, **fields}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.parametrize("template", [CHATML, HEADERS])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
@pytest.mark.parametrize("prompted", [True, False])
def test_turns_become_the_text_that_hugging_face_makes_of_them(
    template: str, system: list[dict[str, str]], *, prompted: bool, tmp_path: Path
) -> None:
    from transformers import PreTrainedTokenizerFast

    make: Callable[..., Any] = PreTrainedTokenizerFast
    theirs = make(tokenizer_file=str(GOLDEN / "tokenizer.json"), bos_token="<s>", chat_template=template)
    # Without a generation prompt lm-eval leaves the last turn open; it is the assistant's then.
    turns = [*system, *TURNS] if prompted else [*system, *TURNS, {"role": "assistant", "content": "The answer is"}]
    expected = theirs.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=prompted, continue_final_message=not prompted
    )
    assert ChatTemplate(write_template(tmp_path, template)).render(turns, add_generation_prompt=prompted) == expected


def test_a_template_beside_and_a_default_among_several_are_found(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "{{ raise_exception('no') }}"}, {"name": "default", "template": "one"}]
    assert ChatTemplate(write_template(tmp_path, several)).render(TURNS) == "one"
    (tmp_path / "chat_template.jinja").write_text("two", encoding="utf-8")
    assert ChatTemplate(tmp_path).render(TURNS) == "two"
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UsageError, match=r"chat_template.jinja: not readable text"):
        ChatTemplate(tmp_path)
    (tmp_path / "tokenizer_config.json").write_bytes(b"\xff")
    with pytest.raises(UsageError, match=r"tokenizer_config.json: not JSON"):
        ChatTemplate(tmp_path)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "has no chat template; leave the option out"),
        (" ", "has no chat template"),
        ([{"name": "rag", "template": "x"}], "has no chat template"),
        ("{% for m in messages %}", "the chat template is broken (Unexpected end of template"),
    ],
)
def test_a_template_that_is_none_is_refused_before_anything_runs(template: object, said: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    write_template(folder, template)
    result = call(["--model", folder, "--apply-chat-template", "--quick", "--run-dir", tmp_path / "run"])
    assert isinstance(result.exception, UsageError)
    assert said in str(result.exception)
    assert "\n" not in str(result.exception)


@pytest.mark.parametrize(
    ("template", "turns", "said"),
    [
        (STRICT, [{"role": "system", "content": "x"}], "refuses turns of system (_RaisedError: no system turns here)"),
        (STRICT, TURNS[1:], "refuses turns of assistant, user (_RaisedError: turns must alternate)"),
        ("{{ messages[9].content }}", TURNS, "refuses turns of user, assistant, user (UndefinedError: "),
        ("{{ messages.__class__.__mro__ }}", TURNS, "(SecurityError: access to attribute '__class__'"),
    ],
)
def test_a_template_that_raises_is_told_with_the_turns_that_it_got(
    template: str, turns: list[dict[str, str]], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        ChatTemplate(write_template(tmp_path, template)).render(turns)
    assert said in str(caught.value)
    assert "leave --apply-chat-template, --system-instruction or --fewshot-as-multiturn out" in str(caught.value)
    assert "\n" not in str(caught.value)


def stock_prompts(settings: dict[str, Any], folder: Path) -> list[str]:
    """The prompts of stock `simple_evaluate` with these options, on the same template."""
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    seen: list[str] = []

    class Recording(LM):  # type: ignore[misc]
        tokenizer_name = "model"

        def chat_template(self, chat_template: object = False) -> str:
            return str(chat_template)

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            return ChatTemplate(folder).render(chat_history, add_generation_prompt=add_generation_prompt)

        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            seen.extend(request.args[0] for request in requests)
            return [(0.0, False)] * len(requests)

        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            raise AssertionError("this task asks for none")

        def generate_until(self, requests: Any) -> list[str]:
            raise AssertionError("this task asks for none")

    definitions = data.lay_out(folder, None, {"mmlu"})
    builtin = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / "default"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        manager = TaskManager(include_defaults=False, include_path=[str(definitions), str(builtin)])
        lm_eval.simple_evaluate(
            Recording(), tasks=["mmlu_anatomy"], num_fewshot=2, task_manager=manager, bootstrap_iters=0, **settings
        )
    return list(dict.fromkeys(seen))


@pytest.mark.parametrize(
    "chat",
    [
        Chat(apply=True, multiturn=True, system="Be brief."),
        Chat(apply=True, multiturn=False, system=None),
        Chat(apply=False, system="Be brief."),
    ],
)
def test_prompts_are_those_of_lm_evals_options_of_the_same_names(chat: Chat, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="running the arms needs pip install fusecheck[eval]")
    folder = write_template(tmp_path / "model", CHATML)
    with prepare(["mmlu_anatomy"], None, shots=2, settings=chat.settings(folder)) as prepared:
        ours = prepared.contexts()
    options = {"apply_chat_template": chat.apply, "system_instruction": chat.system}
    if chat.apply:
        options["fewshot_as_multiturn"] = chat.multiturn
    assert ours == stock_prompts(options, folder)
    turns = ours[0].count("<|im_start|>user")
    assert turns == (0 if not chat.apply else 3 if chat.multiturn else 1)
    assert ("Be brief." in ours[0]) == (chat.system is not None)
