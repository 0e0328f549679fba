"""Samplers and their schedules by the names of every program: one table, both ways."""

from __future__ import annotations

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
#: what models of other paths are drawn with, in A1111's words; the same words bring them back, see `make_scheduler`
_OF_OTHER_PATHS = {
    "flow_euler": ("Euler", "Simple"), "flow_heun": ("Heun", "Simple"), "edm_euler": ("Euler", ""),
    "edm_dpm++": ("DPM++ 2M", ""),
}  # fmt: skip
#: names of SD.Next, InvokeAI and older versions -> ours
_OTHER_NAMES = {
    "euler flowmatch": "euler", "heun flowmatch": "heun", "dpm sde": "dpm_sde", "kdpm2": "dpm2", "kdpm2 a": "dpm2_a",
    "kdpm_2": "dpm2", "kdpm_2_a": "dpm2_a", "euler ancestral": "euler_a", "unipc bh2": "unipc", "uni_pc_bh2": "unipc",
    "dpmpp_2s": "dpm++_single", "pndm": "pndm",
}  # fmt: skip
_USUAL = {"", "automatic", "normal", "uniform", "simple", "ddim_uniform", "default"}
#: how a schedule is written behind the name of a sampler -> its name
_SCHEDULES = {
    " karras": "karras", "_karras": "karras", "_k": "karras", " exponential": "exponential",
    "_exponential": "exponential", " polyexponential": "polyexponential", " sgm uniform": "sgm uniform",
    " sgmuniform": "sgm uniform", " beta": "beta", " turbo": "turbo", " align your steps": "align your steps",
    " ays": "align your steps", " uniform": "uniform",
}  # fmt: skip


def scheduler_of(sampler: str, schedule: str, column: int) -> tuple[str | None, list[str]]:
    """Our name of a sampler with its schedule, and what of the two has no counterpart; ``column`` of the table."""
    sampler, schedule = sampler.strip().lower(), schedule.strip().lower()
    rows = _rows(sampler)
    if not rows:  # older versions say both in one
        ending = next((each for each in _SCHEDULES if sampler.endswith(each)), "")
        if ending and (rows := _rows(sampler.removesuffix(ending))):
            sampler, schedule = sampler.removesuffix(ending), _SCHEDULES[ending] if schedule in _USUAL else schedule
    exact = [row for row in rows if row[column + 1].lower() == schedule]
    if schedule in _USUAL:
        exact = [row for row in rows if row[0] == sampler] or [row for row in rows if not row[column + 1]]
    if exact:
        return exact[0][0], []
    if rows:
        return rows[0][0], [f"schedule {schedule!r}"]
    return None, [f"sampler {sampler[:40]!r}"]


def _rows(sampler: str) -> list[tuple[str, str, str, str, str]]:
    """The rows of the table with a sampler of any program."""
    sampler = sampler.removeprefix("k_").removesuffix("_gpu")  # where the noise is drawn
    sampler = _OTHER_NAMES.get(sampler, sampler)
    own = [row for row in SAMPLERS if row[0] == sampler]
    return own or [row for row in SAMPLERS if sampler in (row[1].lower(), row[3])]


def sampler_of(scheduler: Any) -> tuple[Any, str]:
    """A1111's sampler and schedule type of one of our schedulers; its own name where A1111 has none."""
    other = _OF_OTHER_PATHS.get(str(scheduler), (scheduler, ""))
    return next(((row[1], row[2]) for row in SAMPLERS if row[0] == scheduler), other)
