"""The wishes of docs/i-want.md: the command for each, what it costs, and what was measured (``claims/results``)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato import cards

RESULTS = Path(__file__).parents[1] / "claims" / "results"


@dataclass(frozen=True)
class Wish:
    """One row. ``figure`` says what the measured numbers are; these are the rows of claim ``key`` in its part
    ``part`` ("FAMILY: PART" where it was measured on both families) whose text holds ``row``."""

    want: str
    command: str
    key: str
    part: str = ""
    row: str = ""
    figure: str = ""
    cost: str = ""


TOYS = '"a red cube and a blue ball"'
WISHES = (
    Wish("a thing that is missing to be there", f"sfumato make {TOYS} --with attend_excite", "attend_excite",
         "three toys", "12 points more often", "pictures with all their toys, and how many more than without"),
    Wish("colours that are swapped on their own things", f"sfumato make {TOYS} --with attend_excite", "attend_excite",
         "three toys", "in their own colours", "pictures with all toys in their colours, and how many more"),
    Wish("a thing at its place, left or right",
         f'sfumato make {TOYS} --with "paint_with_words:phrases=[red cube|blue ball],'
         'box=[[0|0.35|0.45|0.9]|[0.55|0.35|1|0.9]]"',
         "paint_with_words", "layouts", "35 points more often", "toys whose middle is in their box"),
    Wish("one word changed", 'sfumato edit picture.png "a green cube and a blue ball"', "prompt_to_prompt",
         "generated", "one word changed", "changes that came out; the rest against drawing anew"),
    Wish("a region changed, the rest kept", 'sfumato edit photo.png "a blue ball" --mask mask.png --by blend', "blend",
         "edits", "keeps the picture outside", "fidelity outside the region, against image-to-image"),
    Wish("to see where each word went", f"sfumato explain {TOYS}", "daam", "generated", "noun masks",
         "overlap of a noun's map with its toy"),
    Wish("to know why a label was given", "sfumato explain picture.png --by lrp --model toy-vit", "lrp",
         "class specificity", "85 %", "of two toys, hottest pixel on the one asked for (toy-vit)"),
    Wish("to know whether set A is better than B", "sfumato compare A B", "bench", "planted failures", "recoloured",
         "planted and found shares of good pictures", "one reading of every picture"),
    Wish("my own toy taught", 'sfumato teach photos --name "<rex>" --class ball -o rex.safetensors',
         "textual_inversion", "toy-sd", "60 % of the gap", "share closed of the gap from prompts to renders"),
    Wish("a thing removed", 'sfumato edit photo.png "an empty meadow" --mask mask.png --by inpaint', "inpaint",
         "remove", "a toy is taken away: the hole", "distance to the scene without it (toy-sd-inpaint)"),
)  # fmt: skip

MORE = (
    ("a picture of a sentence", f"sfumato make {TOYS}", ""),
    ("the same picture again", "sfumato make --like picture.png", ""),
    ("a thing in the shape of a mask", 'sfumato make "a red cube" --with shape_guided:words=[cube],mask=mask.png',
     "shape_guided"),
    ("my style", 'sfumato make "a red cube" --with lora:file=style.safetensors,scale=0.8', "lora"),
    ("my word", 'sfumato make "a <rex> on the snow" --with word:file=rex.safetensors', "word"),
    ("masks of things without drawing any", "sfumato segment ball photos -o balls", "text_to_segmentation"),
)  # fmt: skip


def commands() -> list[str]:
    """Every command of the page."""
    return [wish.command for wish in WISHES] + [command for _, command, _ in MORE]


def rows() -> Iterator[tuple[str, str, str, str]]:
    """(what is wanted, the command, what was measured, what it costs)."""
    for wish in WISHES:
        card = cards.methods().get(wish.key)
        link = f" ([{wish.key}](systems/{wish.key}.md))" if card else " ([judging](judging.md))"
        yield wish.want, f"`{wish.command}`{link}", measured(wish), wish.cost or (card.cost if card else "")


def more() -> Iterator[tuple[str, str]]:
    for want, command, key in MORE:
        yield want, f"`{command}`" + (f" ([{key}](systems/{key}.md))" if key else "")


def measured(wish: Wish) -> str:
    """What the record says: each family's figure and verdict, or that nothing has been measured yet.

    Raises LookupError where the record has no such row any more.
    """
    path = RESULTS / f"{wish.key}.json"
    if not path.is_file():
        return "not measured yet"
    parts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["parts"]
    found = []
    for name, part in parts.items():
        family, _, plain = name.rpartition(": ")
        for row in part["rows"]:
            if plain == wish.part and wish.row in row["claim"]:
                verdict = {True: "holds", False: "does not hold"}.get(row["holds"], "no verdict")
                found.append(f"{family}: " * bool(family) + f"{row['measured']} ({verdict})")
    if not found:
        raise LookupError(f"{path.name} has no row {wish.row!r} in part {wish.part!r}: name another in docs/wishes.py.")
    return f"{wish.figure}: " + "<br>".join(found)
