"""LRP for transformers: a class-specific map of what a classifier's decision rests on, through the whole computation.

Chefer, Gur, Wolf 2021 (arXiv 2012.09838). Relevance starts as 1 at the explained score and is propagated back by the
rules in :mod:`~sfumato.relevance.propagation`: values, MLPs and skip connections count, not attention weights alone.
*Transformer attribution* (section 3.2) multiplies the relevance that reaches each attention map with the gradient of
the score and rolls the positive part out over the layers. *Partial LRP* (Voita et al. 2019) is the last map's relevance
under plain rules, *LRP* the relevance that reaches the input itself.

    >>> row = lrp(vit, pixels, target="cube")  # (b, tokens): what the decision rests on
    >>> heat = on_grid(row, grid=(8, 8))             # (b, 8, 8)

Works on unmodified models, ViT, DeiT, CLIP towers, BERT and their like: everything built from the functions that
:mod:`~sfumato.relevance.propagation` has a rule for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.errors import BadInput, NotSupported, UnknownName
from sfumato.markup import described
from sfumato.relevance.capture import captured, gradients_of, refuse_no_attention, refuse_windows
from sfumato.relevance.propagation import Propagation, eval_with_gradients, prepared
from sfumato.relevance.propagation_rules import RelevanceRecord, Rules
from sfumato.relevance.readout import read_weights, weighted_rows
from sfumato.relevance.rules import fuse_heads, rollout

__all__ = [
    "METHODS",
    "Method",
    "LRPTrace",
    "conservation",
    "lrp",
    "map_relevances",
    "on_grid",
    "target_scores",
    "traced",
]

Method = Literal["transformer_attribution", "partial_lrp", "lrp"]
METHODS: tuple[str, ...] = Method.__args__  # type: ignore[attr-defined]
Target: TypeAlias = int | str | Sequence[int | str] | Tensor | Callable[[Any], Tensor] | None


@dataclass(eq=False)
class LRPTrace:
    """One explained batch. ``scores`` (b,) of the targets, ``targets`` their labels (b,) or None for a function;
    per attention layer in the order of execution ``maps``, ``gradients`` and ``relevances`` (b k n t);
    ``inputs`` is the relevance of the model's input (picture (b c h w), or token embeddings (b t d)) where asked for;
    ``records`` say what each function did with relevance, from the score back to the input; ``hidden`` (b n d): the
    gradient of the score with respect to the last layer's tokens, where gradients were asked for.
    """

    scores: Tensor
    targets: Tensor | None
    maps: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    relevances: list[Tensor] = field(default_factory=list)
    inputs: Tensor | None = None
    records: list[RelevanceRecord] = field(default_factory=list)
    hidden: Tensor | None = None

    __repr__ = described


def lrp(
    model: nn.Module,
    inputs: Tensor | dict[str, Any],
    target: Target = None,
    method: Method = "transformer_attribution",
    *,
    rules: Rules | None = None,
    start_layer: int = 0,
    row_sums: bool = False,
    token: int | Tensor | None = None,
) -> Tensor:
    """Relevance (b, t) of every token to the decision, float32; that of a single deciding token to itself is 0.

    Args:
        model: a classifier in float32; its parameters, modes and hooks are as before afterwards.
        inputs: pictures (b, c, h, w) as the model wants them, token ids (b, t), or named inputs.
        target: label number or name, one for all or one each; None: each sample's predicted label; or a function from
            the model's output to one number per sample.
        method: see above. "lrp" gives what reaches the patches or words, and may be negative.
        start_layer: attribution begins at this layer; those below count as if each token looked at itself only.
        row_sums: divide each layer's rows by their sums, as the authors do for BERT and do not for ViT.
        token: the token that decides, per sample or for all; None: those that the score is read from, by its gradient.

    Raises:
        BadInput: half precision, labels out of range, a start layer that does not exist. UnknownName: label, method.
        NotSupported: no softmax attention, attention in windows, or a function without a rule.
    """
    if method not in METHODS:
        raise UnknownName("method of lrp", method, METHODS)
    if method == "partial_lrp":
        rules = rules or Rules(normalise=False)
    found = traced(model, inputs, target, rules, gradients=method != "lrp", to_inputs=method == "lrp")
    if method == "lrp":
        return _by_token(model, found)
    weights = _weights(found, token, type(model).__name__)
    if method == "partial_lrp":
        out = weighted_rows(found.relevances[-1].mean(1), weights).clamp_min(0)
    else:
        if not 0 <= start_layer < len(found.maps):
            raise BadInput(f"start_layer={start_layer}: the model has {len(found.maps)} attention layers, from 0.")
        layers = [fuse_heads(r, g) for r, g in zip(found.relevances, found.gradients, strict=True)][start_layer:]
        for layer in layers:
            if layer.shape[-1] != layer.shape[-2]:
                raise NotSupported(f"attribution is for self-attention; a layer has {tuple(layer.shape[1:])} tokens.")
        out = weighted_rows(rollout(layers, row_sums), weights)  # equations 13 and 14
    alone = (weights > 0).sum(1, keepdim=True) == 1
    return out.float().masked_fill((weights > 0) & alone, 0)


def _weights(found: LRPTrace, token: int | Tensor | None, name: str) -> Tensor:
    """(b n): in which proportion the rows of the tokens count."""
    if token is None:
        return read_weights(found.hidden, name)
    b, n = len(found.scores), found.maps[-1].shape[2]
    at = torch.as_tensor(token, device=found.scores.device).expand(b)
    return F.one_hot(at, n).to(found.maps[-1])


def traced(
    model: nn.Module,
    inputs: Tensor | dict[str, Any],
    target: Target = None,
    rules: Rules | None = None,
    *,
    gradients: bool = True,
    to_inputs: bool = False,
    attention: bool = True,
) -> LRPTrace:
    """Runs the model once for relevance and, with ``gradients``, once for gradients. Arguments as :func:`lrp`.

    ``to_inputs`` propagates on to the input; ``attention=False`` allows models without attention.
    """
    named = _named(model, inputs)
    with prepared(model, Propagation(rules)) as mode:
        source = _watched(mode, named)
        scores, targets = target_scores(model, _run(model, named), target)
        maps = mode.maps
        if attention:
            refuse_no_attention(model, maps)  # type: ignore[arg-type]
            refuse_windows([(path, each.shape) for path, each in zip(mode.paths, maps, strict=True)], len(scores))
        wanted = [*maps, *([source() if callable(source) else source] if to_inputs else [])]
        parts = torch.autograd.grad(scores, wanted, torch.ones_like(scores))
    found = LRPTrace(scores.detach(), targets, [m.detach() for m in maps], records=mode.records)
    found.relevances = [part.detach() for part in parts[: len(maps)]]
    found.inputs = parts[-1].detach() if to_inputs else None
    if gradients:
        with eval_with_gradients(model), captured(model) as calls:
            again, _ = target_scores(model, _run(model, named), targets if targets is not None else target)
            block = [call.block for call in calls[-1:] if call.block is not None]
            found.gradients = gradients_of(again, [*(call.probs for call in calls), *block])
            found.hidden = found.gradients.pop() if block else None
    return found


def map_relevances(
    module: nn.Module, run: Callable[[], Any], target: Callable[[Any], Tensor], rules: Rules | None = None
) -> list[Tensor]:
    """The relevance (b k n t) that reaches every attention map of ``run()``, in the order of execution; ``target``
    gives one number per sample. For methods that weight attention maps with relevance."""
    with prepared(module, Propagation(rules)) as mode:
        scores, _ = target_scores(module, run(), target)
        refuse_no_attention(module, mode.maps)  # type: ignore[arg-type]
        return list(torch.autograd.grad(scores, mode.maps, torch.ones_like(scores)))


def conservation(model: nn.Module, inputs: Tensor | dict[str, Any], target: Target = None, rules: Rules | None = None):
    """What each function on the way from score to input did with relevance, as a list of records: ``path``, ``op``,
    ``error`` (relative loss or gain), ``peak``, ``negative``."""
    return traced(model, inputs, target, rules, gradients=False, to_inputs=True, attention=False).records


def on_grid(row: Tensor, grid: tuple[int, int] | None = None, size: tuple[int, int] | None = None) -> Tensor:
    """Token relevance (b, t) as maps (b, h, w) of the patches, which are the last h w tokens; bilinear to ``size``.

    Without ``grid`` the patches are taken to form a square, behind as few class or register tokens as possible.
    """
    side = int(row.shape[1] ** 0.5)
    h, w = grid or (side, side)
    if h * w > row.shape[1] or h * w == 0:
        raise BadInput(f"a grid of {h} x {w} patches does not fit {row.shape[1]} tokens.")
    maps = row[:, row.shape[1] - h * w :].unflatten(1, (h, w))
    return maps if size is None else F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def target_scores(model: nn.Module, output: Any, target: Target) -> tuple[Tensor, Tensor | None]:
    """(scores (b,), labels (b,) or None) of what is explained in a model's output.

    Raises BadInput for a number, UnknownName for a name that is no label, BadInput for a wrong number of targets.
    """
    if callable(target) and not isinstance(target, Tensor):
        scores = target(output)
        if not isinstance(scores, Tensor) or scores.ndim != 1:
            raise BadInput(f"the target function must give one number per sample (b,), got {_shape(scores)}.")
        return scores, None
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise NotSupported(f"{type(model).__name__} gives no scores of labels (b, labels); give target as a function.")
    labels = _labels(model, logits, target)
    return logits[torch.arange(len(logits), device=logits.device), labels], labels


def _labels(model: nn.Module, logits: Tensor, target: Any) -> Tensor:
    b, n = logits.shape
    if target is None:
        return logits.detach().argmax(1)
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    given = target.tolist() if isinstance(target, Tensor) else target
    each = [given] * b if isinstance(given, int | str) else list(given)
    if len(each) != b:
        raise BadInput(f"there are {len(each)} targets for {b} samples; give one for all or one each.")
    numbers = []
    for one in each:
        if isinstance(one, str):
            known = {str(name): int(i) for i, name in names.items()}
            if one not in known:
                raise UnknownName("label", one, known)
            one = known[one]
        if not isinstance(one, int) or isinstance(one, bool) or not 0 <= one < n:
            listed = f" ({', '.join(str(names[i]) for i in sorted(names))})" if len(names) == n else ""
            raise BadInput(f"target {one!r} is not a label of this model, which has {n}, numbered from 0{listed}.")
        numbers.append(one)
    return torch.tensor(numbers, device=logits.device)


def _named(model: nn.Module, inputs: Tensor | dict[str, Any]) -> dict[str, Any]:
    """Inputs by name, pictures detached."""
    if isinstance(inputs, Tensor):
        inputs = {getattr(model, "main_input_name", ""): inputs}
    named = dict(inputs)
    for name, value in named.items():
        if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
            kind = str(value.dtype).removeprefix("torch.")
            raise BadInput(
                f"relevance underflows in half precision ({name or 'the input'} is {kind}); give it as float32."
            )
    return named


def _run(model: nn.Module, named: dict[str, Any]) -> Any:
    """The model's output; an input without a name is the only one."""
    return model(named[""]) if "" in named else model(**named)


