"""Recipes in other programs' words: AUTOMATIC1111's ``parameters`` text, which Forge, SD.Next, Fooocus and Draw Things
write too, ComfyUI's ``prompt`` graph, and the flat JSON of Fooocus, SwarmUI and InvokeAI.

All are read into our keys (prompt, negative, steps, guidance, seed, size, scheduler, named_model, clip_skip); what has
no place there is listed under ``dropped``, so that nobody believes it was followed. The content comes from strangers:
nothing here raises on it or runs longer than its length warrants.
"""

from sfumato.dialects.a1111 import a1111_text, parse_a1111
from sfumato.dialects.comfy import parse_comfy
from sfumato.dialects.flat import parse_json
from sfumato.dialects.samplers import SAMPLERS

__all__ = ["SAMPLERS", "a1111_text", "parse_a1111", "parse_comfy", "parse_json"]
