"""Questions to models that read pictures and texts, answered with relevance: class, match, box, answer.

What each kind of model is asked for as one scalar, and which tokens are the picture's cells, regions or words (the
columns). Which tokens decide (the rows) is found by the scalar's gradient. After section 3.3 of Chefer et al. 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import BadInput, NotSupported
from sfumato.explain.relevance_maps import Answer, RelevanceMaps, paint_regions
from sfumato.models.readers import Reader
from sfumato.models.readers.regions import corners_of, find_regions, region_features
from sfumato.relevance.attention import RelevanceMatrices, attention_relevance

__all__ = ["ask"]

#: the authors' code for CLIP reads the last layer of each tower only
CLIP_START = -1
#: regions of an answerer whose card does not say how many it was trained with
REGIONS = 36


def ask(
    reader: Reader,
    images: Tensor | None,
    questions: Sequence[str | None],
    *,
    method: str = "relevance",
    start_layer: int | None = None,
    least: float = 0.5,
    detector: str = "toy-detr",
    regions: Tensor | None = None,
    **rules: Any,
) -> list[RelevanceMaps]:
    """Asks a reading model about pictures (b 3 h w) in [-1, 1], one question each; batched.

    ``questions``: for a matcher the text, for a classifier the class (None: the most likely one), for a detector the
    class (None: all), for an answerer the question, for a classifier of texts the text. ``regions`` (b n 4): what an
    answerer looks at, by default what ``detector`` finds; ``least``: the certainty from which a detector's find counts.
    ``method``, ``start_layer`` and ``rules``: as for :func:`~sfumato.relevance.attention.attention_relevance`.

    Raises BadInput where a question is missing or empty, UnknownName for a class the model does not have.
    """
    if start_layer is None:
        start_layer = CLIP_START if reader.kind == "matcher" and method in ("relevance", "relevance_lrp") else 0
    rules = {"method": method, "start_layer": start_layer, **rules}
    if reader.kind in ("matcher", "answerer", "texts"):
        what = {"matcher": "a text to compare the picture with", "answerer": "a question"}.get(reader.kind, "a text")
        for text in questions:
            if not (text or "").strip():
                raise BadInput(f"{reader.name} needs {what}: give prompt=, or --prompt.")
    if reader.kind == "texts":
        return _read_texts(reader, [str(text) for text in questions], rules)
    if images is None or len(images) != len(questions):
        raise BadInput(f"there are {0 if images is None else len(images)} pictures for {len(questions)} questions.")
    if reader.kind == "matcher":
        return _match(reader, images, [str(text) for text in questions], rules)
    if reader.kind == "classifier":
        return _classify(reader, images, questions, rules)
    if reader.kind == "detector":
        return _detect(reader, images, questions, least, rules)
    return _answer(reader, images, [str(text) for text in questions], detector, regions, rules)


# -- one function per kind of model ----------------------------------------------------------------------------------


class _Best:
    """A target: per sample the score of the class named, or of the best one. ``index`` (b) says which it was."""

    def __init__(self, scores: Callable[[Any], Tensor], wanted: Sequence[int | None] = ()):
        self.scores, self.wanted = scores, wanted
        self.index: list[int] = []

    def __call__(self, out: Any) -> Tensor:
        scores = self.scores(out)
        best = scores.detach().argmax(-1).tolist()
        self.index = [b if w is None else w for b, w in zip(best, self.wanted or [None] * len(best), strict=True)]
        return scores[torch.arange(len(best)), torch.tensor(self.index)]


def _match(reader: Reader, images: Tensor, texts: list[str], rules: dict[str, Any]) -> list[RelevanceMaps]:
    """A picture and a text that fit: the cells of one, the words of the other."""
    pixels, tokens = reader.pixels(images), reader.tokens(texts)
    names = ("input_ids", "attention_mask")
    inputs = {"pixel_values": pixels, **{name: tokens[name] for name in names if name in tokens}}
    target = lambda out: out.logits_per_image.diagonal()  # noqa: E731
    found = attention_relevance(reader.module, inputs, target, read=("image", "text"), **rules)
    cells, values = _cells(found, "image", _picture_grid(reader, pixels)), found.read("text")
    out = []
    for i, text in enumerate(texts):
        answer = Answer(text, float(found.scores[i]), cells[i], *_words(reader, text, values[i]))
        out.append(_maps(reader, found, text, images, [answer]))
    return out


def _classify(
    reader: Reader, images: Tensor, classes: Sequence[str | None], rules: dict[str, Any]
) -> list[RelevanceMaps]:
    """A class of a picture."""
    pixels = reader.pixels(images)
    target = _Best(lambda out: out.logits, [None if not name else reader.label(name) for name in classes])
    found = attention_relevance(reader.module, {"pixel_values": pixels}, target, read=("tokens",), **rules)
    cells = _cells(found, "tokens", _picture_grid(reader, pixels))
    names = [reader.labels[i] for i in target.index]
    return [
        _maps(reader, found, name, images, [Answer(name, float(found.scores[i]), cells[i])])
        for i, name in enumerate(names)
    ]


def _detect(
    reader: Reader, images: Tensor, classes: Sequence[str | None], least: float, rules: dict[str, Any]
) -> list[RelevanceMaps]:
    """Boxes: each query that found something is asked for its class score; the row is the query's own."""
    pixels = reader.pixels(images)
    with torch.no_grad():
        out = reader.module(pixel_values=pixels)
    odds = out.logits.float().softmax(-1)[..., :-1]
    certain, kind = odds.max(-1)
    pairs = []
    for i, name in enumerate(classes):
        of_kind = torch.ones_like(kind[i], dtype=torch.bool) if not name else kind[i] == reader.label(name)
        rows = ((certain[i] >= least) & of_kind).nonzero().flatten()
        pairs += [(i, int(q)) for q in rows[certain[i, rows].argsort(descending=True)]]
    answers: list[list[Answer]] = [[] for _ in classes]
    found = None
    if pairs:
        picture, query = torch.tensor(pairs).T
        wanted = kind[picture, query]
        target = lambda out: out.logits[torch.arange(len(picture)), query, wanted]  # noqa: E731
        found = attention_relevance(reader.module, {"pixel_values": pixels[picture]}, target, **rules)
        if "queries" in found.layout.sizes:
            rows = found.row("queries", query, "image")
        else:  # queries and patches in one sequence: class token, patches, queries
            first = found.layout.sizes["tokens"] - odds.shape[1]
            rows = found.row("tokens", first + query)[:, 1:first]
        h, w = _factors(rows.shape[1], tuple(pixels.shape[-2:]))
        corners = corners_of(out.pred_boxes)
        for k, (i, q) in enumerate(pairs):
            label = f"{reader.labels[int(kind[i, q])]} {certain[i, q]:.2f}"
            label += f" #{q}" if any(answer.label == label for answer in answers[i]) else ""
            x0, y0, x1, y1 = corners[i, q].tolist()
            cells = rows[k].view(h, w).float().cpu()
            answers[i].append(Answer(label, float(certain[i, q]), cells, box=(x0, y0, x1, y1)))
    return [
        _maps(reader, found, name or "everything found", images, each)
        for name, each in zip(classes, answers, strict=True)
    ]


