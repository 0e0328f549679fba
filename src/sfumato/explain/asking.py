"""Questions to models about pictures, answered with relevance: class, match, box, answer, or the words of a drawing.

The part of attention relevance that knows where a kind of model keeps its answer: which scalar is asked for, which
token decides it (the row), which tokens are the picture's cells, regions or words (the columns). After section 3.3 of
Chefer et al. 2021.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sfumato import registry
from sfumato.errors import BadInput, NotSupported
from sfumato.explain.attention_relevance import Relevances, relevance
from sfumato.explain.relevance_maps import Answer, RelevanceMaps, paint_regions
from sfumato.models import Model
from sfumato.models.readers import Reader, load_reader
from sfumato.models.readers.regions import fill_regions, region_features
from sfumato.sampling.loop import opened
from sfumato.sampling.request import as_pixels, checked, checked_size
from sfumato.text.words import Words, asked_for

__all__ = ["ask", "explain_images", "find_regions", "word_maps"]

#: the authors' code for CLIP reads the last layer of each tower only
CLIP_START = -1
#: regions of an answerer whose card does not say how many it was trained with
REGIONS = 36
NOISE_LEVELS = 5


def explain_images(
    model: Any,
    images: Sequence[Any],
    prompts: Sequence[str | None],
    params: Any,
    *,
    size: tuple[int, int] | None = None,
    steps: int | None = None,
    seed: int = 0,
    scheduler: Any = None,
) -> list[RelevanceMaps]:
    """Relevance of each picture to its prompt: a :class:`~sfumato.models.readers.Reader` is asked, a
    :class:`~sfumato.models.Model` that draws is shown the picture under noise."""
    rules = {name: getattr(params, name) for name in ("method", "normalise", "mix", "add")}
    rules["start_layer"] = params.start_layer
    if isinstance(model, Model):
        if any(prompt is None for prompt in prompts):
            raise BadInput(f"{model.name} draws from texts, so say what the picture shows: prompt=, or --prompt.")
        pixels = torch.cat([as_pixels(image, None if size is None else checked_size(model, size)) for image in images])
        return word_maps(
            model, pixels, [str(p) for p in prompts], params.words, steps=steps or NOISE_LEVELS, seed=seed,
            scheduler=scheduler, **rules,
        )  # fmt: skip
    if params.words:
        raise BadInput(f"words are for models that draw; {model.name} is asked about a text as a whole.")
    for name, value in (("steps", steps), ("scheduler", scheduler)):
        if value is not None:
            raise BadInput(f"{name} is for models that draw; {model.name} reads.")
    pixels = None if model.kind == "texts" else torch.cat([as_pixels(image, None) for image in images])
    return ask(model, pixels, prompts, least=params.least, detector=params.detector, **rules)


def ask(
    reader: Reader,
    images: Tensor | None,
    asked: Sequence[str | None],
    *,
    method: str = "relevance",
    start_layer: int | None = None,
    least: float = 0.5,
    detector: str = "toy-detr",
    regions: Tensor | None = None,
    **rules: Any,
) -> list[RelevanceMaps]:
    """Asks a reading model about pictures (b 3 h w) in [-1, 1], one question each; batched.

    ``asked``: for a matcher the text, for a classifier the class (None: the most likely one), for a detector the class
    (None: all), for an answerer the question, for a classifier of texts the text. ``regions`` (b n 4): what an answerer
    looks at, by default what ``detector`` finds; ``least``: the certainty from which a detector's find counts.
    ``method``, ``start_layer``, ``provider`` and ``rules``: as for
    :func:`~sfumato.explain.attention_relevance.relevance`.

    Raises BadInput where a question is missing or empty, UnknownName for a class the model does not have.
    """
    if start_layer is None:
        start_layer = CLIP_START if reader.kind == "matcher" and method in ("relevance", "relevance_lrp") else 0
    rules = {"method": method, "start_layer": start_layer, **rules}
    if reader.kind in ("matcher", "answerer", "texts"):
        what = {"matcher": "a text to compare the picture with", "answerer": "a question"}.get(reader.kind, "a text")
        for text in asked:
            if not (text or "").strip():
                raise BadInput(f"{reader.name} needs {what}: give prompt=, or --prompt.")
    if reader.kind == "texts":
        return _read_texts(reader, [str(text) for text in asked], rules)
    if images is None or len(images) != len(asked):
        raise BadInput(f"there are {0 if images is None else len(images)} pictures for {len(asked)} questions.")
    if reader.kind == "matcher":
        return _match(reader, images, [str(text) for text in asked], rules)
    if reader.kind == "classifier":
        return _classify(reader, images, asked, rules)
    if reader.kind == "detector":
        return _detect(reader, images, asked, least, rules)
    return _answer(reader, images, [str(text) for text in asked], detector, regions, rules)


# -- one function per kind of model ----------------------------------------------------------------------------------


def _match(reader: Reader, images: Tensor, texts: list[str], rules: dict[str, Any]) -> list[RelevanceMaps]:
    """A picture and a text that fit: rows are the class token and the text's end."""
    pixels, tokens = reader.pixels(images), reader.tokens(texts)
    names = ("input_ids", "attention_mask")
    inputs = {"pixel_values": pixels, **{name: tokens[name] for name in names if name in tokens}}
    found = relevance(reader.module, inputs, lambda out: out.logits_per_image.diagonal(), **rules)
    cells = _cells(found, "image", _picture_grid(reader, pixels))
    ids = tokens["input_ids"]
    end = getattr(reader.tokenizer, "eos_token_id", None)
    is_end = ids == end if end is not None else torch.zeros_like(ids, dtype=torch.bool)
    position = torch.where(is_end.any(1), is_end.int().argmax(1), ids.shape[1] - 1)
    values = found.row("text", position)
    out = []
    for i, text in enumerate(texts):
        answer = Answer(text, float(found.scores[i]), cells[i], *_words(reader, text, values[i]))
        out.append(_maps(reader, found, text, images, [answer]))
    return out


