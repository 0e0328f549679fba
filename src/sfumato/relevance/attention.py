"""Attention relevance: which patches, regions and words led a transformer to this output, and no other.

Chefer, Gur, Wolf, "Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder Transformers"
(ICCV 2021, arXiv 2103.15679). Each attention map is weighted by the gradient of one scalar with respect to it, positive
parts are averaged over heads (rule 5), and relevance is carried from layer to layer through self-, co- and
encoder-decoder attention (rules 6 to 11, :mod:`sfumato.relevance.rules`).

    >>> found = attention_relevance(clip, inputs, lambda out: out.logits_per_image.diagonal(), read=["image"])
    >>> found.read("image")  # (b n): what led to the tokens that the answer is read from

Beyond the original: batches; any scalar; diffusion denoisers (U-Net across its resolutions, joint attention); models
found by what their modules do instead of copies of them; half precision; answers read from any tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sfumato.errors import BadInput, NotSupported, UnknownName
from sfumato.markup import described
from sfumato.models.modes import evaluation, with_gradients
from sfumato.models.site import Site
from sfumato.relevance.capture import CapturedAttention, captured, gradients_of, refuse_no_attention, refuse_windows
from sfumato.relevance.layouts import Layout, Move, layout
from sfumato.relevance.lrp import map_relevances
from sfumato.relevance.readout import read_weights, weighted_rows
from sfumato.relevance.rules import Relevancy, fuse_heads, resampling, with_residual

__all__ = ["METHODS", "Method", "RelevanceMatrices", "attention_relevance"]

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
#: methods that start_layer is for
LAYERED = ("relevance", "rollout", "relevance_lrp", "transformer_attribution")
#: those that propagate relevance through the whole network first
WITH_LRP = ("partial_lrp", "transformer_attribution", "relevance_lrp")

Target = Callable[[Any], Tensor]


@dataclass(frozen=True, eq=False)
class RelevanceMatrices:
    """Matrices (b n m) between token sets: ``matrices["text", "image"]`` says how much each image token led to each
    text token. ``scores`` (b) are the target's values, ``layout`` what the sets are, ``weights`` (b n) from which
    tokens of a set the target is read."""

    matrices: dict[tuple[str, str], Tensor]
    scores: Tensor
    layout: Layout
    method: str
    weights: dict[str, Tensor] = field(default_factory=dict)

    __repr__ = described

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

    def read(self, rows: str, columns: str | None = None) -> Tensor:
        """(b m): what led to the tokens of ``rows`` that the target is read from, in proportion; by default among the
        same set. The set must have been named in ``read`` of :func:`attention_relevance`."""
        if rows not in self.weights:
            raise UnknownName("set of tokens that is read", rows, self.weights)
        return weighted_rows(self[rows, columns or rows], self.weights[rows])

    def block(self, rows: str, columns: str) -> Tensor:
        """(b n m) between two sets, or two parts of a joint one ("image" and "text" of "tokens")."""
        if (rows, columns) in self.matrices:
            return self.matrices[rows, columns]
        parts = self.layout.parts
        if rows in parts and columns in parts:
            return self["tokens", "tokens"][:, slice(*parts[rows]), slice(*parts[columns])]
        return self[rows, columns]


def attention_relevance(
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
    read: Sequence[str] = (),
    second_order: bool = False,
) -> RelevanceMatrices:
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
        read: sets of which it is to be found from which tokens the target is read, for :meth:`Relevances.read`.
        second_order: keep the graph, so that the result can itself be part of a loss.

    Costs one forward and one backward pass. The model is in evaluation mode meanwhile (not with ``second_order``,
    where the caller decides).

    Raises:
        UnknownName: the method, a set. BadInput: a target of another shape, or one that attention has no part in.
        NotSupported: no softmax attention (linear attention, convolutions), windows, or attention out of reach.
    """
    if method not in METHODS:
        raise UnknownName("method", method, METHODS)
    if start_layer and method not in LAYERED:
        raise BadInput(f"start_layer is {start_layer}, but {method} does not add up layers; {', '.join(LAYERED)} do.")
    call = run if callable(run) else lambda: module(**run)
    with contextlib.nullcontext() if second_order else evaluation(module):
        # gradients of the tokens themselves need something upstream of them that has one
        with with_gradients(module) if method == "input_gradient" else contextlib.nullcontext():
            with captured(module) as calls:
                scores = target(call())
            refuse_no_attention(module, calls)
            if sites is None:
                refuse_windows([(c.path, c.probs.shape) for c in calls], _batch(run, scores))
            plan = layout(module, calls, sites)
            _check_target(scores, calls)
            tokens = _tokens_of(plan, calls) if method == "input_gradient" else {}
            blocks = {name: _last_block(plan, calls, name) for name in read}
            needs = [c.probs for c in calls] if method in ("relevance", "gradcam", *WITH_LRP) else []
            needs += [*tokens.values(), *blocks.values()]
            gradients = gradients_of(scores, needs, second_order) if needs else []
        relevances = _map_relevances(module, call, target, calls) if method in WITH_LRP else None
    maps = [c.probs if second_order else c.probs.detach() for c in calls]
    weights = {name: read_weights(gradients.pop(), type(module).__name__) for name in reversed(blocks)}
    matrices = _combine(method, plan, maps, gradients, relevances, start_layer, normalise, mix, add, tokens)
    return RelevanceMatrices(matrices, scores.detach().float(), plan, method, weights)