def _answer(
    reader: Reader, images: Tensor, questions: list[str], detector: str, regions: Tensor | None, rules: dict[str, Any]
) -> list[RelevanceMaps]:
    """A question about regions."""
    cells = reader.cells
    if regions is None:
        regions = find_regions(images, reader.regions or REGIONS, detector)
    pixels = (images + 1) / 2 if reader.preprocessing.mean[0] == 0 else images
    features = region_features(pixels, regions, cells).to(reader.dtype)
    tokens = reader.tokens([_spelt(reader, text) for text in questions])
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    joint = hasattr(reader.config, "visual_embedding_dim")
    if joint:
        shape = features.shape[:2]
        visual = {"visual_embeds": features, "visual_attention_mask": torch.ones(shape)}
        visual["visual_token_type_ids"] = torch.ones(shape, dtype=torch.long)
    else:
        visual = {"visual_feats": features, "visual_pos": regions.to(features)}
    target = _Best(lambda out: out.question_answering_score if hasattr(out, "question_answering_score") else out.logits)
    inputs = {"input_ids": ids, "attention_mask": mask, **visual}
    words_set = "tokens" if joint else "text"
    found = attention_relevance(reader.module, inputs, target, read=(words_set,), **rules)
    count = ids.shape[1]
    if joint:  # words, then regions, in one sequence
        row = found.read("tokens")
        own, other = row[:, :count], row[:, count:]
    else:
        own = found.read("text")
        own[:, 0] = 0  # the class token's relevance to itself
        other = found.read("text", "image")
    names = reader.labels
    out = []
    for i, question in enumerate(questions):
        best = target.index[i]
        name = names[best] if best < len(names) else str(best)
        painted = paint_regions(regions[i], other[i].float(), tuple(images.shape[-2:]))
        words, values = _words(reader, question, own[i] * mask[i])
        answer = Answer(
            name, float(found.scores[i]), painted, words, values, regions[i].float().cpu(), other[i].float().cpu()
        )
        out.append(_maps(reader, found, question, images, [answer]))
    return out


