"""Networks of no family we know: what in their attention is text and what is picture is found by an experiment.

The denoiser runs with attention switched off (every output zero), so that no token learns of another one; once as it
is, once with all text embeddings moved, once with the first one moved. Keys and queries that move are text, those that
stay are picture, at every site and in whatever order the network puts them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sfumato.errors import BadInput, NoMatch, NotSupported
from sfumato.models.condition import Rows
from sfumato.models.families.base import Family, TextStream
from sfumato.models.hooks import running
from sfumato.models.site import Site
from sfumato.sampling.attached.texts import TextAxis, Texts

__all__ = ["UnknownFamily", "find_text", "further_denoisers", "locate_text"]

HELP = "say where the text lies among the keys: attached(..., text='first 512') or 'last 77'"


class UnknownFamily(Family):
    """A pipeline of no known family. Sites and tokenizers are set once they are found."""

    name = "unknown"
    pipeline_classes = ()
    capabilities = frozenset({"pictures", "noise_path", "text_attention", "joint_attention"})
    defaults = {"steps": 1, "guidance": 1.0}

    def __init__(self, pipe: Any, max_sequence_length: int | None = None):
        super().__init__(pipe, max_sequence_length)
        self.found: list[Site] = []
        self.text_streams: list[TextStream] = []
        self.shape = 1, 0, 0

    @staticmethod
    def denoiser_of(pipe: Any) -> Any:
        return next((part for name in ("unet", "transformer") if (part := getattr(pipe, name, None)) is not None), None)

    @property
    def denoiser(self) -> Any:
        return self.denoiser_of(self.pipe)

    @property
    def scale(self) -> int:
        for name in ("vae_scale_factor", "vae_scale_factor_spatial"):
            if hasattr(self.pipe, name):
                return int(getattr(self.pipe, name))
        channels = getattr(getattr(getattr(self.pipe, "vae", None), "config", None), "block_out_channels", [1])
        return 2 ** (len(channels) - 1)

    @property
    def streams(self) -> list[TextStream]:
        return self.text_streams

    def encode(self, prompts: list[str], negatives: list[str] | None, guidance: bool) -> tuple[Rows, Rows | None]:
        raise NotSupported(f"how {type(self.pipe).__name__} encodes texts beside its prompt is not known.")

    def latents(self, arguments: dict[str, Any], call: dict[str, Any]) -> tuple[int, int, int]:
        """(frames, h, w) of the latents of a denoiser call; for packed ones from the call of the pipeline. Raises
        NotSupported where neither says."""
        x = next(arguments[name] for name in ("sample", "hidden_states", "input_ids") if name in arguments)
        if x.dim() > 3:
            return (x.shape[2] if x.dim() == 5 else 1), x.shape[-2], x.shape[-1]
        if not (call.get("height") and call.get("width")):
            raise NotSupported(
                f"how the {x.shape[1]} tokens of {type(self.pipe).__name__} lie in the picture cannot be determined; "
                f"give its call height and width."
            )
        return 1, int(call["height"]) // self.scale, int(call["width"]) // self.scale

    def grid_of_call(self, arguments: dict[str, Any]) -> tuple[int, int, int]:
        return self.shape

    def sites(self, h: int, w: int, text: int, frames: int = 1) -> list[Site]:
        return self.found


def locate_text(
    family: UnknownFamily,
    real: Callable[..., Any],
    arguments: dict[str, Any],
    call: dict[str, Any],
    embeds: Tensor,
    texts: Texts,
    axis: TextAxis | None,
) -> None:
    """Tell ``family`` where text and picture lie. ``real``: its denoiser, about to be called with ``arguments``;
    ``call``: the pipeline's own. Raises NotSupported for what cannot be determined."""
    family.text_streams = [stream_of(family.pipe, texts.passes, embeds.shape[1])]
    texts.check_tokens(family.pipe, family.text_streams[0])
    frames, h, w = family.latents(arguments, call)
    family.shape = frames, h, w

    def run(text: Tensor) -> Any:
        return real(**{**arguments, "encoder_hidden_states": text})

    family.found = find_text(family.denoiser, run, embeds, laid_out(h, w), frames, axis)


@dataclass(eq=False)
class _Captured:
    module: nn.Module
    q: Tensor
    k: Tensor


class _ZeroAttention(TorchFunctionMode):
    """Attention gives zeros; the first call of each module is noted."""

    def __init__(self, stack: list[Any]):
        super().__init__()
        self.stack = stack
        self.captured: dict[str, _Captured] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        named = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        q, k, v = named["query"], named["key"], named["value"]
        if self.stack:
            top = self.stack[-1]
            self.captured.setdefault(top.path, _Captured(top.module, q, k))
        return q.new_zeros(*q.shape[:-1], v.shape[-1])


