"""What the command line says would help, helps: commands that a message writes out are run as they are written."""

from __future__ import annotations

import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sfumato import files
from sfumato.app import make
from tests.front_door.remedies import named

M = ("--model", "MODEL")
FEW = (*M, "--steps", 1)
WALK = (*FEW, "--inner", 0)
CUBE = "structured_guidance:phrases=cube"
P, Q = "p.png", "q.png"  # a picture of ours, and somebody's


def _run(sfumato, *args):
    done = sfumato(*args)
    assert done.code == 0, f"{args}: {done.err}"
    return done


def _written(sfumato, said, pattern, more=(), **instead):
    """The command that a message writes out, with names in capitals and quotes as a reader would fill them in."""
    words = shlex.split(named(pattern, said))
    return _run(sfumato, *[instead.get(word, word) for word in words[1:]], *more)


def _recipe(sfumato, **changes):
    """A picture like ours with another recipe."""
    recipe = {**files.read_recipe(Path(P))[0], **changes}
    files.save_png(Path("changed.png"), Image.open(P), recipe)


def _damaged():
    text = PngInfo()
    text.add_text(files.CHUNK, "{not json")
    Image.open(P).save("damaged.png", pnginfo=text)


#: advice -> what to prepare, the command that is refused, and how to go on
TABLE = {
    'such as sfumato edit toys.png "a blue cube"': (
        None, ("edit", P), lambda s, said: _written(s, said, r"such as (sfumato .*)\.$", **{"toys.png": P}),
    ),
    "write width x height in pixels, such as 64x64": (
        None, ("make", "a cube", *FEW, "--size", 64),
        lambda s, said: _run(s, "make", "a cube", *FEW, "--size", named(r"such as (\w+)", said)),
    ),
    "write TEXT=WEIGHT, such as 'in the snow=1.5'": (
        None, ("make", "a cube", *FEW, "--compose", "in the snow"),
        lambda s, said: _run(s, "make", "a cube", *FEW, "--compose", named(r"such as '(.*)'", said)),
    ),
    "such as sfumato make": (
        None, ("make", *FEW),
        lambda s, said: _written(s, said, r"such as (sfumato .*?), or --like", more=("--steps", 1)),
    ),
    "is for the systems in a recipe: give --like": (
        None, ("make", "a cube", "--allow", "."), lambda s, said: _run(s, "make", "--like", P, "--allow", ".", *M),
    ),
    "give the prompt or --prompts, not both": (
        lambda s: Path("l.jsonl").write_text('{"prompt": "a cube"}'), ("make", "a cube", "--prompts", "l.jsonl", *FEW),
        lambda s, said: [_run(s, "make", "--prompts", "l.jsonl", *FEW), _run(s, "make", "a cube", *FEW)],
    ),
    "give it as with_, or --with": (
        None, ("edit", P, "a blue cube", "--by", CUBE),
        lambda s, said: _run(s, "edit", P, "a blue cube", *M, named(r"or (--with)", said), CUBE),
    ),
    "which is drawn again by its recipe; or add invert": (
        None, ("edit", P, "a blue cube", "--steps", 2, *M),
        lambda s, said: _run(s, "edit", P, "a blue cube", *WALK, "--" + named(r"or add (\w+)", said)),
    ),
    "says that it shows 'a red cube'; or add invert": (
        None, ("edit", P, "a blue cube", "--from", "a dog", *M),
        lambda s, said: [
            _run(s, "edit", P, "a blue cube", "--from", "a dog", *WALK, "--" + named(r"or add (\w+)", said)),
            _run(s, "edit", P, "a blue cube", "--from", named(r"that it shows '(.*?)'", said), *M),
        ],
    ),
    "is no edit made by sfumato; repeat it with: sfumato make --like": (
        None, ("edit", Q, "--like", P), lambda s, said: _written(s, said, r"with: (sfumato .*)\.$"),
    ),
    "is an edit; repeat it from its original: sfumato edit ORIGINAL --like": (
        lambda s: _run(s, "edit", P, "a blue cube", *M, "-o", "e.png"), ("make", "--like", "e.png"),
        lambda s, said: _written(s, said, r"original: (sfumato .*)\.$", ORIGINAL=P),
    ),
    "so say what it shows now: --from, or from_=": (
        None, ("edit", Q, "a blue cube", *M),
        lambda s, said: _run(s, "edit", Q, "a blue cube", *WALK, named(r"now: (--from)", said), "a cube"),
    ),
    "carries a damaged recipe; give the prompt and settings yourself": (
        lambda s: _damaged(), ("make", "--like", "damaged.png"), lambda s, said: _run(s, "make", "a red cube", *FEW),
    ),
    "say --model yourself to load it, or another one": (
        lambda s: _recipe(s, model="/elsewhere/model"), ("make", "--like", "changed.png"),
        lambda s, said: _run(s, "make", "--like", "changed.png", named(r"say (--model)", said), "MODEL"),
    ),
    "so say what it shows: --prompt, or prompt=": (
        None, ("explain", Q, *FEW),
        lambda s, said: _run(s, "explain", Q, *FEW, named(r"shows: (--prompt)", said), "a cube"),
    ),
    "give a prompt instead of a picture": (
        None, ("explain", P, "--by", CUBE, *FEW),
        lambda s, said: _run(s, "explain", "a red cube", "--by", CUBE, *FEW),
    ),
    "lrp takes no part in drawing a picture; see: sfumato methods": (
        None, ("explain", "a cube", "--by", "lrp"), lambda s, said: _written(s, said, r"see: (sfumato .*)\.$"),
    ),
    "looks at pictures; give one, and what to ask as the prompt": (
        None, ("explain", "a cube", "--by", "attention_relevance", "--model", "toy-vit"),
        lambda s, said: _run(s, "explain", Q, "--prompt", "cube", "--by", "attention_relevance", "--model", "toy-vit"),
    ),
    "to compare the picture with: give prompt=, or --prompt": (
        None, ("explain", Q, "--by", "attention_relevance", "--model", "toy-clip"),
        lambda s, said: _run(s, "explain", Q, "--by", "attention_relevance", "--model", "toy-clip",
                             named(r"or (--prompt)", said), "a cube"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def drawn(tiny_sd):
    """A picture of ours, drawn once."""
    made = make("a red cube", model=str(tiny_sd), steps=1)
    return made.images[0], {**made.recipes[0], "model": str(tiny_sd)}


@pytest.mark.parametrize("advice", TABLE)
def test_commands(sfumato, tiny_sd, drawn, advice):
    files.save_png(Path(P), *drawn)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(Q)

    def call(*args):
        return sfumato(*(tiny_sd if arg == "MODEL" else arg for arg in args))

    prepare, fails, helps = TABLE[advice]
    if prepare is not None:
        prepare(call)
    done = call(*fails)
    assert done.code == 2 and advice in done.err, done.err
    helps(call, done.err.strip())
