"""Every command of docs/i-want.md runs as it stands there, on tiny models; its figures are those of the record."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from docs import generate, wishes
from tests.adapters.lora_files import factors, write_kohya
from tests.teach.conftest import photos  # noqa: F401  (a fixture)
from tests.tiny import tiny_model

PAGE = generate.ROOT / "docs" / "i-want.md"


def shortened(command: list[str], tiny_sd: Path, tiny_inpaint: Path) -> list[object]:
    """The same command on a tiny model with next to no steps, where it would take a built-in one that is slow."""
    verb, model = command[1], ["--model", tiny_sd]
    if "picture.png" in command or verb == "compare":  # by the picture's own model, or by none
        return command[1:]
    if "inpaint" in command:
        model = ["--model", tiny_inpaint]
    more = {
        "teach": ["--steps", 1], "segment": ["--remover", tiny_inpaint, "--steps", 2, "--iterations", 2],
    }.get(verb, ["--steps", 2])  # fmt: skip
    return [*command[1:], *model, *more]


def test_every_command_runs(sfumato, tiny_sd, tiny_inpaint, photos):  # noqa: F811
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save("photo.png")
    Image.fromarray(np.pad(np.full((16, 16), 255, np.uint8), 8)).save("mask.png")
    shutil.copytree(photos, "photos")
    write_kohya(Path("style.safetensors"), factors(tiny_model("sd"), alpha=2))
    made = sfumato("make", "a red cube and a blue ball", "--model", tiny_sd, "--steps", 2, "-o", "picture.png")
    assert made.code == 0, made.err
    for folder in "AB":
        Path(folder).mkdir()
        shutil.copy("picture.png", folder)
    commands = wishes.commands()
    assert len(commands) == 16
    for command in commands:
        done = sfumato(*shortened(shlex.split(command), tiny_sd, tiny_inpaint))
        assert done.code == 0, f"{command}: {done.err}"
        written = [Path(line) for line in done.lines if Path(line).exists()]
        assert written, f"{command} wrote nothing: {done.out}"


def test_every_command_of_the_page_is_one_of_these():
    told = re.findall(r"^\| [^|]+ \| `(sfumato .*?[^\\])`(?= [(|])", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [each.replace("\\|", "|") for each in told] == wishes.commands()


@pytest.mark.parametrize("wish", wishes.WISHES, ids=lambda wish: wish.want)
def test_figures_are_those_of_the_record(wish):
    path = wishes.RESULTS / f"{wish.key}.json"
    if not path.is_file():
        assert wishes.measured(wish) == "not measured yet"
        return
    told = wishes.measured(wish)
    parts = json.loads(path.read_text(encoding="utf-8"))["parts"]
    rows = [row for name, part in parts.items() if name.endswith(wish.part) for row in part["rows"]]
    quoted = [row["measured"] for row in rows if wish.row in row["claim"]]
    assert quoted and all(each in told for each in quoted)
    with pytest.raises(LookupError, match="has no row"):
        wishes.measured(replace(wish, row="what nobody claims"))