def _classify(
    reader: Reader, images: Tensor, classes: Sequence[str | None], rules: dict[str, Any]
) -> list[RelevanceMaps]:
    """A class: the row is the class token, or the mean of all where the model has none (ours)."""
    pixels = reader.pixels(images)
    wanted = [None if not name else reader.label(name) for name in classes]

    def target(out: Any) -> Tensor:
        likely = out.logits.detach().argmax(-1).tolist()
        target.chosen = [best if want is None else want for best, want in zip(likely, wanted, strict=True)]  # type: ignore[attr-defined]
        return out.logits[torch.arange(len(pixels)), torch.tensor(target.chosen)]  # type: ignore[attr-defined]

    found = relevance(reader.module, {"pixel_values": pixels}, target, **rules)
    cells = _cells(found, "tokens", _picture_grid(reader, pixels))
    names = [reader.labels[i] for i in target.chosen]  # type: ignore[attr-defined]
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

        def target(out: Any) -> Tensor:
            return out.logits[torch.arange(len(picture)), query, wanted]

        found = relevance(reader.module, {"pixel_values": pixels[picture]}, target, **rules)
        if "queries" in found.layout.sizes:
            rows = found.row("queries", query, "image")
        else:  # queries and patches in one sequence: class token, patches, queries
            first = found.layout.sizes["tokens"] - odds.shape[1]
            rows = found.row("tokens", first + query)[:, 1:first]
        h, w = _factors(rows.shape[1], tuple(pixels.shape[-2:]))
        for k, (i, q) in enumerate(pairs):
            x, y, wide, high = out.pred_boxes[i, q].float().tolist()
            box = (x - wide / 2, y - high / 2, x + wide / 2, y + high / 2)
            label = f"{reader.labels[int(kind[i, q])]} {certain[i, q]:.2f}"
            label += f" #{q}" if any(answer.label == label for answer in answers[i]) else ""
            cells = rows[k].view(h, w).float().cpu()
            answers[i].append(Answer(label, float(certain[i, q]), cells, box=box))
    return [
        _maps(reader, found, name or "everything found", images, each)
        for name, each in zip(classes, answers, strict=True)
    ]


