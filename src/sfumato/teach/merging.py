"""Concepts that were learnt apart, merged into one set of keys and values (Kumari et al. 2023, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato import files, valid
from sfumato.adapters.closed_form import Solver
from sfumato.adapters.metadata import check_base
from sfumato.adapters.naming import word_beside
from sfumato.adapters.weights import Weights
from sfumato.adapters.word import Word
from sfumato.errors import BadInput, NotSupported
from sfumato.markup import described
from sfumato.models import Model
from sfumato.teach.taught import Taught
from sfumato.text.placeholders import placeholders

__all__ = ["Part", "features", "merge_files", "merged"]


@dataclass(frozen=True, eq=False)
class Part:
    """One concept: its word, class, the word's vectors, and its weights by ``component.path``."""

    name: str
    class_noun: str
    vectors: dict[str, Tensor]
    weights: dict[str, Tensor]

    __repr__ = described


def merged(
    model: Model, parts: Sequence[Part], captions: Sequence[str], prompt: str = "photo of a {}", ridge: float = 1e-6,
    method: str = "custom_diffusion",
) -> Taught:  # fmt: skip
    """All concepts in one: every matrix maps the tokens of each concept's "NAME CLASS" and ``prompt`` as that concept's
    own did, and everything that ``captions`` say as nearly as can be as the model's did. What stands before the concept
    in ``prompt`` is left out: it reads the same in all of them, and each has its own values for it.

    The record's facts hold residual, change and drift of every matrix, and what was dropped. Raises NotSupported for a
    model whose keys and values are no linear function of the text; BadInput for fewer than two concepts, equal words,
    weights other than keys and values, or no captions.
    """
    if not model.family.has("linear_text_values"):
        raise NotSupported(
            f"{model.name} has no cross-attention whose keys and values are linear in the text; merging in closed form "
            "needs it. Teach the concepts together instead: a folder of folders."
        )
    if len(parts) < 2 or len({part.name for part in parts}) < len(parts):
        raise BadInput("a merge needs two concepts or more, each with a word of its own.")
    if not captions:
        raise BadInput("a merge needs captions of ordinary pictures, a line each, which are to stay as they are.")
    paths = list(parts[0].weights)
    for part in parts:
        odd = [path for path in part.weights if path not in paths or not path.endswith(("to_k.weight", "to_v.weight"))]
        if odd or len(part.weights) != len(paths):
            raise BadInput(f"{part.name} holds {(odd or ['other weights'])[0]}: only keys and values can be merged.")
    words = {part.name: part.vectors for part in parts}
    captioned = [[f"{part.name} {part.class_noun}".strip(), prompt.format(f"{part.name} {part.class_noun}".strip())]
            for part in parts]  # fmt: skip
    with torch.no_grad(), placeholders(model, words):
        regular = torch.cat(features(model, captions))
        before = len(model.tokenizers[0].tokenizer(prompt.partition("{}")[0], add_special_tokens=False).input_ids)
        targets = [
            torch.cat([plain, sentence[before:]]) for plain, sentence in (features(model, texts) for texts in captioned)
        ]
    solver = Solver(regular, torch.cat(targets), ridge)
    if len(solver.independent_rows) >= regular.shape[1]:
        raise BadInput(
            f"the words of these concepts fix all {regular.shape[1]} dimensions of the text, and nothing could stay as "
            "it was: merge fewer, or give a shorter prompt."
        )
    own = {f"{name}.{path}": value for name, network in model.modules.items()
           for path, value in network.named_parameters()}  # fmt: skip
    out, figures = {}, {}
    for path in paths:
        values = [c.double().cpu() @ part.weights[path].double().cpu().T
                  for c, part in zip(targets, parts, strict=True)]  # fmt: skip
        found = solver(own[path], torch.cat(values))
        out[path] = found.weight.to(own[path])
        figures[path] = {"residual": found.residual, "change": found.change, "drift": found.drift}
    total = sum(len(each) for each in targets)
    facts: dict[str, Any] = {
        "class": " ".join(part.class_noun for part in parts), "merged": [part.name for part in parts],
        "targets": total, "dropped": total - len(solver.independent_rows), "condition": solver.condition,
        "matrices": figures,
        "captions": len(captions), "width": regular.shape[1],
    }  # fmt: skip
    return Taught(model, method, words=words, weights=out, facts=facts)


def features(model: Model, texts: Sequence[str]) -> list[Tensor]:
    """Of each text the features (n d) of its tokens as keys and values get them, the end included; the start and what
    fills up are left out."""
    stream = model.tokenizers[0]
    out = []
    for text in texts:
        embeds = model.encode_text(text, guidance=False).cond["embeds"][0]
        count = min(len(stream.tokenizer(stream.prepare(text)).input_ids), stream.length)
        out.append(embeds[1:count])
    return out


def merge_files(model: Model, names: Sequence[str], data: Any, prompt: str, ridge: float, method: str) -> Taught:
    """:func:`merged` of weight files, each with its word beside it (``NAME-word.safetensors``); ``data``: a text file
    with a caption on each line, or "toybox"."""

    parts = []
    for name in names:
        weights = Weights(file=name)
        check_base(weights.contents.metadata, model, weights.path, forced=False)
        word = Word(file=str(word_beside(weights.path)))
        facts = valid.loads(weights.contents.metadata.get("sfumato.facts", "{}"))
        held = {f"{component}.{path}": value.detach() for component, each in weights.weights(model, 1.0).items()
                for path, value in each.items()}  # fmt: skip
        parts.append(Part(word.words[0], str(facts.get("class") or ""), word.vectors(model)[word.words[0]], held))
    return merged(model, parts, _captions(data), prompt, ridge, method)


def _captions(data: Any, n: int = 300) -> list[str]:
    if str(data) == "toybox":
        from sfumato.toybox import caption
        from sfumato.toybox.dataset import draw_scene

        return [caption(draw_scene("train", 0, i)).text for i in range(n)]
    path = Path(data)
    if not path.is_file():
        raise BadInput(f"{path} is no file of captions: a merge needs one with a caption on each line, or toybox.")
    return [line.strip() for line in files.read_text(path).splitlines() if line.strip()]
