"""AUTOMATIC1111's ``parameters`` text, as it and its kin write it."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

from sfumato.dialects.samplers import sampler_of, scheduler_of
from sfumato.dialects.settings import settings, take_distilled, with_dropped

_FIELD = re.compile(r'\s*([A-Za-z][\w \-/+.]{0,60}):[ \t]*("(?:\\.|[^\\"])*"|[^,\n]*)(?:,|(?=\n)|$)')
_NAME = re.compile(r"\s*([A-Za-z][\w \-/+.]{0,60}):[ \t]*(?=[\[{])")
_BEHIND = re.compile(r"[ \t]*(?:,|(?=\n)|$)")
_START = re.compile(
    r"^(?:Steps|Sampler|Scheduler|CFG scale|Seed|Size|Model):[ \t]*[^\s,]", re.MULTILINE | re.IGNORECASE
)
_MOST_LINES = 50  # that are tried as settings, from the last one
#: other names of the settings that are read
_ALSO = {"guidance scale": "cfg scale", "scheduler": "schedule type", "base model": "model"}
_READ = {"steps", "cfg scale", "seed", "size", "sampler", "schedule type", "model", "clip skip", "distilled cfg scale"}
_NO_MATTER = {"model hash", "version", "vae hash", "vae", "lora hashes", "ti hashes", "hashes"}  # say what, not how


def a1111_text(recipe: dict[str, Any]) -> str:
    """The ``parameters`` text of a recipe.

    Keys written: prompt, negative, steps, scheduler, guidance, seed, clip_skip, size (w, h), model, hash, sfumato (our
    version).
    """
    size = recipe.get("size")
    sampler, schedule = sampler_of(recipe.get("scheduler"))
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

    The settings begin at the last line that starts with one of their names, says the number of steps and holds three
    fields or more, as A1111's own reader wants them; lines behind them (templates of extensions) belong to no prompt.
    """
    text = text.strip()
    prompts = text
    facts: dict[str, str] = {}
    dropped: list[str] = []
    for start in reversed([found.start() for found in _START.finditer(text)][-_MOST_LINES:]):
        facts, behind = _fields(text[start : start + 20_000])
        if len(facts) >= 3 and any(name.lower() == "steps" and value[:1].isdigit() for name, value in facts.items()):
            prompts = text[:start]
            dropped = [line.partition(":")[0].strip()[:40] for line in behind.splitlines() if line.strip()]
            break
        facts = {}
    prompt: list[str] = []
    negative: list[str] = []
    target = prompt
    for line in prompts.rstrip().split("\n"):
        if line[: len(_NEGATIVE)].lower() == _NEGATIVE:
            target, line = negative, line[len(_NEGATIVE) :].strip()
        target.append(line)
    recipe: dict[str, Any] = {"prompt": "\n".join(prompt).strip()}
    if any(negative):
        recipe["negative"] = "\n".join(negative).strip()
    names = {name.lower(): name for name in facts}
    for other, name in _ALSO.items():
        if other in names and name not in names:
            names[name] = names.pop(other)
    known = {name: facts[written] for name, written in names.items()}
    recipe |= settings(known)
    if re.fullmatch(r"\d{1,2}", known.get("clip skip", "")) and int(known["clip skip"]) > 1:
        recipe["clip_skip"] = int(known["clip skip"]) - 1  # theirs counts the last layer as 1
    unread = {name for name, key in _NUMBERS.items() if name in known and key not in recipe}
    dropped = [written for name, written in names.items() if name in unread or name not in _READ | _NO_MATTER] + dropped
    if distilled := known.get("distilled cfg scale"):  # Forge
        dropped += take_distilled(recipe, settings({"cfg scale": distilled}), names["distilled cfg scale"])
    if "sampler" in known:
        scheduler, lost = scheduler_of(known["sampler"], known.get("schedule type", ""), 1)
        recipe |= {"scheduler": scheduler} if scheduler else {}
        dropped = lost + dropped
    return with_dropped(recipe, dropped)


_NEGATIVE = "negative prompt:"
_NUMBERS = {"steps": "steps", "cfg scale": "guidance", "seed": "seed", "size": "size"}


def _fields(text: str) -> tuple[dict[str, str], str]:
    """The ``Name: value`` fields at the beginning of a text, quotes taken off, and what stands behind them."""
    facts: dict[str, str] = {}
    at = 0
    while True:
        if whole := _structure(text, at):
            facts.setdefault(whole[0], whole[1])
            at = whole[2]
            continue
        found = _FIELD.match(text, at)
        if found is None or (at and "\n" in text[at : found.start(1)]):  # another line begins: no field of the settings
            break
        value = found[2].strip()
        if value.startswith('"'):
            with contextlib.suppress(ValueError):
                value = str(json.loads(value, strict=False))
        facts.setdefault(found[1].strip(), value)
        at = found.end()
    return facts, text[at:]


def _structure(text: str, at: int) -> tuple[str, str, int] | None:
    """A field whose value is JSON, which holds commas of its own: its name, its value, where it ends."""
    name = _NAME.match(text, at)
    if name is None or (at and "\n" in text[at : name.start(1)]):
        return None
    try:
        _, end = json.JSONDecoder().raw_decode(text, name.end())
    except (ValueError, RecursionError):
        return None
    behind = _BEHIND.match(text, end)
    return (name[1].strip(), text[name.end() : end], behind.end()) if behind else None
