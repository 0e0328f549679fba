"""Recipes in other programs' words: AUTOMATIC1111's ``parameters`` text and ComfyUI's ``prompt`` graph.

Both are read into our keys (prompt, negative, steps, guidance, seed, size, scheduler, named_model); what has no place
there is listed under ``dropped``, so that nobody believes it was followed. The content comes from strangers: nothing
here raises on it or runs longer than its length warrants.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import deque
from typing import Any

#: (our scheduler, A1111's sampler, A1111's schedule type, ComfyUI's sampler, ComfyUI's scheduler); "" is the usual one
SAMPLERS = (
    ("ddim", "DDIM", "", "ddim", ""),
    ("ddpm", "DDPM", "", "ddpm", ""),
    ("pndm", "PLMS", "", "ipndm", ""),
    ("lms", "LMS", "", "lms", ""),
    ("euler", "Euler", "", "euler", ""),
    ("euler_a", "Euler a", "", "euler_ancestral", ""),
    ("heun", "Heun", "", "heun", ""),
    ("dpm2", "DPM2", "", "dpm_2", ""),
    ("dpm2_a", "DPM2 a", "", "dpm_2_ancestral", ""),
    ("dpm++", "DPM++ 2M", "", "dpmpp_2m", ""),
    ("dpm++_karras", "DPM++ 2M", "Karras", "dpmpp_2m", "karras"),
    ("dpm++_sde", "DPM++ 2M SDE", "", "dpmpp_2m_sde", ""),
    ("dpm++_sde_karras", "DPM++ 2M SDE", "Karras", "dpmpp_2m_sde", "karras"),
    ("dpm_sde", "DPM++ SDE", "", "dpmpp_sde", ""),
    ("dpm_sde_karras", "DPM++ SDE", "Karras", "dpmpp_sde", "karras"),
    ("dpm++_single", "DPM++ 2S", "", "dpmpp_2s", ""),
    ("deis", "DEIS", "", "deis", ""),
    ("unipc", "UniPC", "", "uni_pc", ""),
    ("lcm", "LCM", "", "lcm", ""),
    ("tcd", "TCD", "", "tcd", ""),
)
_USUAL = {"", "automatic", "normal", "uniform", "simple", "ddim_uniform"}
_SCHEDULES = ("karras", "exponential", "polyexponential", "sgm uniform", "beta", "turbo", "align your steps")

_FIELD = re.compile(r'\s*([A-Za-z][\w \-/+.]{0,60}):[ \t]*("(?:\\.|[^\\"])*"|[^,\n]*)(?:,|(?=\n)|$)')
_START = re.compile(r"^Steps:[ \t]*\d+[ \t]*(?:,|$)", re.MULTILINE)
_READ = {"steps", "cfg scale", "seed", "size", "sampler", "schedule type", "model", "clip skip"}
_NO_MATTER = {"model hash", "version", "vae hash", "vae", "lora hashes", "ti hashes", "hashes"}  # say what, not how


def a1111_text(recipe: dict[str, Any]) -> str:
    """The ``parameters`` text of a recipe.

    Keys written: prompt, negative, steps, scheduler, guidance, seed, clip_skip, size (w, h), model, hash, sfumato (our
    version).
    """
    size = recipe.get("size")
    scheduler = recipe.get("scheduler")
    sampler, schedule = next(((row[1], row[2]) for row in SAMPLERS if row[0] == scheduler), (scheduler, ""))
    facts = {
        "Steps": recipe.get("steps"),
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": recipe.get("guidance"),
        "Seed": recipe.get("seed"),
        "Clip skip": recipe["clip_skip"] + 1 if recipe.get("clip_skip") else None,
        "Size": f"{size[0]}x{size[1]}" if size else None,
        "Model hash": str(recipe.get("hash") or "")[:10],
        "Model": recipe.get("model"),
        "Version": f"sfumato {recipe.get('sfumato', '')}".strip(),
    }
    lines = [str(recipe.get("prompt", ""))]
    if recipe.get("negative"):
        lines.append(f"Negative prompt: {recipe['negative']}")
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in facts.items() if value not in (None, "")))
    return "\n".join(lines)


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(',:\n"') else text


def parse_a1111(text: str) -> dict[str, Any]:
    """What a ``parameters`` text says, in our keys. Never raises on content.

    The settings begin at the last line that starts with ``Steps: N`` and holds three fields or more, as A1111's own
    reader wants them; lines behind them (templates of extensions) belong to no prompt.
    """
    text = text.strip()
    prompts = text
    facts: dict[str, Any] = {}
    dropped: list[str] = []
    for start in reversed([found.start() for found in _START.finditer(text)]):
        facts, behind = _fields(text[start : start + 20_000])
        if len(facts) >= 3:
            prompts = text[:start]
            dropped = [line.partition(":")[0].strip()[:40] for line in behind.splitlines() if line.strip()]
            break
        facts = {}
    prompt: list[str] = []
    negative: list[str] = []
    target = prompt
    for line in prompts.rstrip().split("\n"):
        if line.startswith("Negative prompt:"):
            target, line = negative, line[len("Negative prompt:") :].strip()
        target.append(line)
    recipe: dict[str, Any] = {"prompt": "\n".join(prompt).strip()}
    if any(negative):
        recipe["negative"] = "\n".join(negative).strip()
    known = {name.lower(): value for name, value in facts.items()}
    for key, name, read in (("steps", "steps", int), ("guidance", "cfg scale", float), ("seed", "seed", int)):
        with contextlib.suppress(KeyError, ValueError):
            recipe[key] = read(known[name][:40])
    if found := re.fullmatch(r"(\d{1,5})x(\d{1,5})", known.get("size", "")):
        recipe["size"] = [int(found[1]), int(found[2])]
    if re.fullmatch(r"\d{1,2}", known.get("clip skip", "")) and int(known["clip skip"]) > 1:
        recipe["clip_skip"] = int(known["clip skip"]) - 1  # theirs counts the last layer as 1
    if known.get("model"):
        recipe["named_model"] = known["model"][:200]
    dropped = [name for name in facts if name.lower() not in _READ | _NO_MATTER] + dropped
    if "sampler" in known:
        scheduler, lost = _scheduler(known["sampler"], known.get("schedule type", ""), 1)
        recipe |= {"scheduler": scheduler} if scheduler else {}
        dropped = lost + dropped
    return recipe | ({"dropped": list(dict.fromkeys(dropped))} if dropped else {})


def _fields(text: str) -> tuple[dict[str, str], str]:
    """The ``Name: value`` fields at the beginning of a text, quotes taken off, and what stands behind them."""
    facts: dict[str, str] = {}
    at = 0
    while found := _FIELD.match(text, at):
        if at and text[at : found.start(1)].count("\n"):  # another line begins: no field of the settings
            break
        value = found[2].strip()
        if value.startswith('"'):
            with contextlib.suppress(ValueError):
                value = str(json.loads(value, strict=False))
        facts.setdefault(found[1].strip(), value)
        at = found.end()
    return facts, text[at:]


def _scheduler(sampler: str, schedule: str, column: int) -> tuple[str | None, list[str]]:
    """Our name of a sampler with its schedule, and what of the two has no counterpart; ``column`` of the table."""
    sampler, schedule = sampler.strip().lower(), schedule.strip().lower()
    if not schedule:  # older versions say both in one
        for name in _SCHEDULES:
            if sampler.endswith(f" {name}"):
                sampler, schedule = sampler.removesuffix(name).strip(), name
    rows = [row for row in SAMPLERS if sampler in (row[column].lower(), row[0])]
    exact = [row for row in rows if row[column + 1].lower() == schedule]
    if schedule in _USUAL:
        exact = [row for row in rows if row[0] == sampler] or [row for row in rows if not row[column + 1]]
    if exact:
        return exact[0][0], []
    if rows:
        return rows[0][0], [f"schedule {schedule!r}"]
    return None, [f"sampler {sampler[:40]!r}"]


# --- ComfyUI ---------------------------------------------------------------------------------------------------------

_MOST_NODES = 2000
_MOST_SAMPLERS = 20  # that are looked at


def parse_comfy(text: str) -> dict[str, Any] | None:
    """What ComfyUI's ``prompt`` graph (its API format) says, in our keys; None where it holds no sampler that is fed
    with a text. Never raises on content.

    Of several samplers the one behind the saved picture counts. Texts are followed through nodes that pass
    conditions on to the first ``CLIPTextEncode``.
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
    samplers = [key for key, node in graph.items() if {"positive", "steps"} <= set(node["inputs"])]
    saved = [
        key for key, node in graph.items() if str(node.get("class_type")).startswith(("SaveImage", "PreviewImage"))
    ]
    behind = [key for key in _upstream(graph, *saved) if key in samplers]
    for key in list(dict.fromkeys([*behind, *samplers]))[:_MOST_SAMPLERS]:
        inputs = graph[key]["inputs"]
        prompt = _text(graph, inputs.get("positive"))
        if prompt is not None:
            break
    else:
        return None
    recipe: dict[str, Any] = {"prompt": prompt}
    dropped = [f"sampler node {other}" for other in samplers if other != key]
    negative = _text(graph, inputs.get("negative"))
    recipe |= {"negative": negative} if negative else {}
    for ours, names, kind in (
        ("steps", ("steps",), int),
        ("guidance", ("cfg",), float),
        ("seed", ("seed", "noise_seed"), int),
    ):
        values = [_value(graph, inputs[name]) for name in names if name in inputs]
        if values and isinstance(values[0], int | float) and not isinstance(values[0], bool):
            with contextlib.suppress(OverflowError, ValueError):
                recipe[ours] = kind(values[0])
    scheduler, lost = _scheduler(str(inputs.get("sampler_name", "")), str(inputs.get("scheduler", "")), 3)
    recipe |= {"scheduler": scheduler} if scheduler else {}
    dropped += lost if inputs.get("sampler_name") else []
    denoise = _value(graph, inputs.get("denoise"))
    if isinstance(denoise, int | float) and 0 <= denoise < 1:
        dropped.append(f"denoise {denoise:g} (img2img)")
    for each in _upstream(graph, key):
        node = graph[each]
        size = [_value(graph, node["inputs"].get(side)) for side in ("width", "height")]
        if "Latent" in str(node.get("class_type")) and all(isinstance(side, int) for side in size):
            recipe.setdefault("size", size)
        if isinstance(node["inputs"].get("ckpt_name") or node["inputs"].get("unet_name"), str):
            recipe.setdefault("named_model", str(node["inputs"].get("ckpt_name") or node["inputs"]["unet_name"])[:200])
        if isinstance(last := node["inputs"].get("stop_at_clip_layer"), int) and -24 <= last < -1:
            recipe.setdefault("clip_skip", -last - 1)
        if isinstance(node["inputs"].get("lora_name"), str):
            dropped.append(f"LoRA {node['inputs']['lora_name'][:80]!r}")
        if "ControlNet" in str(node.get("class_type")):
            dropped.append(str(node["class_type"])[:40])
    return recipe | ({"dropped": list(dict.fromkeys(dropped))} if dropped else {})


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


def _value(graph: dict[str, Any], value: Any) -> Any:
    """A value, followed to the node that states it (primitives, seeds, strings)."""
    for _ in range(20):
        source = _link(graph, value)
        if source is None:
            return None if isinstance(value, list | dict) else value
        inputs = graph[source]["inputs"]
        value = next(
            (inputs[name] for name in ("value", "int", "float", "seed", "text", "string") if name in inputs), None
        )
    return None


def _text(graph: dict[str, Any], value: Any) -> str | None:
    source = _link(graph, value)
    for each in _upstream(graph, source) if source is not None else ():
        node = graph[each]
        if "CLIPTextEncode" in str(node.get("class_type")):
            names = [name for name in ("text", "text_g", "t5xxl", "text_l", "clip_l") if name in node["inputs"]]
            prompt = _value(graph, node["inputs"][names[0]]) if names else None
            return prompt if isinstance(prompt, str) else None
    return None
