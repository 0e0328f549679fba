"""Samplers by short name: fresh diffusers schedulers made from the configuration of the model's own."""

from __future__ import annotations

from typing import Any

from sfumato.errors import NotSupported, UnknownName
from sfumato.models.quiet import quiet

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


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler walks the straight path of flow matching, x = (1 - s) x0 + s eps."""
    config = scheduler.config
    return (
        bool(config.get("use_flow_sigmas"))
        or config.get("prediction_type") == "flow_prediction"
        or type(scheduler).__name__.startswith("FlowMatch")
    )


def scheduler_names(flow: bool) -> list[str]:
    """Short names that fit a flow model or a diffusion model."""
    return list(_FLOW if flow else _DIFFUSION)


def make_scheduler(own: Any, wanted: Any = None) -> Any:
    """A fresh scheduler for a model whose pipeline carries ``own``.

    ``wanted`` is ``None`` (one like ``own``), a short name, or a diffusers scheduler of which a fresh copy is made.
    Raises `UnknownName` for a name nobody knows and `NotSupported` for one whose path does not fit the model.
    """
    import diffusers

    flow = is_flow(own)
    with quiet():
        if wanted is None:
            return type(own).from_config(own.config)
        if not isinstance(wanted, str):
            if is_flow(wanted) != flow:
                raise NotSupported(_misfit(type(wanted).__name__, flow))
            return type(wanted).from_config(wanted.config)
        table = _FLOW if flow else _DIFFUSION
        if wanted not in table:
            if wanted in _DIFFUSION or wanted in _FLOW:
                raise NotSupported(_misfit(wanted, flow))
            raise UnknownName("scheduler", wanted, table)
        class_name, settings = table[wanted]
        if flow and "use_flow_sigmas" in settings:
            settings = {**settings, "flow_shift": own.config.get("flow_shift", own.config.get("shift", 1.0))}
        elif not flow:
            # some classes clip x0 to [-1, 1] unless configured otherwise, which suits pixels but not latents
            settings = {"clip_sample": False, **settings}
        try:
            return getattr(diffusers, class_name).from_config(own.config, **settings)
        except ImportError as error:
            raise NotSupported(f"scheduler {wanted!r} needs a missing library: {_first_line(error)}") from error


def _misfit(name: str, flow: bool) -> str:
    kind = "a flow model" if flow else "a diffusion model"
    return f"scheduler {name!r} does not fit {kind}; use one of: {', '.join(scheduler_names(flow))}."


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