def _read_texts(reader: Reader, texts: list[str], rules: dict[str, Any]) -> list[RelevanceMaps]:
    """A class of a text."""
    tokens = reader.tokens(texts)
    target = _Best(lambda out: out.logits)
    found = attention_relevance(reader.module, tokens, target, read=("tokens",), **rules)
    values = found.read("tokens") * tokens["attention_mask"]
    names = reader.labels
    out = []
    for i, text in enumerate(texts):
        answer = Answer(names[target.index[i]], float(found.scores[i]), None, *_words(reader, text, values[i]))
        out.append(RelevanceMaps((answer,), (64, 64), found.method, {"model": reader.name, "query": text}))
    return out


# -- reading rows ------------------------------------------------------------------------------------------------------


def _cells(found: RelevanceMatrices, name: str, grid: tuple[int, int]) -> Tensor:
    """(b h w): relevance of the picture's own cells, the last of the sequence, to the tokens that decide."""
    matrix = found[name, name]
    cells = grid[0] * grid[1]
    extra = matrix.shape[-1] - cells
    if extra < 0:
        raise NotSupported(f"the model works on {matrix.shape[-1]} tokens, fewer than its {cells} cells.")
    return found.read(name)[:, extra:].reshape(-1, *grid).float().cpu()


def _picture_grid(reader: Reader, pixels: Tensor) -> tuple[int, int]:
    config = getattr(reader.config, "vision_config", reader.config)
    patch = getattr(config, "patch_size", None)
    if patch is None:
        raise NotSupported(f"{reader.name} does not cut pictures into patches, so its tokens have no place in them.")
    high, wide = (patch, patch) if isinstance(patch, int) else patch
    return pixels.shape[-2] // high, pixels.shape[-1] // wide


def _factors(cells: int, size: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of so many cells laid over a picture of ``size`` (H, W)."""
    for stride in range(1, max(size) + 1):
        h, w = -(-size[0] // stride), -(-size[1] // stride)
        if h * w == cells:
            return h, w
    raise NotSupported(f"{cells} tokens do not form a grid over a picture of {size[1]}x{size[0]}.")


def _words(reader: Reader, text: str, values: Tensor) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The words of a text, without special tokens, and each one's share of the relevance; pieces are summed."""
    given = _spelt(reader, text)
    spans = reader.tokenizer(given, return_offsets_mapping=True).offset_mapping
    words: list[str] = []
    shares: list[float] = []
    last = -1
    for (start, end), value in zip(spans, values.float().tolist(), strict=False):
        if end <= start:
            continue
        if start == last and words:
            words[-1] += given[start:end]
            shares[-1] += value
        else:
            words.append(given[start:end])
            shares.append(value)
        last = end
    total = sum(shares)
    return tuple(words), tuple(share / total if total > 0 else 0.0 for share in shares)


def _spelt(reader: Reader, text: str) -> str:
    """A text in the spelling that answerers are trained with."""
    return text.replace("colour", "color").replace("?", " ?") if reader.kind == "answerer" else text


def _maps(
    reader: Reader, found: RelevanceMatrices | None, query: str, images: Tensor, answers: list[Answer]
) -> RelevanceMaps:
    facts = {"model": reader.name, "query": query}
    method = found.method if found is not None else "relevance"
    return RelevanceMaps(tuple(answers), (images.shape[-2], images.shape[-1]), method, facts)
