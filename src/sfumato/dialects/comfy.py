"""ComfyUI's ``prompt`` graph, in its API format."""

from __future__ import annotations

import contextlib
import json
import re
from collections import deque
from typing import Any

from sfumato.dialects.samplers import scheduler_of
from sfumato.dialects.settings import short, take_distilled, with_dropped

_MOST_NODES = 2000
_MOST_SAMPLERS = 20  # that are looked at


def parse_comfy(text: str) -> dict[str, Any] | None:
    """What ComfyUI's ``prompt`` graph (its API format) says, in our keys; None where it holds no sampler that is fed
    with a text. Never raises on content.

    Of several samplers one behind the saved picture counts, of these one that begins with noise. Texts are followed
    through nodes that pass conditions on to the first that encodes one.
    """
    try:
        graph = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(graph, dict) or len(graph) > _MOST_NODES:
        return None
    graph = {
        str(key): node for key, node in graph.items() if isinstance(node, dict) and isinstance(node.get("inputs"), dict)
    }
    told = {key: _told(graph, node["inputs"]) for key, node in graph.items() if _samples(node["inputs"])}
    saved = [
        key for key, node in graph.items() if str(node.get("class_type")).startswith(("SaveImage", "PreviewImage"))
    ]
    behind = sorted((key for key in _upstream(graph, *saved) if key in told), key=lambda key: not _whole(told[key]))
    for key in list(dict.fromkeys([*behind, *told]))[:_MOST_SAMPLERS]:
        inputs = told[key]
        prompts = _texts(graph, inputs.get("positive", inputs.get("conditioning")), "positive")
        if prompts:
            break
    else:
        return None
    recipe: dict[str, Any] = {"prompt": prompts[0]}
    dropped = [f"sampler node {other}" for other in told if other != key]
    dropped += [f"the text {other[:40]!r}" for other in prompts[1:]]
    negatives = _texts(graph, inputs.get("negative"), "negative")
    recipe |= {"negative": negatives[0]} if negatives and negatives[0] else {}
    dropped += [f"the negative text {other[:40]!r}" for other in negatives[1:]]
    for ours, names, kind in (
        ("steps", ("steps",), int),
        ("guidance", ("cfg",), float),
        ("seed", ("seed", "noise_seed"), int),
    ):
        values = [inputs[name] for name in names if name in inputs]
        if values and isinstance(values[0], int | float) and not isinstance(values[0], bool):
            with contextlib.suppress(OverflowError, ValueError):
                recipe[ours] = kind(values[0])
    scheduler, lost = scheduler_of(str(inputs.get("sampler_name") or ""), str(inputs.get("scheduler") or ""), 3)
    recipe |= {"scheduler": scheduler} if scheduler else {}
    dropped += lost if inputs.get("sampler_name") else []
    denoise = inputs.get("denoise")
    if isinstance(denoise, int | float) and 0 <= denoise < 1:
        dropped.append(f"denoise {denoise:g} (img2img)")
    distilled: list[float] = []  # the guidance of models distilled from it, of FluxGuidance and its like
    for each in _upstream(graph, key):
        node = graph[each]
        size = [_value(graph, node["inputs"].get(side)) for side in ("width", "height")]
        kind_of_node = str(node.get("class_type"))
        if "Empty" in kind_of_node and "Latent" in kind_of_node and all(isinstance(side, int) for side in size):
            recipe.setdefault("size", size)
        if isinstance(own := _value(graph, node["inputs"].get("guidance")), int | float) and short(own):
            distilled.append(float(own))
        if isinstance(node["inputs"].get("ckpt_name") or node["inputs"].get("unet_name"), str):
            recipe.setdefault("named_model", str(node["inputs"].get("ckpt_name") or node["inputs"]["unet_name"])[:200])
        if isinstance(last := node["inputs"].get("stop_at_clip_layer"), int) and -24 <= last < -1:
            recipe.setdefault("clip_skip", -last - 1)
        if isinstance(node["inputs"].get("lora_name"), str):
            dropped.append(f"LoRA {node['inputs']['lora_name'][:80]!r}")
        if "ControlNet" in kind_of_node:
            dropped.append(kind_of_node[:40])
    if distilled:
        dropped += take_distilled(recipe, {"guidance": distilled[0]}, f"guidance {distilled[0]:g} beside CFG")
    return with_dropped(recipe, dropped)


