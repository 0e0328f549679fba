"""What a single file says about its prediction and its noise schedule, beside its weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.errors import BadWeights
from sfumato.models.schedulers import knows_zero_snr

_PREDICTIONS = {
    "epsilon": ("epsilon", "eps", "noise"),
    "v_prediction": ("v", "v_prediction", "v_pred", "vpred", "velocity"),
    "sample": ("sample", "x0"),
    "flow_prediction": ("flow", "flow_prediction", "flow_matching", "rectified_flow", "rf"),
}
_SIDECAR = re.compile(r"""^\s*parameterization:\s*["']?(\w+)""", re.MULTILINE)
_TRUE = ("true", "1", "yes", "on")


@dataclass(frozen=True)
class Markers:
    """``prediction``: ``"epsilon"``, ``"v_prediction"``, ``"sample"``, ``"flow_prediction"``, or None where nothing
    says; ``zero_snr``: the schedule ends at zero signal-to-noise ratio (Lin et al. 2023); ``contradiction``: what the
    file says against itself or its architecture, empty where it does not."""

    prediction: str | None = None
    zero_snr: bool = False
    contradiction: str = ""


def read_markers(tensors: Iterable[str], metadata: Mapping[str, str]) -> Markers:
    """The markers of ComfyUI (tensors ``v_pred``, ``ztsnr``), of the model specification
    (``modelspec.prediction_type``, ``modelspec.architecture``) and of trainers (``ss_zero_terminal_snr``)."""
    names = set(tensors)
    declared: dict[str, str] = {}  # who says it -> which prediction
    zero: list[str] = ["tensor ztsnr"] if "ztsnr" in names else []
    if "v_pred" in names:
        declared["tensor v_pred"] = "v_prediction"
    strange = ""
    for key, value in metadata.items():
        what, text = key.split(".")[-1].split(" ")[-1].removeprefix("ss_"), value.strip().lower()
        text = text.replace("-", "_").replace(" ", "_")
        if what == "prediction_type" and text:
            found = next((name for name, words in _PREDICTIONS.items() if text in words), None)
            strange = (
                strange if found else f"{key} is {value.strip()[:40]!r}, which is none of epsilon, v, sample and flow"
            )
            declared |= {key: found} if found else {}
        elif what == "v_parameterization":
            declared[key] = "v_prediction" if text in _TRUE else "epsilon"
        elif what in ("zero_terminal_snr", "ztsnr", "zsnr") and text in _TRUE:
            zero.append(key)
        elif key == "modelspec.architecture" and text.startswith("stable_diffusion_v2_"):
            declared[key] = "v_prediction" if text.split("/")[0].endswith("_v") else "epsilon"
    predictions = sorted(set(declared.values()))
    if predictions == ["flow_prediction"]:
        strange = f"{next(iter(declared))} says that it predicts flow, and its architecture does not"
    elif len(predictions) > 1:
        strange = "; ".join(f"{who} says {what}" for who, what in declared.items())
    elif zero and predictions != ["v_prediction"] and predictions != ["sample"]:
        other = f"{next(iter(declared))} says {predictions[0]}" if declared else "nothing says v-prediction"
        strange = f"{zero[0]} says zero terminal signal-to-noise ratio, where noise cannot be predicted, but {other}"
    return Markers(predictions[0] if len(predictions) == 1 else None, bool(zero), strange)


def beside(path: Path) -> dict[str, str]:
    """What the configuration of the original code beside a file says (``model.yaml`` for ``model.safetensors``, as the
    web UIs want it): its parameterization, if any."""
    file = path.with_suffix(".yaml")
    if not file.is_file():
        return {}
    with file.open(encoding="utf-8", errors="replace") as text:
        found = _SIDECAR.search(text.read(100_000))
    return {"the file beside it: prediction_type": found[1]} if found else {}


def marked(config: dict[str, Any], markers: Markers) -> dict[str, Any]:
    """A scheduler's configuration that follows the markers: a class that knows zero terminal signal-to-noise ratio
    where they ask for it, its last step there (Lin et al. 2023, section 3)."""
    config = dict(config)
    if markers.prediction is not None:
        config["prediction_type"] = markers.prediction
    if markers.zero_snr:
        if not knows_zero_snr(str(config.get("_class_name"))):
            config["_class_name"] = "DDIMScheduler"
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config


def refuse_contradiction(markers: Markers, where: Any) -> None:
    """Raises BadWeights for a file that says one thing and another."""
    if markers.contradiction:
        raise BadWeights(
            f"{where} contradicts itself: {markers.contradiction}; give config=<folder of a diffusers model> whose "
            "scheduler says what is right."
        )
