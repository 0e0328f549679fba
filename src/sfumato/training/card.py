"""The card of an exported model: ``sfumato.json`` for programs, ``MODEL_CARD.md`` for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sfumato.training.recipe import Recipe


def write_card(
    folder: Path,
    recipe: Recipe,
    step: int,
    seconds: float,
    plans: list[dict[str, Any]],
    quality: dict[str, float],
    extra: dict[str, Any],
) -> None:
    """Writes both cards into ``folder``; ``extra`` (of the objective) and ``recipe.card`` (which wins) are merged."""
    card = {
        "name": recipe.name,
        "objective": recipe.objective,
        "summary": recipe.summary,
        **extra,
        **recipe.card,
        "quality": quality,
        "training": {"steps": step, "batch": recipe.train.batch, "seconds": round(seconds), "plans": plans},
        "data": data_card(recipe),
        "recipe": recipe.model_dump(),
    }
    (folder / "sfumato.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    (folder / "MODEL_CARD.md").write_text(markdown(card), encoding="utf-8")


def data_card(recipe: Recipe) -> dict[str, Any]:
    """What was learnt from."""
    facts = recipe.data.model_dump()
    folder = facts.pop("folder")
    return {"folder": {"name": Path(folder).name, **facts}} if folder else {"toybox": facts}


def markdown(card: dict[str, Any]) -> str:
    """The card as a short page."""
    (kind, data), training = next(iter(card["data"].items())), card["training"]
    source = f"the pictures of {data.get('name')!r} at {data['size']} x {data['size']}."
    if kind == "toybox":
        source = f"{data['train']} toybox scenes at {data['size']} x {data['size']}, rendered by this library"
        source += f" (seed {data['seed']}); nothing else, no photographs, no people."
    quality = "\n".join(f"| {key} | {value:.4g} |" for key, value in card["quality"].items())
    sampling = card.get("sampling")
    replanned = [str(plan["from_step"]) for plan in training["plans"][1:]]
    parts = [
        f"# {card['name']}\n\n{card['summary']}",
        f"- Objective: `{card['objective']}`; {training['steps']} steps of {training['batch']}, "
        f"{training['seconds'] / 60:.0f} minutes of training.\n"
        f"- Data: {source}\n"
        f"- Reproduce: `sfumato train {card['name']}`.",
    ]
    if replanned:
        parts.append(
            f"- The schedule was planned anew at step {', '.join(replanned)} (`training.plans` in `sfumato.json`); the"
            " recipe holds the last plan."
        )
    if sampling:
        parts.append("- Sampling defaults: " + ", ".join(f"{key} {value}" for key, value in sampling.items()) + ".")
    for system, advised in card.get("teaching", {}).items():
        listed = {key: f"[{'|'.join(map(str, v))}]" if isinstance(v, list) else v for key, v in advised.items()}
        settings = ",".join(f"{key}={value}" for key, value in listed.items())
        parts.append(f"- Taught by `{system}` with `{settings}`, where nothing else is asked for.")
    if card.get("plain"):
        parts.append(f"## With plain diffusers\n\n```python\n{card['plain']}\n```")
    if quality:
        parts.append("## Quality, measured on held-out scenes\n\n| figure | value |\n|---|---|\n" + quality)
    if kind == "toybox":
        parts.append(
            "## Use and limits\n\nA tiny model for research, teaching and tests. It knows toys on plain grounds and"
            " nothing else; words outside the toybox vocabulary are accepted and mean nothing to it. Licence:"
            " Apache-2.0."
        )
    return "\n\n".join(parts) + "\n"