def _link(graph: dict[str, Any], value: Any) -> str | None:
    """The node that an input is connected with, if it is."""
    if isinstance(value, list) and len(value) == 2 and str(value[0]) in graph:
        return str(value[0])
    return None


def _upstream(graph: dict[str, Any], *keys: str) -> list[str]:
    """Every node that nodes depend on, nearest first, they themselves at the beginning."""
    found, queue = [], deque(keys)
    seen = set(keys)
    while queue:
        each = queue.popleft()
        found.append(each)
        for value in graph[each]["inputs"].values():
            source = _link(graph, value)
            if source is not None and source not in seen:
                seen.add(source)
                queue.append(source)
    return found


def _samples(inputs: dict[str, Any]) -> bool:
    """Whether a node draws: as KSampler does, or by nodes for its noise, guidance and noise levels."""
    return {"positive", "steps"} <= set(inputs) or ("sigmas" in inputs and bool({"guider", "positive"} & set(inputs)))


def _told(graph: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """What a sampler is told, by itself and by the nodes that are part of it; texts stay connections."""
    whole = dict(inputs)
    for part in ("noise", "guider", "sampler", "sigmas"):
        source = _link(graph, inputs.get(part))
        whole |= {} if source is None else {k: v for k, v in graph[source]["inputs"].items() if k not in whole}
    texts = ("positive", "negative", "conditioning")
    return {name: value if name in texts else _value(graph, value) for name, value in whole.items()}


def _whole(inputs: dict[str, Any]) -> bool:
    """Whether a sampler begins with noise alone, unlike one that refines a picture."""
    denoise, start = inputs.get("denoise"), inputs.get("start_at_step")
    return not (isinstance(denoise, int | float) and denoise < 1) and not (isinstance(start, int) and start > 0)


def _value(graph: dict[str, Any], value: Any, depth: int = 0) -> Any:
    """A value, followed to the node that states it (primitives, seeds, strings, strings put together)."""
    for _ in range(20):
        source = _link(graph, value)
        if source is None:
            return None if isinstance(value, list | dict) else value
        inputs = graph[source]["inputs"]
        parts = [inputs[name] for name in sorted(inputs) if re.fullmatch(r"(string|text)_?\w", name)]
        if parts:
            read = [_value(graph, part, depth + 1) for part in parts] if depth < 3 else []
            return str(inputs.get("delimiter", "")).join(part for part in read if isinstance(part, str)) or None
        value = next((inputs[name] for name in _STATES if name in inputs), None)
    return None


_STATES = ("value", "int", "float", "seed", "text", "string", "prompt")
#: where nodes that encode texts hold them, the words of the picture before those of a second encoder
_HOLD = ("text", "text_g", "t5xxl", "prompt", "positive", "text_l", "clip_l")


def _texts(graph: dict[str, Any], value: Any, role: str) -> list[str]:
    """The texts behind a condition, nearest first; ``role``: whether it is the positive or the negative one of nodes
    that pass on both."""
    found: list[str] = []
    queue = deque([_link(graph, value)])
    seen = set(queue)
    while queue:
        each = queue.popleft()
        node = graph[each] if each is not None else {"inputs": {}}
        inputs, kind = node["inputs"], str(node.get("class_type"))
        if kind == "ConditioningZeroOut":
            continue
        if isinstance(inputs.get(role), str):  # loaders that hold both texts
            found.append(inputs[role])
        elif "TextEncode" in kind or "CLIPTextEncode" in kind:
            text = next((_value(graph, inputs[name]) for name in _HOLD if name in inputs), None)
            found += [text] if isinstance(text, str) else []
        else:
            names = [role] if {"positive", "negative"} <= set(inputs) else list(inputs)
            for source in (_link(graph, inputs[name]) for name in names):
                if source is not None and source not in seen:
                    seen.add(source)
                    queue.append(source)
    return list(dict.fromkeys(found))
