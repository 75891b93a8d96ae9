"""From a question's turns and the answers so far to what a model reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from outpace.engine import encode

if TYPE_CHECKING:
    from outpace.bench.config import Template
    from outpace.target import Target

VICUNA_SYSTEM: Final = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


def messages(turns: Sequence[str], answers: Sequence[str]) -> list[dict[str, str]]:
    """The conversation up to the turn behind the last answer."""
    found: list[dict[str, str]] = []
    for turn, answer in zip(turns, answers, strict=False):
        found += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
    return [*found, {"role": "user", "content": turns[len(answers)]}]


def prompt_ids(target: Target, turns: Sequence[str], answers: Sequence[str], template: Template) -> list[int]:
    """Token ids of the prompt for turn `len(answers)`.

    template: "chat" uses the model's own, and falls back to plain text where it has none.

    Raises:
        ConfigError: if the prompt is empty or longer than the model's context.
    """
    if template == "vicuna":
        return encode(target, vicuna(turns, answers), chat=False)
    if template == "chat" and target.tokenizer is not None and target.tokenizer.chat_template:
        return encode(target, messages(turns, answers))
    parts = [part for pair in zip(turns, answers, strict=False) for part in pair]
    return encode(target, "\n\n".join([*parts, turns[len(answers)]]), chat=False)


def vicuna(turns: Sequence[str], answers: Sequence[str]) -> str:
    """Spec-Bench's prompt for every model: Vicuna's template."""
    text = VICUNA_SYSTEM
    for turn, answer in zip(turns, answers, strict=False):
        text += f" USER: {turn} ASSISTANT: {answer}</s>"
    return f"{text} USER: {turns[len(answers)]} ASSISTANT:"
