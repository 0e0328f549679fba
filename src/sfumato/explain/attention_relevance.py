"""Attention relevance: which patches, regions and words led a transformer to this output, and no other.

Chefer, Gur, Wolf, "Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder Transformers"
(ICCV 2021, arXiv 2103.15679). Each attention map is weighted by the gradient of one scalar with respect to it, positive
parts are averaged over heads (rule 5), and relevance is carried from layer to layer through self-, co- and
encoder-decoder attention (rules 6 to 11, :mod:`sfumato.relevance.rules`).

    >>> found = relevance(clip, inputs, lambda out: out.logits_per_image.diagonal())   # any transformers model
    >>> found.row("image", 0)                                                          # what led to the class token

    >>> explain(picture, "a red ball", model="toy-clip", by="attention_relevance")     # or a picture and a question

Beyond the original: batches; any scalar; diffusion denoisers (U-Net across its resolutions, joint attention); models
found by what their modules do instead of copies of them; half precision.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sfumato import cards
from sfumato.cards import Card, Field, register
from sfumato.errors import BadInput, NotSupported, UnknownName
from sfumato.models.site import Site
from sfumato.relevance.capture import Attended, captured, refuse_no_attention
from sfumato.relevance.layouts import Layout, Move, layout
from sfumato.relevance.rules import Relevancy, fuse_heads, resampling, with_residual

__all__ = ["METHODS", "AttentionRelevance", "Relevances", "explain_image", "relevance"]

Method = Literal[
    "relevance",
    "rollout",
    "raw",
    "gradcam",
    "input_gradient",
    "partial_lrp",
    "transformer_attribution",
    "relevance_lrp",
]
METHODS: tuple[str, ...] = Method.__args__  # type: ignore[attr-defined]
#: those that propagate relevance through the whole network first
LAYERED = ("relevance", "rollout", "relevance_lrp", "transformer_attribution")  # methods that start_layer is for
WITH_LRP = ("partial_lrp", "transformer_attribution", "relevance_lrp")

Target = Callable[[Any], Tensor]
#: (module, run, target) -> the relevance of every attention map (b k n t), in the order in which the calls run
Provider = Callable[[nn.Module, Callable[[], Any], Target], Sequence[Tensor]]


@dataclass(frozen=True, eq=False)
class Relevances:
    """Matrices (b n m) between token sets: ``matrices["text", "image"]`` says how much each image token led to each
    text token. ``scores`` (b) are the target's values, ``layout`` what the sets are."""

    matrices: dict[tuple[str, str], Tensor]
    scores: Tensor
    layout: Layout
    method: str

    def __getitem__(self, pair: tuple[str, str]) -> Tensor:
        if pair not in self.matrices:
            known = ", ".join(f"{s} <- {q}" for s, q in self.matrices)
            raise UnknownName("pair of token sets", " <- ".join(pair), [known])
        return self.matrices[pair]

    def row(self, rows: str, index: int | Tensor, columns: str | None = None) -> Tensor:
        """(b m): what led to one token of ``rows``, by default among the same set; ``index`` one for all or (b)."""
        matrix = self[rows, columns or rows]
        index = torch.as_tensor(index, device=matrix.device).expand(len(matrix))
        return matrix[torch.arange(len(matrix), device=matrix.device), index]

    def block(self, rows: str, columns: str) -> Tensor:
        """(b n m) between two sets, or two parts of a joint one ("image" and "text" of "tokens")."""
        if (rows, columns) in self.matrices:
            return self.matrices[rows, columns]
        parts = self.layout.parts
        if rows in parts and columns in parts:
            return self["tokens", "tokens"][:, slice(*parts[rows]), slice(*parts[columns])]
        return self[rows, columns]