# -- what gradients are taken of ---------------------------------------------------------------------------------------


def _batch(run: Mapping[str, Any] | Callable[[], Any], scores: Any) -> int:
    """How many samples there are: by the inputs where they are known, else by the scores."""
    if not callable(run):
        return next((len(value) for value in run.values() if isinstance(value, Tensor) and value.dim()), 1)
    return len(scores) if isinstance(scores, Tensor) and scores.dim() else 1


def _check_target(scores: Any, calls: Sequence[CapturedAttention]) -> None:
    batch = calls[0].probs.shape[0]
    if not isinstance(scores, Tensor) or scores.shape != (batch,):
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise BadInput(f"the target must give one scalar per sample, shape ({batch},); it gave {shape}.")
    if not scores.detach().isfinite().all():
        raise BadInput("the target is not finite for these inputs, so nothing led to it.")


def _map_relevances(
    module: nn.Module, call: Callable[[], Any], target: Target, calls: Sequence[CapturedAttention]
) -> list[Tensor]:
    """The relevance (b k n t) of every attention map by layer-wise propagation."""
    found = [each.detach() for each in map_relevances(module, call, target)]
    if [each.shape for each in found] != [c.probs.shape for c in calls]:
        raise NotSupported(f"{type(module).__name__} computes {len(calls)} attention maps, of which propagation sees "
                           f"{len(found)}.")  # fmt: skip
    return found


def _last_block(plan: Layout, calls: Sequence[CapturedAttention], name: str) -> Tensor:
    """The hidden states (b n d) of a set after its last attention layer."""
    if name not in plan.sizes:
        raise UnknownName("token set", name, plan.sizes)
    for move in reversed(plan.moves):
        if move.kind != "grid" and move.rows == name:
            block = calls[move.call].block
            if block is not None:
                return block
    raise NotSupported(f"the layers of {name} return no hidden tokens, so it is unknown from which the score is read.")


def _tokens_of(plan: Layout, calls: Sequence[CapturedAttention]) -> dict[str, Tensor]:
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
    gradients: Sequence[Tensor],
    relevances: Sequence[Tensor] | None,
    start_layer: int,
    normalise: bool,
    mix: bool,
    add: bool,
    tokens: Mapping[str, Tensor],
) -> dict[tuple[str, str], Tensor]:
    if method in ("relevance", "relevance_lrp"):
        weights = maps if relevances is None else relevances
        fused = [fuse_heads(a, g) for a, g in zip(weights, gradients, strict=True)]
        return _propagated(plan, fused, start_layer, normalise=normalise, mix=mix, add=add)
    if method == "rollout":
        return _rolled(plan, [each.mean(1) for each in maps], start_layer)
    if method == "transformer_attribution":
        assert relevances is not None
        fused = [fuse_heads(a, g) for a, g in zip(relevances, gradients, strict=True)]
        # the earlier paper's: self matrices accumulate, of the other modality only the last map counts
        own = _propagated(plan, fused, start_layer, only_self=True)
        return {(s, q): m for (s, q), m in own.items() if s == q} | _last(plan, fused, across=True)
    if method == "partial_lrp":
        assert relevances is not None
        return _last(plan, [each.clamp_min(0).mean(1) for each in relevances])
    if method == "gradcam":
        cams = [(g.mean((-2, -1), keepdim=True) * a).mean(1).clamp_min(0) for a, g in zip(maps, gradients, strict=True)]
        return _last(plan, cams)
    plain = _last(plan, [each.mean(1) for each in maps])
    if method == "raw":
        return plain
    weights_of = {
        name: (x.detach().float() * gradient.float()).sum(-1).abs()
        for (name, x), gradient in zip(tokens.items(), gradients, strict=True)
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
            if (move.rows, move.new) in passed:  # the way up meets the skip connection
                skipped_over = passed[move.rows, move.new]
                state.join({pair: m for pair, m in skipped_over.items() if m.shape == state[pair].shape})
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
