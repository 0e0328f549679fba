"""The strings in the header of an adapter's file: ours, and those that model sites and trainers agreed on.

``modelspec.*`` is the specification of Stability AI (1.0.0), ``ss_*`` are the names of kohya's trainer, which webui,
ComfyUI and model sites show. Ours say what a program needs to use the file rightly: the method, the words, and the hash
of the model that it was taught on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sfumato.errors import BadInput
from sfumato.models import Model

__all__ = ["BASE", "training_metadata", "check_base"]

BASE = "sfumato.base_hash"
_ARCHITECTURES = {
    "sd": "stable-diffusion-v1", "sd2": "stable-diffusion-v2", "sdxl": "stable-diffusion-xl-v1-base",
    "sd3": "stable-diffusion-v3",
    "flux": "flux-1-dev", "pixart": "pixart", "chroma": "chroma", "auraflow": "auraflow", "sana": "sana",
}  # fmt: skip
_KOHYA = {"sd": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0", "sd3": "sd3", "flux": "flux1"}


def training_metadata(
    model: Model, method: str, kind: str, facts: Mapping[str, Any], words: Sequence[str] = ()
) -> dict[str, str]:
    """Metadata of what ``method`` taught ``model``. ``kind``: lora, textual-inversion or weights; ``facts``: plain
    values, of which ``steps``, ``lr``, ``seed``, ``pictures``, ``rank``, ``alpha``, ``class`` and ``identifier`` have
    names that others know as well."""
    family = architecture(model)
    height, width = model.default_size
    trigger = " ".join([*words, *([str(facts["identifier"])] if facts.get("identifier") else [])])
    out = {
        "sfumato.method": method,
        BASE: model.weight_hash,
        "sfumato.base": model.name,
        "sfumato.word": words[0] if len(words) == 1 else "",
        "sfumato.facts": json.dumps(dict(facts), sort_keys=True, default=str),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{_ARCHITECTURES.get(family, family)}/{kind}" if kind != "weights" else
        _ARCHITECTURES.get(family, family),
        "modelspec.implementation": "diffusers",
        "modelspec.title": " ".join(filter(None, [trigger, str(facts.get("class") or "")])) or method,
        "modelspec.trigger_phrase": trigger,
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.prediction_type": {"v_prediction": "v", "epsilon": "epsilon"}.get(model.prediction(), ""),
        "ss_base_model_version": _KOHYA.get(family, family),
        "ss_sd_model_name": model.name,
        "ss_output_name": trigger,
        "ss_steps": facts.get("steps"),
        "ss_learning_rate": facts.get("lr"),
        "ss_seed": facts.get("seed"),
        "ss_num_train_images": facts.get("pictures"),
    }  # fmt: skip
    if kind == "lora":
        out |= {"ss_network_module": "networks.lora", "ss_network_dim": facts.get("rank")}
        out |= {"ss_network_alpha": facts.get("alpha")}
    return {key: str(value) for key, value in out.items() if value not in (None, "")}


def architecture(model: Model) -> str:
    """The family as these strings name it; SD 2 apart from SD 1."""
    name = model.family.name
    if name in ("sd", "sd_inpaint"):
        return "sd2" if model.family.config.get("cross_attention_dim") == 1024 else "sd"
    return name


def check_base(metadata: Mapping[str, str], model: Model, path: Any, forced: bool) -> None:
    """Raises BadInput where a file says that it was taught on other weights than the model's, unless ``forced``."""
    wanted = metadata.get(BASE, "")
    if wanted and not forced and wanted != model.weight_hash:
        name = metadata.get("sfumato.base", "another model")
        raise BadInput(
            f"{path} was taught on {name} with weights {wanted[:10]}, and {model.name} has {model.weight_hash[:10]}: "
            "load that model, or give any_base=true to try it with this one."
        )