def _answer(
    reader: Reader, images: Tensor, questions: list[str], detector: str, regions: Tensor | None, rules: dict[str, Any]
) -> list[RelevanceMaps]:
    """A question about regions: the row is the token that the answer is read from."""
    cells = reader.cells
    if regions is None:
        regions = find_regions(images, reader.regions or REGIONS, detector)
    features = region_features((images + 1) / 2 if reader.preprocessing.mean[0] == 0 else images, regions, cells).to(
        reader.dtype
    )
    tokens = reader.tokens([text.replace("colour", "color").replace("?", " ?") for text in questions])
    ids, mask = tokens["input_ids"], tokens["attention_mask"]
    joint = hasattr(reader.config, "visual_embedding_dim")
    if joint:
        shape = features.shape[:2]
        seen = {"visual_embeds": features, "visual_attention_mask": torch.ones(shape)}
        seen["visual_token_type_ids"] = torch.ones(shape, dtype=torch.long)
    else:
        seen = {"visual_feats": features, "visual_pos": regions.to(features)}

    def scores(out: Any) -> Tensor:
        return out.question_answering_score if hasattr(out, "question_answering_score") else out.logits

    def target(out: Any) -> Tensor:
        given = scores(out)
        target.best = given.detach().argmax(-1)  # type: ignore[attr-defined]
        return given[torch.arange(len(given)), target.best]  # type: ignore[attr-defined]

    found = relevance(reader.module, {"input_ids": ids, "attention_mask": mask, **seen}, target, **rules)
    count = ids.shape[1]
    if joint:  # words, then regions, in one sequence; the answer is read from the last word but one
        row = found.row("tokens", mask.sum(1) - 2)
        own, other = row[:, :count], row[:, count:]
    else:
        own = found.row("text", 0).clone()
        own[:, 0] = 0  # the class token's relevance to itself
        other = found.row("text", 0, "image")
    names = reader.labels
    out = []
    for i, question in enumerate(questions):
        best = int(target.best[i])  # type: ignore[attr-defined]
        name = names[best] if best < len(names) else str(best)
        painted = paint_regions(regions[i], other[i].float(), tuple(images.shape[-2:]))
        words, values = _words(reader, question, own[i] * mask[i])
        answer = Answer(
            name, float(found.scores[i]), painted, words, values, regions[i].float().cpu(), other[i].float().cpu()
        )
        out.append(_maps(reader, found, question, images, [answer]))
    return out


def _read_texts(reader: Reader, texts: list[str], rules: dict[str, Any]) -> list[RelevanceMaps]:
    """A class of a text: the row is the first token."""
    tokens = reader.tokens(texts)

    def target(out: Any) -> Tensor:
        best = out.logits.detach().argmax(-1)
        target.chosen = best.tolist()  # type: ignore[attr-defined]
        return out.logits[torch.arange(len(best)), best]

    found = relevance(reader.module, tokens, target, **rules)
    values = found.row("tokens", 0) * tokens["attention_mask"]
    names = reader.labels
    return [
        RelevanceMaps(
            (Answer(names[target.chosen[i]], float(found.scores[i]), None, *_words(reader, text, values[i])),),  # type: ignore[attr-defined]
            (64, 64), found.method, {"model": reader.name, "asked": text},
        )
        for i, text in enumerate(texts)
    ]  # fmt: skip


def find_regions(images: Tensor, count: int, detector: str = "toy-detr") -> Tensor:
    """Boxes (b, count, 4) of pictures (b 3 h w): what a detector finds, filled up with boxes of the background.

    Raises NotSupported where the detector is not there.
    """
    if registry.find(detector) is None:
        raise NotSupported(f"finding regions needs the detector {detector}, whose weights are not here; give regions=.")
    reader = _detector(detector)
    with torch.no_grad():
        out = reader.module(pixel_values=reader.pixels(images))
    odds = out.logits.float().softmax(-1)[..., :-1].amax(-1)
    middle, side = out.pred_boxes[..., :2].float(), out.pred_boxes[..., 2:].float()
    corners = torch.cat([middle - side / 2, middle + side / 2], -1).clamp(0, 1)
    return torch.stack([fill_regions(box[odd > 0.5][:count], count) for box, odd in zip(corners, odds, strict=True)])


@functools.lru_cache(maxsize=2)
def _detector(name: str) -> Reader:
    return load_reader(name)


# -- models that draw ------------------------------------------------------------------------------------------------