def find_text(
    denoiser: nn.Module, run: Callable[[Tensor], Any], embeds: Tensor, grid: Callable[[int], tuple[int, int] | None],
    frames: int, axis: TextAxis | None,
) -> list[Site]:  # fmt: skip
    """The sites of a denoiser. ``run(embeds)`` calls it; ``grid(n)`` lays n tokens of the picture out as (h, w);
    ``axis``: where the text lies in joint attention, if somebody says so. Raises NoMatch for networks without attention
    that can be seen, NotSupported where no site's text and picture can be distinguished."""
    moved = embeds + embeds.abs().mean().clamp_min(1e-3)
    first = torch.cat([moved[:, :1], embeds[:, 1:]], 1)
    with torch.no_grad():
        plain, all_, one = (_run(denoiser, run, each) for each in (embeds, moved, first))
    if not plain:
        raise NoMatch(
            f"{type(denoiser).__name__} never called scaled_dot_product_attention, so nothing of it can be seen; "
            f"restore its default attention processors."
        )
    found: list[Site] = []
    located, length = False, embeds.shape[1]
    if axis is not None and axis.count != length:
        raise BadInput(f"text says {axis.count} keys are text, but the denoiser is given {length} text positions.")
    for path, captured in plain.items():
        t, n = captured.k.shape[2], captured.q.shape[2]
        text, image = _moved(captured.k, all_[path].k), _moved(captured.q, all_[path].q)
        begin = _moved(captured.k, one[path].k)
        columns = _range(text) if int(text.sum()) == length else None
        if columns is not None and not (int(begin.sum()) == 1 and bool(begin[columns[0]])):
            columns = None  # in another order, or mixed before
        queries = _range(~image)
        if axis is not None and t > length:
            given = axis.of(t)
            if columns not in (None, given):
                raise BadInput(f"text says keys {given[0]}:{given[1]} are text; at {path} keys {columns} move with it.")
            columns, queries = given, _rest(n, given) if n == t else (0, n)
        elif columns is None and bool(text.any()) or queries is None:
            continue  # cannot be determined, or text among itself
        located = located or columns is not None
        cells = queries[1] - queries[0]
        shape = grid(cells) or (grid(cells // frames) if cells % frames == 0 else None)
        if shape is None:
            continue
        kind = "self" if columns is None else "cross" if t == columns[1] - columns[0] else "joint"
        place = path.rsplit(".attn", 1)[0]
        found.append(Site(path, kind, shape, columns, queries, captured.q.shape[1], place, len(found), frames))
    if not located or not any(site.text for site in found):
        raise NotSupported(
            f"where the text lies in the attention of {type(denoiser).__name__}, and where the picture, cannot be "
            f"determined from what moves with the prompt; {HELP}."
        )
    return found


def _run(denoiser: nn.Module, run: Callable[[Tensor], Any], embeds: Tensor) -> dict[str, _Captured]:
    with running(denoiser) as stack, _ZeroAttention(stack) as spy:
        run(embeds)
    return {path: captured for path, captured in spy.captured.items() if captured.q.dim() == 4}


def _moved(before: Tensor, after: Tensor) -> Tensor:
    """(t) bool: which tokens of (b k t d) differ anywhere."""
    return (before != after).any(-1).any(1).any(0)


def _range(chosen: Tensor) -> tuple[int, int] | None:
    """[start, stop) of what is chosen, if it is one stretch."""
    places = chosen.nonzero().flatten().tolist()
    if not places or places[-1] - places[0] + 1 != len(places):
        return None
    return places[0], places[-1] + 1


def _rest(n: int, text: tuple[int, int]) -> tuple[int, int]:
    return (text[1], n) if text[0] == 0 else (0, text[0])


def laid_out(h: int, w: int) -> Callable[[int], tuple[int, int] | None]:
    """How n tokens lie on latents of h by w: in patches of 1, 2, 4 ... cells a side, odd sides rounded up or down."""

    def grid(n: int) -> tuple[int, int] | None:
        for p in (2**i for i in range(int(math.log2(max(h, w, 1))) + 1)):
            for shape in ((-(-h // p), -(-w // p)), (h // p, w // p)):
                if shape[0] * shape[1] == n:
                    return shape
        return None

    return grid


def further_denoisers(pipe: Any, denoiser: nn.Module) -> dict[str, nn.Module]:
    """Name -> network of a pipeline, or of one that it holds, which says what noise there is as ``denoiser`` does."""
    held = {**vars(pipe), **pipe.components}
    for name, part in list(held.items()):
        inner = getattr(part, "components", None)
        held |= {f"{name}.{key}": each for key, each in inner.items()} if isinstance(inner, dict) else {}
    own = set(denoiser.modules())
    return {
        name: part
        for name, part in held.items()
        if isinstance(part, nn.Module) and part not in own and denoiser not in set(part.modules()) and _denoises(part)
    }


def _denoises(network: nn.Module) -> bool:
    takes = inspect.signature(network.forward).parameters.keys()
    return {"timestep", "encoder_hidden_states"} <= takes and "controlnet_cond" not in takes


def stream_of(pipe: Any, passes: Sequence[tuple[str, Tensor, list[Tensor]]], length: int) -> TextStream:
    """The one tokenizer whose tokens fill a text axis of this ``length``. Raises NotSupported for none or several."""
    names = list(dict.fromkeys(name for name, ids, _ in passes if ids.shape[1] == length))
    if len(names) != 1:
        lengths = ", ".join(f"{name} {ids.shape[1]}" for name, ids, _ in passes) or "none was heard"
        raise NotSupported(
            f"which token of {type(pipe).__name__} lies where cannot be determined: attention sees {length} text "
            f"positions, its text encoders read {lengths}."
        )
    tokenizer = getattr(pipe, names[0].replace("text_encoder", "tokenizer"), None)
    if tokenizer is None:
        raise NotSupported(f"{type(pipe).__name__} has no tokenizer for its {names[0]}.")
    return TextStream(tokenizer, names[0].replace("text_encoder", "text"), 0, length, lambda text: text)
