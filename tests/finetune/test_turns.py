"""What the assistant says is learned as the whole conversation shows it, whatever the template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qtool.errors import QtoolError
from qtool.finetune.records import DataOptions
from qtool.finetune.rows import open_rows
from qtool.finetune.sequences import IGNORED_LABEL, encode

# After the last question the assistant's thoughts are shown, empty ones too; before it, none are.
THOUGHTS = (
    "{% set seen = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set seen.last = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for m in messages %}#{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > seen.last %}({{ m.thoughts }})\n{% endif %}"
    "{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}@{{ call.function.name }}"
    "={{ call.function.arguments.n }};{% endfor %}"
    "</s>\n{% endfor %}"
    "{% if add_generation_prompt %}#assistant\n{% endif %}"
)
# The end token is behind the last answer alone, and what a tool is called with in place of text.
BARE_ENDS = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.tool_calls %}@{{ m.tool_calls[0].function.name }}{% else %}{{ m.content }}{% endif %}"
    "{% if m.role == 'assistant' and loop.last %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# It begins to think in any case where it is asked.
ASKS_FOR_THOUGHTS = THOUGHTS.replace("#assistant\n{% endif %}", "#assistant\n(hm{% endif %}")
MARKED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}</s>"
    "{% endfor %}"
)


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


def calls(name: str, n: int = 7) -> dict[str, Any]:
    return {"tool_calls": [{"type": "function", "function": {"name": name, "arguments": {"n": n}}}]}


@pytest.fixture
def tokenizer(test_data: Path) -> Any:
    return AutoTokenizer.from_pretrained(test_data / "models/tinymoe-6m")


def shown(tmp_path: Path, tokenizer: Any, template: str, *rows: Any) -> list[str]:
    """Each row's text, with what is learned of it in ⟦ ⟧."""
    tokenizer.chat_template = template
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    found = open_rows(DataOptions(source=str(path)))
    found.check()
    items = encode(found, tokenizer, max_length=1000, completion_only=True).items
    return [in_brackets(tokenizer, item.ids, item.labels) for item in items]


def in_brackets(tokenizer: Any, ids: list[int], labels: list[int]) -> str:
    text, is_learned = "", False
    for token, label in zip([*ids, None], [*labels, IGNORED_LABEL], strict=True):
        if (label != IGNORED_LABEL) != is_learned:
            is_learned = not is_learned
            text += "⟦" if is_learned else "⟧"
        text += "" if token is None else tokenizer.decode([token])
    return text