def _watched(mode: Propagation, named: dict[str, Any]) -> Any:
    """The tensor whose relevance is that of the input; for token ids a function that finds it after the forward."""
    for name in ("pixel_values", "inputs_embeds", ""):
        if isinstance(named.get(name), Tensor) and named[name].is_floating_point():
            named[name] = mode.source(named[name].detach().clone().requires_grad_(True))
            return named[name]
    ids = named.get("input_ids")

    def found() -> Tensor:
        for indices, vectors in mode.embedded:
            if isinstance(ids, Tensor) and indices.shape == ids.shape and torch.equal(indices, ids):
                return vectors
        raise NotSupported("the input is neither a picture nor tokens that are looked up in a table.")

    return found


def _by_token(model: nn.Module, found: LRPTrace) -> Tensor:
    """Relevance of the input gathered by token (b, t): pixels by patch, behind a 0 for the class token."""
    assert found.inputs is not None
    if found.inputs.ndim == 3:
        return found.inputs.sum(-1).float()
    tokens = found.maps[0].shape[-1]
    side = int(tokens**0.5)
    h, w = found.inputs.shape[-2:]
    cells = F.adaptive_avg_pool2d(found.inputs.sum(1, keepdim=True), (side, side)).flatten(1) * (h * w / side**2)
    return F.pad(cells, (tokens - side * side, 0)).float()


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
