"""Recipes: one TOML file says everything about a training run (objective, data, model, loss, optimiser, schedule).

A recipe is a pure description: the same recipe, seed and step give the same batch, the same noise and the same loss.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sfumato import valid
from sfumato.errors import BadInput, UnknownName

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib  # type: ignore[no-redef]


def _too_large(name: str, value: Any) -> str:
    """What is wrong with numbers that stand for more than any computer holds, and with texts that none can hold."""
    if isinstance(value, bool | Section):
        return ""
    if isinstance(value, int):
        most = valid.LARGEST_SEED if name == "seed" else 10**8
        return f"is {valid.brief(value)}; the most is {most}" if abs(value) > most else ""
    if isinstance(value, float):
        return "" if math.isfinite(value) else f"is {value}; it must be a finite number"
    if found := valid.wrong(value, valid.LONGEST):
        return f"is {valid.brief(value)}: {found}"
    if isinstance(value, dict):
        return next((f"{key} {wrong}" for key, each in value.items() if (wrong := _too_large(key, each))), "")
    inner = value if isinstance(value, list | tuple) else ()
    return next((wrong for each in inner if (wrong := _too_large(name, each))), "")


class Section(BaseModel):
    """Base of every section of a recipe: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="after")
    def _bounded(self) -> Section:
        for name, value in self:
            if wrong := _too_large(name, value):
                raise ValueError(f"{name} {wrong}")
        return self


class DataOptions(Section):
    """Which toybox scenes are used (:class:`sfumato.toybox.ToyboxDataset`), or a folder of pictures with captions."""

    train: int = Field(
        default=24_000, ge=1, le=1_000_000, description="training scenes; of a folder, the most pictures used"
    )
    val: int = Field(
        default=1_000, ge=1, le=100_000, description="held-out scenes; of a folder, no more than every tenth picture"
    )
    size: int = Field(default=64, ge=16, le=1024, description="side of the pictures in pixels")
    seed: int = Field(default=0, ge=0, description="seed of the scenes, or of what is held out of a folder")
    folder: str = Field(
        default="", description="pictures with captions in the place of scenes (docs/training.md); none: the toybox"
    )


class TrainOptions(Section):
    """Optimiser, schedule and bookkeeping."""

    steps: int = Field(..., ge=1, description="optimiser steps of the whole schedule")
    batch: int = Field(..., ge=1, le=65_536, description="samples per step over all processes")
    accumulate: int = Field(1, ge=1, description="parts of a step's batch whose gradients are added up")
    lr: float = Field(1e-3, gt=0, description="peak learning rate (AdamW)")
    warmup: int = Field(100, ge=0, description="steps of linear warm-up")
    decay: Literal["cosine", "linear", "wsd", "none"] = Field("cosine", description="decay to zero after warm-up")
    decay_fraction: float = Field(0.3, gt=0, le=1, description="wsd: share of the steps spent in the final decay")
    optimizer: Literal["adamw", "muon"] = "adamw"
    muon_lr: float = Field(0.02, gt=0, description="peak learning rate of the orthogonalised matrices (muon)")
    weight_decay: float = Field(0.01, ge=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.99, ge=0, lt=1)
    clip: float = Field(1.0, gt=0, description="largest global gradient norm")
    ema: float = Field(0.999, ge=0, lt=1, description="decay of the averaged weights, 0 = no averaging")
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    channels_last: bool = Field(False, description="keep convolution weights and activations channels-last")
    log_every: int = Field(20, ge=1)
    grid_every: int = Field(500, ge=1, description="steps between sample grids")
    evaluate_every: int = Field(1_000, ge=1, description="steps between measurements on held-out scenes")
    checkpoint_every: int = Field(500, ge=1)
    stages: tuple[float, ...] = Field(
        (), description="shares of the steps after which the weights are kept and exported"
    )
    snapshot_minutes: float = Field(10.0, gt=0, description="minutes between exports of the averaged weights")


class Recipe(Section):
    """A whole training run. ``model`` and ``loss`` are read by the objective's own option classes."""

    name: str = Field(..., pattern=r"^[a-z0-9][a-z0-9._-]*$")
    objective: str
    summary: str = ""
    seed: int = Field(0, ge=0)
    init_from: str | None = Field(None, description="zoo name, finished run or folder whose weights are the start")
    data: DataOptions = DataOptions()
    model: dict[str, Any] = {}
    loss: dict[str, Any] = {}
    train: TrainOptions
    card: dict[str, Any] = Field({}, description="extra entries of the exported card, such as sampling defaults")


def parse(section: str, kind: type[Section], values: dict[str, Any]) -> Any:
    """``kind`` filled from ``values``; mistakes become one-line errors that name ``section`` and the nearest key."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"]]
        where = ".".join([section, *place]) if section else ".".join(place)
        if first["type"] == "extra_forbidden":
            owner: Any = kind
            for part in place[:-1]:
                owner = owner.model_fields[part].annotation
            raise UnknownName(f"recipe key ({where})", place[-1], owner.model_fields) from None
        if first["type"] == "value_error":
            raise BadInput(f"recipe key {'.'.join([*where.split(), str(first['ctx']['error'])])}.") from None
        given = "" if first["type"] == "missing" else f", got {valid.brief(first['input'])}"
        raise BadInput(f"recipe key {where}: {first['msg'][0].lower()}{first['msg'][1:]}{given}.") from None


def load_recipe(source: str | Path) -> Recipe:
    """A recipe from a TOML file, or a shipped one by name.

    Raises:
        UnknownName: ``source`` is neither a file nor a shipped recipe, or holds an unknown key.
        BadInput: the file is not TOML or a value is out of its range.
    """
    from sfumato import files, registry

    path = Path(source)
    if not path.is_file():
        shipped = registry.recipes()
        if str(source) not in shipped:
            raise UnknownName("recipe", str(source), shipped)
        path = shipped[str(source)]
    try:
        values = tomllib.loads(files.read_text(path))
    except (ValueError, RecursionError) as error:  # a whole number of 5,000 digits is no error of TOML's
        raise BadInput(f"recipe {path} is not TOML: {error}.") from None
    return parse("", Recipe, values)