def word_maps(
    model: Model,
    images: Tensor,
    prompts: Sequence[str],
    words: Sequence[str] = (),
    *,
    steps: int = NOISE_LEVELS,
    seed: int = 0,
    scheduler: Any = None,
    start_layer: int | None = None,
    target: Callable[[Tensor, Tensor], Tensor] | None = None,
    **rules: Any,
) -> list[RelevanceMaps]:
    """For each word, which places of the picture it helped to draw: relevance of text tokens to picture tokens.

    A picture (b 3 h w in [-1, 1]) is noised to ``steps`` levels of the schedule. The scalar explained at each is the
    negative squared error of the predicted noise (``target`` of predicted and true noise, both (b c h w), gives
    another), so a word is relevant where it helped the model to recognise what is there. Ours: the paper explains no
    diffusion models. Maps are means over the levels. Costs one forward and one backward pass per level.
    """
    checked_size(model, (images.shape[-1], images.shape[-2]))
    readings = [Words(model).read(prompt) for prompt in prompts]
    spans = asked_for(readings, list(words)) if words else [reading.all() for reading in readings]
    with torch.no_grad():  # one by one, so that the maps of a picture do not depend on its neighbours
        clean = torch.cat([model.encode_image(picture) for picture in images.split(1)])
    schedule = scheduler or ("flow_euler" if model.flow else "ddim")
    guidance: dict[str, Any] = {} if model.embeds_guidance else {"guidance": 1.0}
    request = checked(model, list(prompts), steps=steps, seed=seed, latents=clean, scheduler=schedule, **guidance)
    score = target or (lambda said, true: -(said - true).square().sum((1, 2, 3)))
    total: Tensor | None = None
    scores = torch.zeros(len(prompts))
    with opened(model, request, range(len(request)), ()) as run:
        _refuse_several_calls(model)
        for i in range(run.total):
            noise = randn_tensor(tuple(clean.shape), generator=run.generators, device=clean.device, dtype=clean.dtype)
            t = run.timesteps[i]
            run.seek(i)
            x = run.path.add_noise(clean, noise, t).to(model.dtype)

            def predict(x: Tensor = x, t: Tensor = t) -> Tensor:
                assert run.condition is not None
                out = run.denoise(x, t, run.condition, ("cond",), (), None)["cond"]
                return run.path.to_eps(x.float(), out.float(), t)

            found = relevance(
                model.denoiser, predict, lambda said, noise=noise: score(said, noise.float()), sites=run.sites,
                start_layer=start_layer or 0, **rules,
            )  # fmt: skip
            across = found.block("image", "text").float()
            total = across if total is None else total + across
            scores += found.scores.cpu() / run.total
    assert total is not None
    h, w = found.layout.grids["image"]
    out = []
    for i, prompt in enumerate(prompts):
        answers = []
        for span in spans[i]:
            if span.positions:
                cells = total[i][:, list(span.positions)].mean(-1).view(h, w) / request.steps
                answers.append(Answer(span.label, float(scores[i]), cells.cpu()))
        facts = {"model": model.name, "asked": prompt, "seed": seed + i, "steps": steps}
        out.append(RelevanceMaps(tuple(answers), tuple(images.shape[-2:]), found.method, facts))
    return out


def _refuse_several_calls(model: Model) -> None:
    if len(model.calls(("cond",))) != 1:
        raise NotSupported(f"{model.name} predicts in several passes, whose attention does not form one relevance.")


# -- reading rows ------------------------------------------------------------------------------------------------------


def _cells(found: Relevances, name: str, grid: tuple[int, int]) -> Tensor:
    """(b h w): the row of the class token among the picture's own cells, the last of the sequence."""
    matrix = found[name, name]
    cells = grid[0] * grid[1]
    extra = matrix.shape[-1] - cells
    if extra < 0:
        raise NotSupported(f"the model works on {matrix.shape[-1]} tokens, fewer than its {cells} cells.")
    row = matrix[:, 0] if extra else matrix.mean(1)
    return row[:, extra:].reshape(-1, *grid).float().cpu()


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
    given = text.replace("colour", "color").replace("?", " ?") if reader.kind == "answerer" else text
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


def _maps(reader: Reader, found: Relevances | None, asked: str, images: Tensor, answers: list[Answer]) -> RelevanceMaps:
    facts = {"model": reader.name, "asked": asked}
    method = found.method if found is not None else "relevance"
    return RelevanceMaps(tuple(answers), (images.shape[-2], images.shape[-1]), method, facts)
