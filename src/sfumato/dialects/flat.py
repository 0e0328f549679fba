"""The flat JSON that Fooocus, SwarmUI and InvokeAI write."""

from __future__ import annotations

import json
from typing import Any

from sfumato.dialects.samplers import scheduler_of
from sfumato.dialects.settings import settings, short, with_dropped

_MOST_KEYS = 2000
#: A1111's name in lower case -> names in the JSON of Fooocus, SwarmUI and InvokeAI
_JSON_NAMES = {
    "prompt": ("prompt", "positive_prompt"), "negative": ("negative_prompt", "negativeprompt"), "steps": ("steps",),
    "cfg scale": ("cfg_scale", "guidance_scale", "cfgscale"), "seed": ("seed",), "size": ("resolution",),
    "model": ("model", "base_model"), "sampler": ("sampler",), "schedule type": ("scheduler",),
}  # fmt: skip
_JSON_NO_MATTER = {
    "app_version", "metadata_scheme", "version", "base_model_hash", "created_by", "full_prompt", "full_negative_prompt",
    "width", "height", "swarm_version", "date", "generation_time", "generation_mode", "rand_device", "vae",
}  # fmt: skip


def parse_json(text: str) -> dict[str, Any] | None:
    """What the flat JSON of Fooocus, SwarmUI or InvokeAI says, in our keys; None for any other text. Never raises on
    content."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        return None
    given = given.get("sui_image_params", given) if isinstance(given, dict) else None
    if not isinstance(given, dict) or len(given) > _MOST_KEYS:
        return None
    known: dict[str, str] = {}
    for name, spelled in _JSON_NAMES.items():
        value = next((given[each] for each in spelled if given.get(each) not in (None, "")), None)
        value = value.get("name") if isinstance(value, dict) else value
        if isinstance(value, str | int | float) and not isinstance(value, bool) and short(value):
            known[name] = str(value)
    if "prompt" not in known or not {"steps", "seed"} & set(known):
        return None
    sides = given.get("width"), given.get("height")
    if "size" not in known and all(isinstance(side, int) and 0 < side < 100_000 for side in sides):
        known["size"] = f"{sides[0]}x{sides[1]}"
    recipe = {name: known[name] for name in ("prompt", "negative") if name in known} | settings(known)
    read = {each for spelled in _JSON_NAMES.values() for each in spelled}
    dropped = [
        str(name)[:40] for name, value in given.items()
        if name not in read | _JSON_NO_MATTER and value not in (None, "", [], {}, False)
    ]  # fmt: skip
    sampler = known.get("sampler") or known.pop("schedule type", "")  # InvokeAI's scheduler says both
    if sampler:
        scheduler, lost = scheduler_of(sampler, known.get("schedule type", ""), 3)
        recipe |= {"scheduler": scheduler} if scheduler else {}
        dropped = lost + dropped
    return with_dropped(recipe, dropped)
