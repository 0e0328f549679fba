"""Samplers by short name: fresh diffusers schedulers made from the configuration of the model's own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from sfumato.errors import NotSupported, UnknownName
from sfumato.models.quiet import quiet
from sfumato.valid import first_line

# short name -> (diffusers class, settings beyond the model's own configuration)
_DIFFUSION: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++_sde_karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "dpm_sde": ("DPMSolverSDEScheduler", {}),
    "dpm_sde_karras": ("DPMSolverSDEScheduler", {"use_karras_sigmas": True}),
    "dpm++_single": ("DPMSolverSinglestepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
}
_FLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow_heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    "unipc": ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
}
_EDM: dict[str, tuple[str, dict[str, Any]]] = {
    "edm_euler": ("EDMEulerScheduler", {}),
    "edm_dpm++": ("EDMDPMSolverMultistepScheduler", {}),
}
#: what other programs call the samplers of such models
_ALSO = {"flow": {"euler": "flow_euler", "heun": "flow_heun"}, "edm": {"euler": "edm_euler", "dpm++": "edm_dpm++"}}
_TABLES = {"diffusion": _DIFFUSION, "flow": _FLOW, "edm": _EDM}
_TITLES = {"diffusion": "a diffusion model", "flow": "a flow model", "edm": "a model in EDM's scaling"}


def kind_of(scheduler: Any) -> str:
    """Which path a scheduler walks: ``"diffusion"``, ``"flow"``, or ``"edm"``, that of Karras et al. 2022 whose network
    is preconditioned by the spread of the data."""
    if scheduler.config.get("sigma_data") is not None and hasattr(scheduler, "precondition_outputs"):
        return "edm"
    return "flow" if is_flow(scheduler) else "diffusion"


def deterministic(own: Any) -> str:
    """Short name of the plainest scheduler without fresh noise that walks the path of ``own``."""
    return {"diffusion": "ddim", "flow": "flow_euler", "edm": "edm_euler"}[kind_of(own)]


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler walks the straight path of flow matching, x = (1 - s) x0 + s eps."""
    return is_flow_config(scheduler.config, type(scheduler).__name__)


def is_flow_config(config: Mapping[str, Any], class_name: str) -> bool:
    """The same of the configuration of a scheduler of this class."""
    return (
        bool(config.get("use_flow_sigmas"))
        or config.get("prediction_type") == "flow_prediction"
        or class_name.startswith("FlowMatch")
    )


def scheduler_names(kind: str) -> list[str]:
    """Short names that fit a path: see `kind_of`."""
    return list(_TABLES[kind])


def make_scheduler(own: Any, wanted: Any = None) -> Any:
    """A fresh scheduler for a model whose pipeline carries ``own``.

    ``wanted`` is ``None`` (one like ``own``), a short name, or a diffusers scheduler of which a fresh copy is made.
    Raises `UnknownName` for an unknown name and `NotSupported` for one whose path does not fit the model.
    """
    import diffusers

    kind = kind_of(own)
    with quiet():
        if wanted is None:
            return type(own).from_config(own.config)
        if not isinstance(wanted, str):
            if kind_of(wanted) != kind:
                raise NotSupported(_misfit(type(wanted).__name__, kind))
            return type(wanted).from_config(wanted.config)
        table = _TABLES[kind]
        wanted = _ALSO.get(kind, {}).get(wanted, wanted)
        if wanted not in table:
            if any(wanted in other for other in _TABLES.values()):
                raise NotSupported(_misfit(wanted, kind))
            raise UnknownName("scheduler", wanted, table)
        class_name, settings = table[wanted]
        shift = own.config.get("snr_shift_scale")  # of CogVideoX, whose own class alone knows it
        if shift is not None and wanted == "ddim":
            class_name = "CogVideoXDDIMScheduler"
        elif shift not in (None, 1.0):
            raise NotSupported(
                f"scheduler {wanted!r} does not know the shifted noise levels with which this model was trained; use "
                f"'ddim'."
            )
        if own.config.get("rescale_betas_zero_snr") and not knows_zero_snr(class_name):
            others = [name for name in table if knows_zero_snr(table[name][0])]
            raise NotSupported(
                f"scheduler {wanted!r} does not know zero terminal signal-to-noise ratio, with which this model was "
                f"trained; use one of: {', '.join(others)}."
            )
        if kind == "flow" and "use_flow_sigmas" in settings:
            settings = {**settings, "flow_shift": own.config.get("flow_shift", own.config.get("shift", 1.0))}
        elif kind == "diffusion":
            # some classes clip x0 to [-1, 1] unless configured otherwise, which suits pixels but not latents
            settings = {"clip_sample": False, **settings}
        try:
            return getattr(diffusers, class_name).from_config(own.config, **settings)
        except ImportError as error:
            raise NotSupported(f"scheduler {wanted!r} needs a missing library: {first_line(error)}") from error


def knows_zero_snr(class_name: str) -> bool:
    """Whether a diffusers scheduler can end at zero signal-to-noise ratio (Lin et al. 2023); False where there is no
    such class."""
    import diffusers

    kind = getattr(diffusers, class_name, None)
    return kind is not None and "rescale_betas_zero_snr" in inspect.signature(kind.__init__).parameters


def _misfit(name: str, kind: str) -> str:
    return f"scheduler {name!r} does not fit {_TITLES[kind]}; use one of: {', '.join(scheduler_names(kind))}."
