"""What a pipeline's call says in words, and which rows of a denoiser call read it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import BadInput, NotSupported
from sfumato.markup import described
from sfumato.models import Model, TextStream

__all__ = ["TextAxis", "Texts", "recording_encoders"]


@dataclass(frozen=True)
class TextAxis:
    """Where the text lies among the keys of joint attention: ``count`` of them, the first or the last, or from
    ``start`` on."""

    count: int
    start: int | None = None
    last: bool = False

    @classmethod
    def read(cls, text: str | None) -> TextAxis | None:
        """``"first 512"``, ``"last 77"``, ``"64:141"``. Raises BadInput."""
        if text is None:
            return None
        if match := re.fullmatch(r"\s*(first|last)\s+([1-9]\d*)\s*", str(text)):
            return cls(int(match[2]), None if match[1] == "last" else 0, match[1] == "last")
        if (match := re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", str(text))) and int(match[1]) < int(match[2]):
            return cls(int(match[2]) - int(match[1]), int(match[1]))
        raise BadInput(f"text={text!r} is no place among the keys; write it as 'first 512', 'last 77' or '64:141'.")

    def of(self, keys: int) -> tuple[int, int]:
        """[start, stop) among so many keys. Raises BadInput where it reaches beyond them."""
        start = keys - self.count if self.last else int(self.start or 0)
        if start < 0 or start + self.count > keys:
            raise BadInput(f"text says {self.count} keys are text, but attention has {keys}.")
        return start, start + self.count


@dataclass
class Texts:
    """The texts of one call. ``prompts``, ``negatives``: one per sample. ``cond``, ``uncond`` (b t d): as the pipeline
    encoded them, once it has."""

    prompts: list[str]
    negatives: list[str] | None
    cond: Tensor | None = None
    uncond: Tensor | None = None
    #: (ids (b t), every tensor (b t d) that came out) of each pass of a text encoder
    passes: list[tuple[str, Tensor, list[Tensor]]] = field(default_factory=list)

    __repr__ = described

    @classmethod
    def of_call(cls, model: Model, arguments: dict[str, Any], prompt: str | Sequence[str] | None) -> Texts:
        """Raises NotSupported for calls without a prompt, or that give each text encoder another one."""
        prompts = _texts(prompt if prompt is not None else _prompt_argument(model, arguments, ""))
        if prompts is None:
            raise NotSupported(
                f"this call of {model.name} has no prompt, so no word of it can be found; if it was given embeddings, "
                f"or the text under another name, say what it says: attached(..., prompt='...')."
            )
        n = next(
            (arguments[name] for name in ("num_images_per_prompt", "num_videos_per_prompt") if arguments.get(name)), 1
        )
        negatives = _texts(_prompt_argument(model, arguments, "negative_"))
        if negatives is not None and len(negatives) == 1:
            negatives *= len(prompts)
        spread = [text for text in prompts for _ in range(int(n))]
        return cls(spread, None if negatives is None else [text for text in negatives for _ in range(int(n))])

    def __len__(self) -> int:
        return len(self.prompts)

    def encoded(self, model: Model, arguments: dict[str, Any], found: Sequence[Tensor]) -> None:
        """The pipeline's ``encode_prompt`` was called so and gave these texts (b t d)."""
        if not found:
            return
        texts = _texts(arguments.get("prompt"))
        if self.cond is None:
            self._read(_texts(_prompt_argument(model, arguments, "")))
            self.cond, *others = found
            self.uncond = next((x for x in others if x.shape[1:] == found[0].shape[1:]), None)
        elif self.uncond is None and texts is not None and set(texts) <= {*(self.negatives or ()), ""}:
            self.uncond = found[0]
        if self.uncond is not None and len(self.uncond) == 1:  # one text against all prompts
            self.uncond = self.uncond.expand(len(self), -1, -1)

    def _read(self, texts: list[str] | None) -> None:
        """Some pipelines put other texts in place of the prompts (rewritten by a language model, or none at all): these
        are what attention sees."""
        if texts and len(self) % len(texts) == 0 and set(texts) != set(self.prompts):
            self.prompts = [text for text in texts for _ in range(len(self) // len(texts))]

    def require(self, model: Model, embeds: Tensor) -> None:
        """Raise NotSupported unless it is known how the prompts were encoded: the pipeline's ``encode_prompt`` showed
        it, or its text encoders read the very tokens of the prompts and gave rows of ``embeds`` (b t d)."""
        if self.cond is None:
            self.cond = self._read_by_encoders(model, embeds, self.prompts)
            self.uncond = self._read_by_encoders(model, embeds, self.negatives or [""] * len(self))
        if self.cond is None and len(embeds) == len(self) and self._only_prompts_read(model):
            self.cond = embeds  # whatever the pipeline has made of them, there was nothing else
        if self.cond is None:
            raise NotSupported(
                f"how {type(model.pipe).__name__} encodes prompts cannot be determined: it has no encode_prompt, and "
                f"what its text encoders gave is not what its denoiser got."
            )

    def _only_prompts_read(self, model: Model) -> bool:
        """Whether the text encoders read the prompts, one line each, and no other text."""
        lines = [(_tokenizer(model.pipe, name), ids) for name, ids, _ in self.passes]
        texts = list(dict.fromkeys(self.prompts))
        return bool(lines) and all(
            len(ids) in (len(texts), len(self)) and all(any(reads(tok, text, row) for text in texts) for row in ids)
            for tok, ids in lines
        )

    def _read_by_encoders(self, model: Model, embeds: Tensor, texts: list[str]) -> Tensor | None:
        for name, ids, tensors in self.passes:
            tokenizer = _tokenizer(model.pipe, name)
            rows = [next((r for r in range(len(ids)) if reads(tokenizer, text, ids[r])), None) for text in texts]
            for x in tensors:
                if None not in rows and x.shape[1:] == embeds.shape[1:]:
                    given = x[rows].to(embeds)
                    if any(torch.equal(given[0], row) for row in embeds):
                        return given
        return None

    def check_tokens(self, pipe: Any, stream: TextStream) -> None:
        """Raise NotSupported unless the text encoder of a pipeline of unknown class has read the tokens of the prompts,
        from its first position on, and nothing else."""
        for text in self.prompts:
            passes = [ids for _, ids, _ in self.passes if ids.shape[1] == stream.length]
            if not any(reads(stream.tokenizer, text, row) for ids in passes for row in ids):
                raise NotSupported(
                    f"{type(pipe).__name__} puts {text[:40]!r} into a text of its own before it is encoded, so "
                    f"where its words lie cannot be determined."
                )

    def rows(self, embeds: Tensor, b: int) -> dict[str, slice]:
        """Which rows of a denoiser call of ``b`` rows, whose texts are ``embeds`` (b t d), belong to which branch:
        "cond", "uncond", or other names for what is neither. Found by comparing embeddings, never by position. Raises
        NotSupported where none is known."""
        if len(embeds) != b and len(embeds) % b == 0:  # spread over frames
            embeds = embeds[:: len(embeds) // b]
        elif len(embeds) == 1:  # one text for all pictures
            embeds = embeds.expand(b, -1, -1)
        n = len(self)
        found: dict[str, slice] = {}
        if b % n == 0 and len(embeds) == b:
            for k in range(b // n):
                part = embeds[k * n : (k + 1) * n]
                name = next((x for x in ("uncond", "cond") if x not in found and _same(part, getattr(self, x))), "")
                found[name or f"other {k}"] = slice(k * n, (k + 1) * n)
        if "cond" not in found and "uncond" not in found:
            raise NotSupported(
                "which rows of the denoiser's input read the prompt cannot be determined: its texts are not what the "
                "pipeline's encode_prompt made."
            )
        return found


def _tokenizer(pipe: Any, encoder: str) -> Any:
    return getattr(pipe, encoder.replace("text_encoder", "tokenizer"), None)


def reads(tokenizer: Any, text: str, ids: Tensor) -> bool:
    """Whether a line of ids (t) is this text, filled up."""
    if tokenizer is None:
        return False
    own = tokenizer(text, truncation=True, max_length=len(ids)).input_ids
    fill = {tokenizer.pad_token_id, getattr(tokenizer, "eos_token_id", None)}
    return ids[: len(own)].tolist() == list(own) and set(ids[len(own) :].tolist()) <= fill


def _same(part: Tensor, known: Tensor | None) -> bool:
    if known is None or known.shape[1:] != part.shape[1:] or len(part) % len(known):
        return False
    known = known.to(part)
    many = len(part) // len(known)
    return torch.equal(part, known) or (many > 1 and torch.equal(part, known.repeat_interleave(many, 0)))


def _prompt_argument(model: Model, arguments: dict[str, Any], prefix: str) -> Any:
    """The text that attention sees: each tokenizer has an argument of its own, which falls back on the first."""
    first = arguments.get(f"{prefix}prompt")
    prompts_of_streams = []
    for stream in model.tokenizers:
        tokenizer = getattr(stream.tokenizer, "tokenizer", stream.tokenizer)
        number = next((k for k in ("_2", "_3", "_4") if getattr(model.pipe, f"tokenizer{k}", None) is tokenizer), "")
        own = arguments.get(f"{prefix}prompt{number}")
        prompts_of_streams.append(first if own is None else own)
    if any(each != prompts_of_streams[0] for each in prompts_of_streams):
        raise NotSupported(
            f"this call gives the text encoders of {model.name} different prompts, whose words lie on the same axis; "
            f"give one prompt to all."
        )
    return prompts_of_streams[0] if prompts_of_streams else first


def _texts(given: Any) -> list[str] | None:
    if given is None or isinstance(given, str):
        return None if given is None else [given]
    texts = list(given)
    return texts if texts and all(isinstance(text, str) for text in texts) else None


@contextmanager
def recording_encoders(pipe: Any, passes: list[tuple[str, Tensor, list[Tensor]]]) -> Iterator[None]:
    """While it lasts, ``passes`` collects what text encoders were given and gave: name, ids (b t), tensors (b t d)."""
    handles = []

    def hook(name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            ids = kwargs.get("input_ids", args[0] if args else None)
            if isinstance(ids, Tensor) and ids.dim() == 2:
                parts = output.values() if isinstance(output, dict) else output
                flat = [x for part in parts for x in (part if isinstance(part, tuple) else (part,))]
                held = [x for x in flat if isinstance(x, Tensor) and x.dim() == 3 and x.shape[:2] == ids.shape]
                passes.append((name, ids, held))

        return note

    for name, part in pipe.components.items():
        if name.startswith("text_encoder") and isinstance(part, nn.Module):
            handles.append(part.register_forward_hook(hook(name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