def relevance(
    module: nn.Module,
    run: Mapping[str, Any] | Callable[[], Any],
    target: Target,
    *,
    method: str = "relevance",
    start_layer: int = 0,
    normalise: bool = True,
    mix: bool = True,
    add: bool = True,
    sites: Sequence[Site] | None = None,
    provider: Provider | None = None,
    second_order: bool = False,
) -> Relevances:
    """Relevance of all tokens of any model whose attention is a softmax.

    Args:
        module: a transformers model, or a diffusion denoiser together with its ``sites``.
        run: the model's inputs by name, or a function that calls it and returns its outputs.
        target: of the outputs, one scalar per sample (b); samples must not depend on one another.
        method: "relevance" (the paper's), or a baseline: "rollout", "raw" (last attention), "gradcam" (of the last
            attention), "input_gradient" (last attention times gradient times input), and with layer-wise relevance
            propagation "partial_lrp", "transformer_attribution", "relevance_lrp".
        start_layer: layers of each set before this one are skipped; negative counts from the last (-1: only it).
        normalise, mix, add: False leaves out eqs. 8 and 9, the self matrices in rule 10, the sum in every rule.
        provider: the propagation behind the last three methods; default: that of sfumato.explain.lrp.
        second_order: keep the graph, so that the result can itself be part of a loss.

    Costs one forward and one backward pass. The model is in evaluation mode meanwhile (not with ``second_order``,
    where the caller decides).

    Raises:
        UnknownName: the method. BadInput: a target of another shape, or one that attention has no part in.
        NotSupported: no softmax attention (linear attention, convolutions), windows, or attention out of reach.
    """
    if method not in METHODS:
        raise UnknownName("method", method, METHODS)
    if start_layer and method not in LAYERED:
        raise BadInput(f"start_layer is {start_layer}, but {method} does not add up layers; {', '.join(LAYERED)} do.")
    call = run if callable(run) else lambda: module(**run)
    with contextlib.nullcontext() if second_order else _evaluation(module):
        # gradients of the tokens themselves need something upstream of them that has one
        with _with_gradients(module) if method == "input_gradient" else contextlib.nullcontext():
            with captured(module) as calls:
                scores = target(call())
            refuse_no_attention(module, calls)
            plan = layout(module, calls, sites)
            _check_target(scores, calls)
            tokens = _tokens_of(plan, calls) if method == "input_gradient" else {}
            needs = [c.probs for c in calls] if method in ("relevance", "gradcam", *WITH_LRP) else []
            slopes = _slopes(scores, needs + list(tokens.values()), second_order) if needs or tokens else []
        given = _from_provider(provider, module, call, target, calls) if method in WITH_LRP else None
    maps = [c.probs if second_order else c.probs.detach() for c in calls]
    matrices = _combine(method, plan, maps, slopes, given, start_layer, normalise, mix, add, tokens)
    return Relevances(matrices, scores.detach().float(), plan, method)


# -- gradients -----------------------------------------------------------------------------------------------------


def _slopes(scores: Tensor, of: Sequence[Tensor], second_order: bool) -> list[Tensor]:
    """Gradients of the summed scores. In float16 the scores are scaled up first, for small gradients vanish there."""
    scale = 1024.0 if scores.dtype == torch.float16 else 1.0
    wanted = [x for x in of if x.requires_grad]
    with torch.enable_grad():
        total = scores.sum(dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32) * scale
    if not total.requires_grad or not wanted:
        raise BadInput("the target does not depend on any attention of this model; it must come from its outputs.")
    found = torch.autograd.grad(total, wanted, allow_unused=True, create_graph=second_order)
    if all(slope is None for slope in found):
        raise BadInput("the target does not depend on any attention of this model; it must come from its outputs.")
    by = {id(x): slope for x, slope in zip(wanted, found, strict=True)}
    return [torch.zeros_like(x) if by.get(id(x)) is None else by[id(x)].to(x.dtype) / scale for x in of]


def _check_target(scores: Any, calls: Sequence[Attended]) -> None:
    batch = calls[0].probs.shape[0]
    if not isinstance(scores, Tensor) or scores.shape != (batch,):
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise BadInput(f"the target must give one scalar per sample, shape ({batch},); it gave {shape}.")
    if not scores.detach().isfinite().all():
        raise BadInput("the target is not finite for these inputs, so nothing led to it.")


