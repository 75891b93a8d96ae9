"""From what a user passes to token ids: a user turn, a conversation, or ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from outpace.errors import ConfigError

if TYPE_CHECKING:
    from outpace.target import Target

Prompt = str | Sequence[Mapping[str, str]] | Sequence[int]
"""One user turn, chat messages, or token ids."""


def as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, from one or several.

    Raises:
        ConfigError: if there is none.
    """
    if isinstance(prompts, str):
        return [prompts]
    items: list[Any] = list(prompts)
    if not items:
        raise ConfigError("no prompt: pass a string, chat messages, token ids, or a list of those")
    if isinstance(items[0], int | Mapping):
        return [items]
    return items


def encode(target: Target, prompt: Prompt, *, chat: bool = True) -> list[int]:
    """Token ids of one prompt; a plain string is one user turn where the tokenizer has a chat template.

    Raises:
        ConfigError: on an empty prompt, ids out of range, one longer than the context, or text without a tokenizer.
    """
    tokenizer = target.tokenizer
    if isinstance(prompt, str) and not prompt.strip():
        raise ConfigError('empty prompt: pass some text, e.g. outpace generate "Why is the sky blue?"')
    items: list[Any] = [] if isinstance(prompt, str) else list(prompt)
    if items and isinstance(items[0], int):
        ids = [int(token) for token in items]
    elif tokenizer is None:
        raise ConfigError(f"{target.name} has no tokenizer; pass token ids, or Target(model, tokenizer)")
    elif isinstance(prompt, str) and not (chat and tokenizer.chat_template):
        ids = tokenizer.encode(prompt, add_special_tokens=True)
    else:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in items]
        if not messages:
            raise ConfigError("empty prompt: the conversation has no messages")
        if not tokenizer.chat_template:
            raise ConfigError(f"{target.name} has no chat template for a conversation; pass a string or token ids")
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise ConfigError("empty prompt: it has no tokens")
    bad = next((token for token in ids if not 0 <= token < target.vocabulary), None)
    if bad is not None:
        raise ConfigError(f"prompt has token id {bad}; {target.name} has ids 0 to {target.vocabulary - 1}")
    if len(ids) >= target.context:
        raise ConfigError(
            f"prompt has {len(ids)} tokens, but {target.name} was made for {target.context} positions in all; shorten "
            f"it to at most {target.context - 1}"
        )
    return ids