CONVERSATIONS = {
    "several turns": (
        [user("One?"), assistant("First."), user("Two?"), assistant("Second.", thoughts="so")],
        "#user\nOne?</s>\n#assistant\n⟦First.</s>\n⟧#user\nTwo?</s>\n#assistant\n"
        "⟦(so)\nSecond.</s>\n⟧",
    ),
    "thoughts that are not shown": (
        [user("One?"), assistant("First.", thoughts="so"), user("Two?"), assistant("Second.")],
        "#user\nOne?</s>\n#assistant\n⟦First.</s>\n⟧#user\nTwo?</s>\n#assistant\n"
        "⟦()\nSecond.</s>\n⟧",
    ),
    "the user has the last word": (
        [user("One?"), assistant("First."), user("Thanks.")],
        "#user\nOne?</s>\n#assistant\n⟦First.</s>\n⟧#user\nThanks.</s>\n",
    ),
    "system messages": (
        [
            *(system("Be kind."), user("One?"), assistant("First.")),
            *(system("Be short."), user("Two?"), assistant("Second.")),
        ],
        "#system\nBe kind.</s>\n#user\nOne?</s>\n#assistant\n⟦First.</s>\n⟧"
        "#system\nBe short.</s>\n#user\nTwo?</s>\n#assistant\n⟦()\nSecond.</s>\n⟧",
    ),
    "nothing said": (
        [user("One?"), assistant(""), user("Two?"), assistant("")],
        "#user\nOne?</s>\n#assistant\n⟦</s>\n⟧#user\nTwo?</s>\n#assistant\n⟦()\n</s>\n⟧",
    ),
    "the same said twice": (
        [user("One?"), assistant("One?"), user("One?"), assistant("One?")],
        "#user\nOne?</s>\n#assistant\n⟦One?</s>\n⟧#user\nOne?</s>\n#assistant\n⟦()\nOne?</s>\n⟧",
    ),
    "tools": (
        [
            *(user("One?"), assistant(None, **calls("look")), tool("7"), assistant("Seven.")),
            *(user("Two?"), assistant("Wait.", **calls("see", 8)), tool("8"), assistant("Eight.")),
        ],
        "#user\nOne?</s>\n#assistant\n⟦@look=7;</s>\n⟧#tool\n7</s>\n#assistant\n⟦Seven.</s>\n⟧"
        "#user\nTwo?</s>\n#assistant\n⟦()\nWait.@see=8;</s>\n⟧#tool\n8</s>\n#assistant\n"
        "⟦()\nEight.</s>\n⟧",
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_every_turn_is_learned_as_it_is_shown(tmp_path: Path, tokenizer: Any, name: str) -> None:
    messages, expected = CONVERSATIONS[name]
    assert shown(tmp_path, tokenizer, THOUGHTS, {"messages": messages}) == [expected]


def test_a_template_that_asks_for_more_than_it_shows(tmp_path: Path, tokenizer: Any) -> None:
    messages, expected = CONVERSATIONS["several turns"]
    expected = expected.replace("⟦(so)", "(⟦so)")  # "(" was there when it was asked
    assert shown(tmp_path, tokenizer, ASKS_FOR_THOUGHTS, {"messages": messages}) == [expected]


def test_ends_that_only_the_last_message_has(tmp_path: Path, tokenizer: Any) -> None:
    messages = [user("One?"), assistant("First."), user("Two?"), assistant("Second.")]
    expected = "<user>One?<assistant>⟦First.⟧<user>Two?<assistant>⟦Second.</s>⟧"
    assert shown(tmp_path, tokenizer, BARE_ENDS, {"messages": messages}) == [expected]
    messages[1:2] = [assistant(None, **calls("look")), tool("7"), assistant("Seven.")]
    expected = expected.replace("⟦First.⟧", "⟦@look⟧<tool>7<assistant>⟦Seven.⟧")
    assert shown(tmp_path, tokenizer, BARE_ENDS, {"messages": messages}) == [expected]


def test_a_completion_of_several_messages(tmp_path: Path, tokenizer: Any) -> None:
    """What a prompt ends with is rendered otherwise, too, once more follows."""
    prompt = [user("One?"), assistant(None, **calls("look")), tool("7")]
    row = {"prompt": prompt, "completion": [assistant("Seven."), user("Two?"), assistant("Two.")]}
    expected = (
        "#user\nOne?</s>\n#assistant\n@look=7;</s>\n#tool\n7</s>\n#assistant\n"
        "⟦Seven.</s>\n#user\nTwo?</s>\n#assistant\n()\nTwo.</s>\n⟧"
    )
    assert shown(tmp_path, tokenizer, THOUGHTS, row) == [expected]


def test_contents_of_several_parts(tmp_path: Path, tokenizer: Any) -> None:
    template = THOUGHTS.replace(
        "{{ m.content or '' }}", "{{ m.content | map(attribute='text') | join }}"
    )
    messages = [user("One?"), assistant(None), user("Two?"), assistant(None)]
    for message, text in zip(messages, ("One?", "First.", "Two?", "Second."), strict=True):
        message["content"] = [
            {"type": "text", "text": text[:2]},
            {"type": "text", "text": text[2:]},
        ]
    expected = CONVERSATIONS["thoughts that are not shown"][1]
    assert shown(tmp_path, tokenizer, template, {"messages": messages}) == [expected]


def test_marks_of_the_template_are_followed(tmp_path: Path, tokenizer: Any) -> None:
    """And the end token behind one, without which the model would not learn to stop."""
    messages = [
        system("Be kind."),
        user("One?"),
        assistant("First."),
        user("Two?"),
        assistant("2."),
    ]
    expected = (
        "[system]Be kind.</s>[user]One?</s>[assistant]⟦First.</s>⟧[user]Two?</s>[assistant]⟦2.</s>⟧"
    )
    assert shown(tmp_path, tokenizer, MARKED, {"messages": messages}) == [expected]
    ends_otherwise = MARKED.replace("</s>", "<end>")  # which is no token of its own
    expected = expected.replace("</s>", "<end>")
    assert shown(tmp_path, tokenizer, ends_otherwise, {"messages": messages}) == [expected]
    only_last = MARKED.replace("m.role == 'assistant' %}", "m.role == 'assistant' and loop.last %}")
    with pytest.raises(QtoolError, match=r"line 1: the chat template marks 1 of 2 turns of the"):
        shown(tmp_path, tokenizer, only_last, {"messages": messages})


def test_a_turn_that_is_not_shown_is_refused_by_its_line(tmp_path: Path, tokenizer: Any) -> None:
    drops = THOUGHTS.replace("{% for m in messages %}#", "{% for m in messages if m.content %}#")
    rows = [
        {"messages": [user("One?"), assistant("First.")]},
        {"messages": [user("One?"), assistant(""), user("Two?"), assistant("Second.")]},
    ]
    with pytest.raises(QtoolError, match=r"line 2: message 2 \(assistant\) is not found") as caught:
        shown(tmp_path, tokenizer, drops, *rows)
    assert caught.value.kind == "bad_file"
    assert "completion_only=False" in caught.value.hint