@contextlib.contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    """Within: evaluation mode (dropout would be part of the maps). Afterwards every part is as it was."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextlib.contextmanager
def _with_gradients(module: nn.Module) -> Iterator[None]:
    frozen = [p for p in module.parameters() if not p.requires_grad and p.is_floating_point()]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def _from_provider(
    provider: Provider | None, module: nn.Module, call: Callable[[], Any], target: Target, calls: Sequence[Attended]
) -> list[Tensor]:
    if provider is None:
        try:
            provider = importlib.import_module("sfumato.explain.lrp").attention_relevances
        except (ImportError, AttributeError):
            raise NotSupported(
                f"{', '.join(WITH_LRP)} need layer-wise relevance propagation: give provider=, a function of "
                f"(module, run, target) that returns the relevance of every attention map."
            ) from None
    found = [each.detach() for each in provider(module, call, target)]
    if [each.shape for each in found] != [c.probs.shape for c in calls]:
        raise BadInput(f"provider gave {len(found)} relevance maps that do not fit the {len(calls)} attention maps.")
    return found


def _tokens_of(plan: Layout, calls: Sequence[Attended]) -> dict[str, Tensor]:
    """The hidden states with which each set first enters attention; parts of a joint set apart."""
    found: dict[str, Tensor] = {}
    for move in plan.moves:
        if move.kind == "grid":
            continue
        call = calls[move.call]
        states = list(call.inputs)
        for name in dict.fromkeys((move.rows, move.columns)):
            if name in found or not states:
                continue
            count = call.queries if name == move.rows else call.keys
            if plan.parts and len(states) > 1 and states[0].shape[1] != count:
                order = sorted(plan.parts, key=lambda part: part != "image")  # modules are called with the image first
                found.update({f"{name}.{part}": state for part, state in zip(order, states, strict=False)})
                found.setdefault(name, torch.zeros(0))
                continue
            fit = [x for x in states if x.shape[1] == count]
            if fit:
                found[name] = fit[0] if name == move.rows else fit[-1]
    return {name: x for name, x in found.items() if x.numel()}


# -- methods -------------------------------------------------------------------------------------------------------


def _combine(
    method: str,
    plan: Layout,
    maps: Sequence[Tensor],
    slopes: Sequence[Tensor],
    given: Sequence[Tensor] | None,
    start_layer: int,
    normalise: bool,
    mix: bool,
    add: bool,
    tokens: Mapping[str, Tensor],
) -> dict[tuple[str, str], Tensor]:
    if method in ("relevance", "relevance_lrp"):
        weights = maps if given is None else given
        fused = [fuse_heads(a, g) for a, g in zip(weights, slopes, strict=True)]
        return _propagated(plan, fused, start_layer, normalise=normalise, mix=mix, add=add)
    if method == "rollout":
        return _rolled(plan, [each.mean(1) for each in maps], start_layer)
    if method == "transformer_attribution":
        assert given is not None
        fused = [fuse_heads(a, g) for a, g in zip(given, slopes, strict=True)]
        # the earlier paper's: self matrices accumulate, of the other modality only the last map counts
        own = _propagated(plan, fused, start_layer, only_self=True)
        return {(s, q): m for (s, q), m in own.items() if s == q} | _last(plan, fused, across=True)
    if method == "partial_lrp":
        assert given is not None
        return _last(plan, [each.clamp_min(0).mean(1) for each in given])
    if method == "gradcam":
        cams = [(g.mean((-2, -1), keepdim=True) * a).mean(1).clamp_min(0) for a, g in zip(maps, slopes, strict=True)]
        return _last(plan, cams)
    plain = _last(plan, [each.mean(1) for each in maps])
    if method == "raw":
        return plain
    weights_of = {
        name: (x.detach().float() * slope.float()).sum(-1).abs()
        for (name, x), slope in zip(tokens.items(), slopes, strict=True)
    }
    return {(s, q): m * _weights(plan, q, weights_of, m)[:, None] for (s, q), m in plain.items()}


def _propagated(
    plan: Layout, fused: Sequence[Tensor], start_layer: int, only_self: bool = False, **rules: bool
) -> dict[tuple[str, str], Tensor]:
    state = Relevancy(plan.sizes, fused[0], **rules)
    passed: dict[tuple[str, tuple[int, int]], Any] = {}
    skipped = _skipped(plan, start_layer)
    for i, move in enumerate(plan.moves):
        if move.kind == "grid":
            passed[move.rows, move.old] = state.of(move.rows)
            state.resample(move.rows, move.old, move.new)
            if (move.rows, move.new) in passed:  # the way up meets what was kept on the way down
                kept = passed[move.rows, move.new]
                state.join({pair: m for pair, m in kept.items() if m.shape == state[pair].shape})
        elif i in skipped:
            continue
        elif move.kind == "self":
            state.attend_self(move.rows, _whole(fused[move.call], move, plan))
        elif not only_self and move.kind == "cross":
            state.attend_cross(move.rows, move.columns, fused[move.call])
        elif not only_self:
            state.attend_both(move.rows, move.columns, fused[move.call], fused[move.back])
    return state.matrices


def _rolled(plan: Layout, maps: Sequence[Tensor], start_layer: int) -> dict[tuple[str, str], Tensor]:
    """Rollout in every set; between two sets, with the last map between them alone (as the authors' code does)."""
    out: dict[tuple[str, str], Tensor] = {}
    for s, n in plan.sizes.items():
        out[s, s] = torch.eye(n).to(maps[0]).expand(maps[0].shape[0], n, n)
    skipped = _skipped(plan, start_layer)
    for i, move in enumerate(plan.moves):
        if move.kind == "grid":
            rows, columns = (part.to(maps[0]) for part in resampling(move.old, move.new))
            out[move.rows, move.rows] = rows @ out[move.rows, move.rows] @ columns
        elif move.kind == "self" and i not in skipped:
            each = _whole(maps[move.call], move, plan)
            out[move.rows, move.rows] = with_residual(each) @ out[move.rows, move.rows]
    for (s, q), last in _last(plan, maps, across=True).items():
        out[s, q] = out[s, s].transpose(-1, -2) @ last @ out[q, q]
    return out


def _last(plan: Layout, maps: Sequence[Tensor], across: bool = False) -> dict[tuple[str, str], Tensor]:
    """The last map between each pair of sets; ``across``: of different sets only."""
    out = {}
    for s in plan.sizes:
        for q in plan.sizes:
            move = plan.last(s, q)
            if move is not None and not (across and s == q):
                found = maps[move.call]
                if s in plan.grids and found.shape[1] != plan.grids[s][0] * plan.grids[s][1]:
                    old = _grid_at(plan, move)
                    rows, columns = (part.to(found) for part in resampling(old, plan.grids[s]))
                    found = rows @ found @ columns if s == q else rows @ found
                out[s, q] = found
    return out


def _grid_at(plan: Layout, wanted: Move) -> tuple[int, int]:
    """The grid of a step's rows when the step is taken."""
    later = [m for m in plan.moves[plan.moves.index(wanted) :] if m.kind == "grid" and m.rows == wanted.rows]
    return later[0].old if later else plan.grids[wanted.rows]


def _whole(fused: Tensor, move: Move, plan: Layout) -> Tensor:
    """A map of a part of the tokens as one of all."""
    if move.part is None:
        return fused
    n, (start, stop) = plan.sizes[move.rows], move.part
    out = fused.new_zeros(len(fused), n, n)
    out[:, start:stop, start:stop] = fused
    return out


def _skipped(plan: Layout, start_layer: int) -> set[int]:
    """Numbers of the steps that lie before ``start_layer`` of their set."""
    if start_layer == 0:
        return set()
    layers: dict[str, int] = {}
    at: dict[int, tuple[str, int]] = {}
    for i, move in enumerate(plan.moves):
        if move.kind == "self":
            layers[move.rows] = layers.get(move.rows, 0) + 1
        if move.kind != "grid":
            at[i] = (move.rows, max(layers.get(move.rows, 1) - 1, 0))
    most = max(layers.values(), default=0)
    if not -most <= start_layer < most:
        raise BadInput(f"start_layer is {start_layer}, but this model has {most} layers: from {-most} to {most - 1}.")
    return {i for i, (s, k) in at.items() if k < (start_layer if start_layer > 0 else layers.get(s, 1) + start_layer)}


def _weights(plan: Layout, name: str, found: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """Gradient times input of the tokens of a set (b m)."""
    count = like.shape[-1]
    if name in found:
        value = found[name]
    else:
        parts = {part: found.get(f"{name}.{part}") for part in plan.parts}
        if not parts or any(value is None for value in parts.values()):
            raise NotSupported(f"the tokens of {name} never enter attention as such, so they have no input gradient.")
        ordered = sorted(plan.parts, key=lambda part: plan.parts[part])
        value = torch.cat([parts[part] for part in ordered if parts[part] is not None], 1)  # type: ignore[misc]
    if value.shape[1] == count:
        return value.to(like)
    old = next((move.old for move in plan.moves if move.kind == "grid" and move.rows == name), None)
    if old is None or old[0] * old[1] != value.shape[1]:
        raise NotSupported(f"the tokens of {name} change on their way, so they have no input gradient.")
    return value.to(like) @ resampling(old, plan.grids[name])[1].to(like)


# -- the system: pictures, texts and questions ---------------------------------------------------------------------


@register
class AttentionRelevance:
    """The system as ``sfumato explain PICTURE --by attention_relevance`` runs it: its card, its parameters."""

    CARD = Card(
        key="attention_relevance",
        title="Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder Transformers",
        authors="Chefer, Gur, Wolf",
        year=2021,
        arxiv="2103.15679",
        verb="explain",
        needs=(),
        defaults_from="section 3 of the paper; for CLIP the authors' code (last layer of each tower only)",
        cost="one forward and one backward pass per thing asked; diffusion models: that per noise level",
        not_reproduced="windowed attention (Swin); the paper's networks and data sets, for which the toybox stands",
        summary="which patches, regions and words led a transformer to an answer, class, box or match",
    )

    class Params(cards.Params):
        method: Method = Field(default="relevance", description="relevance as in the paper, or a baseline")
        start_layer: int | None = Field(
            default=None,
            description="layers before this one are skipped, -1: all but the last; none: as usual",
        )
        normalise: bool = Field(default=True, description="normalise self matrices before cross-attention (eqs. 8, 9)")
        mix: bool = Field(default=True, description="use the self matrices in cross-attention (rule 10)")
        add: bool = Field(default=True, description="add up over layers rather than keep the last")
        words: list[str] = Field(default=[], description="models that draw: words to map; none: every word")
        least: float = Field(default=0.5, ge=0, le=1, description="detectors: explain finds of this certainty")
        detector: str = Field(default="toy-detr", description="question answerers: the model that finds the regions")

    def __init__(self, **given: Any):
        self.params = self.Params(**given)

    def explain_image(self, model: Any, image: Any, prompt: str, **options: Any) -> Any:
        """:func:`explain_image` with these parameters, by a model that draws."""
        return explain_image(model, image, prompt, **{**self.params.model_dump(), **options})

    def explain_reading(self, reader: Any, image: Any, prompt: str | None = None, **options: Any) -> Any:
        """:func:`explain_image` with these parameters, by a model that reads."""
        return explain_image(reader, image, prompt, **{**self.params.model_dump(), **options})


def explain_image(
    model: Any,
    image: Any,
    prompt: str | None = None,
    *,
    size: tuple[int, int] | None = None,
    steps: int | None = None,
    seed: int = 0,
    scheduler: Any = None,
    **params: Any,
) -> Any:
    """Relevance maps of one picture (a PIL picture or (1 3 h w) in [-1, 1]); see :func:`explain_images`."""
    from sfumato.explain import asking

    options = {"size": size, "steps": steps, "seed": seed, "scheduler": scheduler}
    return asking.explain_images(model, [image], [prompt], AttentionRelevance(**params).params, **options)[0]
