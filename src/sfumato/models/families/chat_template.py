"""Tokenizers of language models whose pipelines put the prompt into a template."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

#: a character that no prompt has, to find the place of the text in a template
_MARK = "\ue000"


def chat_template(tokenizer: Any, thinking: bool) -> Callable[[str], str]:
    """The template of a chat in which the text is all that the user says, by a tokenizer that has one."""

    def template(text: str) -> str:
        messages = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )

    return template


class TemplatedTokenizer:
    """A tokenizer that puts the text into a template first. Tokens of the template count as special ones, added by
    the tokenizer; offsets are those of the text. ``template`` maps a text to what is tokenized, the text in it once;
    ``always``: options of every call."""

    def __init__(self, tokenizer: Any, template: Callable[[str], str], **always: Any):
        self.tokenizer, self.template, self.always = tokenizer, template, always

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(
        self,
        text: str,
        *,
        return_offsets_mapping: bool = False,
        return_special_tokens_mask: bool = False,
        **options: Any,
    ) -> Any:
        """As a fast tokenizer's call on one text; the encoding has ``input_ids`` and what is asked for."""
        whole, start = self.template(text), self.template(_MARK).index(_MARK)
        encoding = self.tokenizer(whole, return_offsets_mapping=True, **self.always, **options)
        # templates may strip the text; they hold other text before and behind it, never between
        body = text if whole.startswith(text, start) else text.strip()
        left = len(text) - len(text.lstrip()) if body != text else 0
        mask, offsets = [], []
        for a, b in encoding["offset_mapping"]:
            outside = b <= start or a >= start + len(body)
            mask.append(int(outside))
            offsets.append((0, 0) if outside else (max(a - start, 0) + left, min(b - start, len(body)) + left))
        encoding["offset_mapping"] = offsets
        encoding["special_tokens_mask"] = mask
        return encoding
