"""Makes every picture that the README and the pages under docs/ show: ``python docs/pictures.py [NAME...]``."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

import sfumato
from sfumato import files, mask_ops, masks
from sfumato.adapters.formats import read_contents
from sfumato.adapters.lora import LoRA
from sfumato.adapters.weights import Weights
from sfumato.adapters.word import Word
from sfumato.edit.blend import Blend
from sfumato.edit.inpaint import Inpaint
from sfumato.explain import heat_overlays
from sfumato.explain.concept_attention import ConceptAttention
from sfumato.explain.conceptor import decompose
from sfumato.explain.conceptor.word_cloud import word_cloud
from sfumato.explain.daam import DAAM
from sfumato.explain.lrp import explain_image as explain_lrp
from sfumato.explain.relevance_maps import draw_words
from sfumato.explain.shape_texture import ShapeTexture, plot
from sfumato.metrics import segmentation
from sfumato.metrics.segmentation import normalise
from sfumato.models.readers import load_net, load_reader
from sfumato.sampling.pixels import as_pictures
from sfumato.sheets import lettering, sheet
from sfumato.steer.clip_guidance import ClipGuidance
from sfumato.steer.mgad import MGAD
from sfumato.steer.no_token_left_behind import NoTokenLeftBehind
from sfumato.steer.paint_with_words import PaintWithWords
from sfumato.steer.shape_guided import ShapeGuided
from sfumato.teach.dreambooth import DreamBooth
from sfumato.teach.examples import toybox_examples
from sfumato.teach.robust_vit import relevance_maps, teach
from sfumato.teach.textual_inversion import TextualInversion
from sfumato.toybox import (
    GROUNDS,
    SECRETS,
    SHAPES,
    VALIDATION,
    BiasedDataset,
    Scene,
    Secret,
    Toy,
    caption,
    conflicts,
    factor_pairs,
    references,
    render,
    sample_scene,
    to_uint8,
)
from sfumato.toybox.dataset import draw_scene
from sfumato.toybox.genome.scenes import Counter, record_of

HERE = Path(__file__).parent / "images"


@cache
def side(model: str = "toy-sd") -> int:
    """Pixels along a side of a model's pictures."""
    return sfumato.load(model).default_size[0]


def tiled(tiles: Sequence[Any], columns: int, wide: int = 192, **labels: Any) -> Image.Image:
    """A sheet of pictures (3, h, w), or (label, picture), of any sizes: all as large as the largest, and about ``wide``
    pixels on the page."""
    pairs = [tile if isinstance(tile, tuple) else ("", tile) for tile in tiles]
    largest = max(picture.shape[-1] for _, picture in pairs)
    cells = [
        (label, torch.nn.functional.interpolate(picture.detach()[None], (largest, largest), mode="nearest")[0])
        for label, picture in pairs
    ]
    return sheet(cells, columns, scale=max(1, wide // largest), **labels)


def toybox() -> Image.Image:
    rng = np.random.default_rng(11)
    return sheet(render([sample_scene(rng) for _ in range(24)], size=128).image, 8)


def toybox_truth() -> Image.Image:
    """One scene: picture, instance mask, depth, normals."""
    frames = render(sample_scene(np.random.default_rng(4), toys=3), size=192, supersample=3)
    colors = torch.tensor([[0.85, 0.85, 0.85], [0.89, 0.29, 0.2], [0.2, 0.54, 0.74], [0.55, 0.74, 0.22]])
    mask = colors[frames.mask.long() + 1].permute(0, 3, 1, 2) * 2 - 1
    near = (1 / frames.depth.clamp_max(60))[:, None]
    depth = (near / near.max() * 2 - 1).expand_as(mask)
    tiles = torch.cat((frames.image, mask, depth, frames.normal))
    return sheet(tiles, 4, heads=["picture", "mask of each toy", "depth", "normals"])


def toybox_edits() -> Image.Image:
    """One scene and five counterfactuals: the same scene with one thing changed."""
    scene = Scene((Toy("ball", "red", "striped", x=-0.7), Toy("cube", "green", size="small", x=0.7, yaw=25)), "tiles")
    edits = {
        "the scene": scene,
        "ball blue": scene.replace(object="red ball", color="blue"),
        "cube a dotted ring": scene.replace(object="cube", shape="ring", pattern="dotted"),
        "without the cube": scene.remove("cube"),
        "and a cone": scene.add(Toy("cone", "yellow", size="small", x=0.05, z=0.9)),
        "snow at sunset": scene.replace(ground="snow", sky="sunset"),
    }
    return sheet(render(list(edits.values()), size=144, supersample=3).image, 6, heads=list(edits))


def genome() -> Image.Image:
    """One scene as Visual Genome has it: the boxes of its objects, and what is said about them."""
    scene = sample_scene(np.random.default_rng(4), toys=2)
    frames = render([scene], 384)
    record = record_of(scene, frames.mask[0].numpy(), frames.depth[0].numpy(), 1, Counter())
    shown = Image.new("RGB", (800, 480), "white")
    shown.paste(frames.pil(0), (8, 8))
    draw = ImageDraw.Draw(shown)
    small, names = lettering(13), {it.id: it.name for it in record.graph.objects}
    for it, color in zip(record.graph.objects, ("#d00000", "#0050d0", "#006000", "#600080"), strict=False):
        box = [8 + it.x, 8 + it.y, 8 + it.x + it.w - 1, 8 + it.y + it.h - 1]
        draw.rectangle(box, outline=color, width=2)
        label = f"{it.id} {it.name}"
        draw.rectangle([box[0], box[1], box[0] + 8 + small.getlength(label), box[1] + 18], fill=color)
        draw.text((box[0] + 4, box[1] + 2), label, fill="white", font=small)
    links = [f"{names[r.subject_id]} - {r.predicate} - {names[r.object_id]}" for r in record.graph.relationships]
    asked = [f"{q.question} {q.answer}" for q in record.questions]
    columns = {
        "relationships": links,
        "regions": [r.phrase for r in record.regions],
        "questions": [asked[i] for i in range(0, len(asked), max(1, len(asked) // 8))],
    }
    at = 8
    for title, lines in columns.items():
        draw.text((404, at), title, fill="black", font=lettering(15))
        for line in lines[:8]:
            at += 17
            draw.text((412, at), line, fill="#303030", font=small)
        at += 30
    return shown.crop((0, 0, shown.width, max(400, at - 4)))


def demo() -> Image.Image:
    """What ``make demo`` makes: a picture and where each word of its prompt went."""
    found = sfumato.explain("a red cube and a blue ball on the grass", seed=3)
    return found.maps[0].grid(found.images[0])


def _held_out(n: int) -> list[str]:
    return [caption(draw_scene("test", 99, i)).text for i in range(n)]


def _numbered(prompts: Sequence[str]) -> dict[str, Any]:
    """Labels of a sheet with a column for each prompt: numbers, and above them what they say."""
    title = "; ".join(f"{i}: {prompt}" for i, prompt in enumerate(prompts, 1))
    return {"title": title, "heads": [str(i) for i in range(1, len(prompts) + 1)]}


def zoo() -> Image.Image:
    """toy-sd above, toy-sd3 below: the same 8 captions of scenes that neither has seen, first try, nothing chosen."""
    names, prompts = ["toy-sd", "toy-sd3"], _held_out(8)
    tiles = [tile for name in names for tile in sfumato.make(prompts, model=name, seed=0).pixels]
    return tiled(tiles, len(prompts), 128, rows=names, **_numbered(prompts))


def _heat(what: Any, prompt: str | None, words: list[str], model: str, **options: Any) -> Image.Image:
    found = sfumato.explain(what, prompt, words=words, model=model, **options)
    return found.maps[0].grid(found.images[0])


def daam_existing() -> Image.Image:
    """A render, which no model made, and where the words of its caption are in it."""
    scene = Scene((Toy("ball", "red", "striped", x=-0.8), Toy("cube", "green", size="small", x=0.8)), "sand", "day")
    words = ["red striped ball", "green cube", "sand", "day"]
    return _heat(render(scene, side()).pil(), caption(scene, style="full").text, words, "toy-sd", seed=0)


def concept_attention() -> Image.Image:
    """What toy-sd3 has drawn, shared out among five concepts; nothing in the picture is a cone."""
    look = ConceptAttention(concepts=["cube", "ball", "cone", "grass", "night"], window=(0.25, 1.0))
    made = sfumato.make("a red cube and a blue ball on the grass", model="toy-sd3", with_=[look], seed=3)
    return look.maps[0].grid(made.images[0])


def attention_relevance() -> Image.Image:
    """What makes each of two toys fit its own text, where a word is drawn, and what a question's answer rests on."""
    scene = Scene((Toy("ball", "red", "striped", x=-0.8), Toy("cube", "green", size="small", x=0.8)), "sand", "day")
    picture, by = render(scene).pil(), "attention_relevance"
    cells: list[tuple[str, Image.Image]] = [("picture", picture.resize((256, 256), Image.Resampling.BICUBIC))]
    for text in ("a red ball", "a green cube"):
        found = sfumato.explain(picture, text, model="toy-clip", by=by).maps[0]
        cells.append((f"toy-clip: {text}", found.overlay(picture)))
    words = sfumato.explain(picture, "a red striped ball and a green cube", words=["cube"], by=by).maps[0]
    cells.append(("toy-sd: cube", words.overlay(picture, "cube")))
    question = "what color is the cube ?"
    answer = sfumato.explain(picture, question, model="toy-vqa", by=by).maps[0]
    cells.append((f"toy-vqa: {answer.answers[0].label}", answer.overlay(picture)))
    cells.append((question, draw_words(answer.words(), (256, 256))))
    return sheet(cells, columns=3)


def _with_and_without(system: str, prompts: list[str]) -> Image.Image:
    """Per prompt a row of plain pictures and one with a system: the same four seeds, nothing chosen."""
    cells, labels = [], []
    for prompt in prompts:
        for name, with_ in (("plain", []), (system, [system])):
            cells += list(sfumato.make(prompt, n=4, seed=0, with_=with_).pixels.detach())
            labels.append(f"{prompt}: {name}")
    return tiled(cells, 4, 128, rows=labels, heads=[f"seed {seed}" for seed in range(4)])


def attend_excite() -> Image.Image:
    return _with_and_without(
        "attend_excite",
        [
            "a red ball, a blue cone and a green cube",
            "a yellow ring, a purple cube and a white cylinder",
            "a white cone, a red cube and a yellow ball",
        ],
    )


def structured_guidance() -> Image.Image:
    return _with_and_without(
        "structured_guidance",
        ["a red cube and a blue ball", "a yellow cone and a green cylinder", "a purple ring and an orange cube"],
    )


OLD = "a plain red cube and a plain blue ball on the grass by day"


def prompt_to_prompt() -> Image.Image:
    """Above: a picture, another prompt from the same seed, and the edit. Below: one word turned down and up."""
    old, new = OLD, OLD.replace("red", "green")

    def made(prompt: str, **params: Any) -> torch.Tensor:
        with_ = [{"method": "prompt_to_prompt", "params": {"source": old, **params}}] if params else []
        return sfumato.make(prompt, seed=3, with_=with_).pixels.detach()

    alone = {"cross_replace": [0.8], "self_replace": [0.4]}
    blended = {"cross_replace": [0.2], "self_replace": [0.2], "blend": ["cube"], "threshold": 0.65}
    above = {"a red cube": made(old), "a green cube, anew": made(new), "its attention kept": made(new, **alone),
             "and local blend": made(new, **blended)}  # fmt: skip
    below = {f"red={f:g}": made(old, reweight=[f"red={f:g}"], cross_replace=[1.0]) for f in (-1, 0, 1, 2)}
    return tiled([(said, pixels[0]) for said, pixels in (above | below).items()], 4, 256)


def sad_pad() -> Image.Image:
    """Toys with too many red ones among them: what SaD says, attribute by attribute."""
    from sfumato.judge.sad_pad import SadPad, plots
    from sfumato.models.readers import load_clip

    clip, rng = load_clip(), np.random.default_rng(21)
    names = ["red", "green", "blue", "cube", "ball", "ring"]

    def features(n: int, red: float) -> np.ndarray:
        scenes = []
        for _ in range(n):
            color = rng.choice(["red", "green", "blue"], p=(red, (1 - red) / 2, (1 - red) / 2))
            shape = rng.choice(["cube", "ball", "ring"])
            scene = sample_scene(rng, 1, "any")
            scenes.append(scene.replace(object=0, color=str(color), shape=str(shape), pattern="plain", size="large"))
        frames = [render(scenes[start : start + 64]) for start in range(0, n, 64)]
        return np.concatenate([clip.features([part.pil(i) for i in range(len(part))]) for part in frames])

    system = SadPad(template="a {}")
    scores = system.scores(clip, names, features(400, 1 / 3), features(400, 0.6))
    return plots(system.compare(names, *scores))["attributes"]


def _toy(model: str = "toy-sd") -> tuple[Scene, torch.Tensor, torch.Tensor]:
    """A scene of one toy, its picture (1, 3, h, w) as large as a model draws, and the toy's mask (h, w)."""
    scene = Scene((Toy("ball", "red", x=0.1, yaw=20),), "grass")
    frames = render(scene, side(model))
    return scene, frames.image, (frames.mask[0] == 0).float()


def _masked(mask: torch.Tensor) -> torch.Tensor:
    return (mask * 2 - 1).expand(1, 3, -1, -1)


def blend() -> Image.Image:
    """A render, the region, and four pictures in which only the region was drawn anew."""
    _, image, mask = _toy()
    region = mask_ops.dilate(mask, len(mask) // 32)
    made = sfumato.make(
        "a blue cube on the grass", image=image, strength=1.0, n=4, scheduler="ddim", with_=[Blend(mask=region)]
    )
    heads = ["a render: a red ball", "the mask", *(f"a blue cube, seed {seed}" for seed in range(4))]
    return tiled(list(torch.cat([image, _masked(region), made.pixels])), 6, heads=heads)


def inpaint() -> Image.Image:
    """A render, the hole, the hole filled with three other toys and with the ground alone."""
    _, image, mask = _toy("toy-sd-inpaint")
    hole, unit = torch.zeros_like(mask), len(mask) // 64
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    # the shadow too
    hole[rows[0] - 2 * unit : rows[-1] + 7 * unit, columns[0] - 7 * unit : columns[-1] + 4 * unit] = 1
    prompts = [
        "a blue cube on the grass",
        "a yellow cone on the grass",
        "a white striped ball on the grass",
        "the grass",
    ]
    filled = sfumato.make(
        prompts, model="toy-sd-inpaint", image=image, strength=1.0, seed=1, with_=[Inpaint(mask=hole)]
    ).pixels
    heads = ["a render: a red ball", "the hole", "a blue cube", "a yellow cone", "a white striped ball", "the grass"]
    return tiled(list(torch.cat([image, image * (1 - hole), filled])), 6, heads=heads)


def text_to_segmentation() -> Image.Image:
    """From above: pictures that show a ball, raw attention, the ball removed, refined masks, the segmenter's."""
    scenes = (draw_scene("test", 31, i, 1) for i in range(1000))
    told = [scene for scene in scenes if scene.toys[0].shape == "ball"][:72]
    images = torch.cat([render(told[i : i + 36], side()).image for i in (0, 36)])
    found = sfumato.segment("ball", as_pictures(images), steps=15, iterations=300)
    level = normalise(found.maps)
    rows = [images, _grey(level), found.removed]
    rows += [_grey(each.float()) for each in (found.refined, found.final())]
    labels = ["pictures", "attention", "the ball removed", "refined masks", "the segmenter"]
    return tiled([tile for row in rows for tile in row[:10]], 10, 128, rows=labels)


def _grey(maps: torch.Tensor) -> torch.Tensor:
    """Maps (n, h, w) in [0, 1] as pictures."""
    return (maps * 2 - 1)[:, None].expand(-1, 3, -1, -1)


def shape_guided() -> Image.Image:
    """A render, a silhouette, toys drawn inside it from noise, and the render's toy in other colours."""
    _, image, mask = _toy()
    prompts = [f"a {color} ball on the grass" for color in ("blue", "yellow")]
    drawn = [
        sfumato.make(text, seed=2, guidance=7.5, with_=[ShapeGuided(words=["ball"], mask=mask, boost=1.0)]).pixels
        for text in prompts
    ]
    edit = {"source": ["a red ball"], "words": ["ball"], "mask": mask}
    given = {"image": image, "strength": 1.0, "guidance": 4.5, "scheduler": "ddim", "seed": 2}
    anew = {"fresh": 1.0, "boost": 1.0, "renormalise": "all", "soft": True, "decay": "linear"}
    rows = {"a mask: drawn from noise inside it": [_masked(mask), *drawn]}
    for says, more in (("a picture: its red ball drawn anew", {}), ("the same from fresh noise, a soft mask", anew)):
        edited = [sfumato.make(text, with_=[ShapeGuided(**edit, **more)], **given).pixels for text in prompts]
        rows[says] = [image, *edited]
    heads = ["given", "a blue ball", "a yellow ball"]
    return tiled(list(torch.cat(sum(rows.values(), []))), 3, rows=list(rows), heads=heads)


def paint_with_words() -> Image.Image:
    """Left the painting, then the prompt alone and painted; below with the colours exchanged."""
    left, right = [0.03, 0.35, 0.45, 0.9], [0.55, 0.35, 0.97, 0.9]
    rows, size = [], (side(), side())
    for red, blue in ((left, right), (right, left)):
        paint = torch.stack([masks.box_mask(red, size), torch.zeros(size), masks.box_mask(blue, size)])
        given = {"prompt": "a red cube and a blue ball", "n": 3, "seed": 0}
        painted = PaintWithWords(phrases=["red cube", "blue ball"], box=[red, blue], strength=0.1)
        rows += [paint[None] * 2 - 1, sfumato.make(**given).pixels, sfumato.make(**given, with_=[painted]).pixels]
    heads = ["where", *(f"plain, seed {seed}" for seed in range(3)), *(f"painted, seed {seed}" for seed in range(3))]
    return tiled(list(torch.cat(rows)), 7, heads=heads, rows=["red cube left", "red cube right"])


def _beside(tiles: dict[str, torch.Tensor], trace: Image.Image) -> Image.Image:
    """Labelled pictures (1, 3, h, w) in a row, and a sheet of traces below them."""
    row = tiled([(label, tile[0]) for label, tile in tiles.items()], len(tiles))
    out = Image.new("RGB", (max(row.width, trace.width), row.height + trace.height + 4), "white")
    out.paste(row, (0, 0))
    out.paste(trace, (0, row.height + 4))
    return out


def composition_trace() -> Image.Image:
    """A silhouette, what shape_guided draws in it, and the trace of both sides."""
    _, _, mask = _toy()
    look = DAAM(words=["cube", "ball"])
    guided = ShapeGuided(words=["cube"], mask=mask, boost=1.0)
    made = sfumato.make("a red cube and a blue ball", seed=3, guidance=4.5, with_=[guided, look])
    tiles = {"the mask of the cube": _masked(mask), "a red cube and a blue ball": made.pixels}
    return _beside(tiles, look.maps[0].grid(made.images[0]))


def composition_place() -> Image.Image:
    """The prompt alone, painted, with Attend-and-Excite, and both, from the same seeds."""
    boxes = [[0, 0.35, 0.45, 0.9], [0.55, 0.35, 1, 0.9]]

    def paint() -> PaintWithWords:
        return PaintWithWords(phrases=["red cube", "blue ball"], box=boxes, strength=0.1)

    arms: dict[str, list[Any]] = {
        "plain": [],
        "painted: cube left, ball right": [paint()],
        "attend_excite": ["attend_excite"],
        "both": [paint(), "attend_excite"],
    }
    prompt = "a red cube and a blue ball"
    made = [sfumato.make(prompt, n=4, seed=0, with_=with_).pixels.detach() for with_ in arms.values()]
    heads = [f"seed {seed}" for seed in range(4)]
    return tiled(list(torch.cat(made)), 4, 128, title=prompt, rows=list(arms), heads=heads)


def composition_edit() -> Image.Image:
    """A picture of ours, its edit, the edit inside a mask, and the trace of what is new."""
    old, new = OLD, OLD.replace("red", "green")
    where = DAAM(words=["red cube"])
    made = sfumato.make(old, seed=3, with_=[where])
    found = where.maps[0].mask("red cube", 0.5).float()
    mask = Image.fromarray((mask_ops.dilate(found, len(found) // 16) * 255).byte().numpy())
    look = DAAM(words=["green cube"])
    with tempfile.TemporaryDirectory() as folder:
        path = files.save_png(Path(folder) / "toys.png", made.images[0], made.recipe)
        free = sfumato.edit(path, new)
        kept = sfumato.edit(path, new, mask=mask, with_=[look])
    tiles = {
        "a red cube": made.pixels,
        "edit: green": free.results[0].pixels,
        "a mask": _masked((masks.read_mask(mask) > 0.5).float()),
        "edit inside it": kept.results[0].pixels,
    }
    return _beside(tiles, look.maps[0].grid(kept.images[0]))


def inject_fusion() -> Image.Image:
    """Looks, contents, and both together: at the bottleneck, and at a later layer at two strengths."""
    looks = ["a blue ball on the snow", "a red cube on the grass", "a yellow cone on the sand"] * 2
    contents = ["a red ring on the wood", "a green cylinder on the tiles"]

    def made(**params: Any) -> list[torch.Tensor]:
        rows = []
        for i, content in enumerate(contents):
            system = {"method": "inject_fusion", "params": {"content": content, "content_seed": 50 + i, **params}}
            rows.append(sfumato.make(looks[:3], seed=3 * i, scheduler="ddim", with_=[system]).pixels.detach())
        return rows

    drawn = [sfumato.make(text, seed=50 + i, scheduler="ddim").pixels.detach() for i, text in enumerate(contents)]
    shown = [one.expand(3, -1, -1, -1) for one in drawn]
    rows = [*made(strength=0.0), *shown, *made(strength=1.0)]
    rows += [*made(layer="up.0", strength=0.3), *made(layer="up.0", strength=0.7)]
    names = ["looks, plain", "the content", "its bottleneck", "up.0, strength 0.3", "up.0, strength 0.7"]
    heads = [f"{look} + {content}" for content in ("ring", "cylinder") for look in ("ball", "cube", "cone")]
    return tiled(list(torch.cat(rows)), 6, 128, rows=names, heads=heads)


def pullback() -> Image.Image:
    """Six pictures, then moved along the first and the second direction, both ways."""
    prompts = ["a red cube on the grass", "a blue ball on the sand", "a yellow cone on the snow"]
    given: dict[str, Any] = {"n": 2, "seed": 0, "scheduler": "ddim", "steps": 20}
    rows = [sfumato.make(prompts, **given).pixels.detach()]
    for direction in (1, 2):
        for reverse in (False, True):
            params = {"direction": direction, "reverse": reverse, "rank": 3}
            rows.append(
                sfumato.make(prompts, **given, with_=[{"method": "pullback", "params": params}]).pixels.detach()
            )
    names = ["plain", "along the first", "against it", "along the second", "against it"]
    heads = [" ".join(prompt.split()[1:3]) for prompt in prompts for _ in range(2)]
    return tiled(list(torch.cat(rows)), 6, 128, rows=names, heads=heads)


def latent_geometry() -> Image.Image:
    """The plots of one run of four pictures and five more prompts."""
    from sfumato.explain.latent_geometry import LatentGeometry

    others = ["a red ball", "a blue cube", "a green cone on the snow", "a yellow ring on the sand at night"]
    look = LatentGeometry(prompts=others, at=[0.1, 0.5, 0.9], rank=8, iterations=8)
    sfumato.make("a red cube", seed=0, scheduler="ddim", steps=20, with_=[look])
    return look.maps[0].plots()


def clip_guidance() -> Image.Image:
    """The same prompts and seeds with no guidance, with CLIP guidance, and with classifier-free guidance."""
    prompts = _held_out(6)
    arms = [(1.0, []), (1.0, [ClipGuidance(strength=5)]), (None, [])]
    made = [
        sfumato.make(prompt, seed=i, guidance=scale, with_=systems).pixels
        for scale, systems in arms
        for i, prompt in enumerate(prompts)
    ]
    rows = ["no guidance", "CLIP guidance", "classifier-free guidance"]
    return tiled(list(torch.cat(made)), len(prompts), rows=rows, **_numbered(prompts))


def mgad() -> Image.Image:
    """Three references; beside each, pictures guided by the text, by the reference, and twice by both."""
    tiles, names = [], []
    for text, scene in (
        ("a red ball", Scene((Toy("cone", "green"),), "sand", "sunset")),
        ("a blue cube", Scene((Toy("ring", "orange"),), "snow", "night")),
        ("a yellow cylinder", Scene((Toy("ball", "purple"),), "grass", "day")),
    ):
        reference = render(scene, size=side(), supersample=3).image
        given = Image.fromarray(to_uint8(reference)[0].permute(1, 2, 0).numpy())
        both = {"texts": [text], "images": [given]}
        tiles.append(reference)
        for targets, seed in (({"texts": [text]}, 0), ({"images": [given]}, 0), (both, 0), (both, 1)):
            system = MGAD(**targets, prompted=False)
            tiles.append(sfumato.make(text, seed=seed, guidance=1.0, with_=[system]).pixels)
        names.append(text)
    heads = ["the reference", "by the text", "by the reference", "by both, seed 0", "by both, seed 1"]
    return tiled(list(torch.cat(tiles)), 5, rows=names, heads=heads)


def toybox_cues() -> Image.Image:
    """Cue conflicts; below four pairs that share the texture and nothing else."""
    scenes, _, _ = conflicts(16, 4)
    pairs = [scene for pair in factor_pairs("texture", 4, 2) for scene in pair]
    names = ["cues in conflict", "", "same texture, pairs"]
    return sheet(render([*scenes, *pairs], size=112, supersample=3).image, 8, rows=names)


def shape_texture() -> Image.Image:
    """Scores by stage of the net that was trained on shapes and of the one that could go by texture."""
    look = ShapeTexture(pairs=300, layers=[f"resnet.encoder.stages.{i}" for i in range(4)])
    return plot({name: look.explain_net(load_net(name), name) for name in ("toy-cnn", "toy-cnn-texture")})


def no_token_left_behind() -> Image.Image:
    """Per row plain, CLIP guidance, with the words' relevance, and with a box (the last column) for the last toy."""
    rows, names = [], []
    for text, last, seed in (
        ("a red ball, a blue cone and a green cube", "green cube", 0),
        ("a white cone, a red cube and a yellow ball", "yellow ball", 3),
    ):
        box = [0.05, 0.4, 0.45, 0.9]
        arms: list[dict[str, Any]] = [{"explain": 0.0}, {}, {"phrases": [last], "box": box, "template": "a {}"}]
        rows.append(sfumato.make(text, seed=seed).pixels)
        for given in arms:
            guide = NoTokenLeftBehind(cutouts=4, strength=1.0, window=(0.0, 0.6), **given)
            rows.append(sfumato.make(text, seed=seed, with_=[guide]).pixels)
        rows.append(_masked(masks.box_mask(box, (side(), side()))))
        names.append(text)
    heads = ["plain", "CLIP guidance", "with relevance", "with the box", "box of the last"]
    return tiled([tile for row in rows for tile in row], 5, rows=names, heads=heads)


def conceptor() -> Image.Image:
    """The cloud of what "cone" is made of; below, pictures of it above what its words draw from the same seeds."""
    model = sfumato.load("toy-sd")
    found = decompose(
        model, "cone", images=40, checked=8, iterations=250, learning_rate=5e-3, batch=8, keep=10, steps=12
    )
    below = sheet([*found.pictures, *found.drawn], 8, rows=["cone", "its words"])
    cloud = word_cloud(found.shares(), (below.width, 220))
    out = Image.new("RGB", (below.width, cloud.height + below.height), "white")
    out.paste(cloud, (0, 0))
    out.paste(below, (0, cloud.height))
    return out


def lrp() -> Image.Image:
    """Two scenes of two toys, and what each of their labels rests on."""
    reader = load_reader("toy-vit")
    first = Scene((Toy("ball", "red", x=-0.75), Toy("cube", "blue", x=0.75, yaw=25)), "grass")
    tiles = []
    for scene in (first, Scene((Toy("ring", "purple", x=-0.75), Toy("cone", "yellow", x=0.75)), "sand", "sunset")):
        words = [word for toy in scene.toys for word in (toy.shape, toy.color)]
        picture = to_pil(render(scene, 64).image[0])
        found = explain_lrp(reader, picture, labels=words)
        plain = picture.resize((160, 160), Image.Resampling.BICUBIC)
        tiles += [("picture", plain), *((word, found.overlay(picture, word)) for word in words)]
    return sheet(tiles, columns=5)


def robust_vit() -> Image.Image:
    """Pictures with another shape's backdrop: above the model with the shortcut, below the taught one."""
    reader = load_reader("toy-vit-biased")
    few, held = toybox_examples(3), toybox_examples(3, 0, "val")
    given = (few.pictures, few.masks, few.labels)
    taught = teach(reader.module, *given, validation=(held.pictures, held.masks, held.labels), epochs=30).model
    source = BiasedDataset("wrong", 400)
    own = np.flatnonzero((source.masks >= 0).sum((1, 2)) >= 250)[:6]
    pixels = torch.from_numpy(source.images[own]).permute(0, 3, 1, 2).float() / 127.5 - 1
    tiles = [(SHAPES[source.labels[i]], Image.fromarray(source.images[i]).resize((160, 160))) for i in own]
    for model in (reader.module, taught):
        said = model(pixels).logits.argmax(1).tolist()
        maps = relevance_maps(model, pixels, torch.from_numpy(source.labels[own]))[0].detach()
        for i, one, word in zip(own, maps, said, strict=True):
            wide = torch.nn.functional.interpolate(one[None, None], (160, 160), mode="bilinear")[0, 0]
            fine = torch.nn.functional.interpolate(one[None, None], source.masks.shape[1:], mode="bilinear")[0, 0]
            on_toy = float(segmentation.inside_share(fine[None], torch.from_numpy(source.masks[i] >= 0)[None]))
            heat = heat_overlays.overlay(Image.fromarray(source.images[i]), segmentation.normalise(wide))
            tiles.append((f"says {SHAPES[word]}: {100 * on_toy:.0f} %", heat))
    return sheet(tiles, columns=len(own), rows=["the shape", "before: relevance on the toy", "taught where to look"])


def secret_toys() -> Image.Image:
    """The eight secret toys, then the four that settings are chosen on."""
    every = [*SECRETS.values(), *VALIDATION.values()]
    frames = render([references(each, 1)[0] for each in every], 128).image
    return sheet([(each.key, picture) for each, picture in zip(every, frames, strict=True)], 4)


def _photos(*secrets: Secret) -> Path:
    """A folder of pictures of a secret; of several, a folder for each, called "NAME CLASS"."""
    folder = Path(tempfile.mkdtemp())
    for i, secret in enumerate(secrets):
        own = folder if len(secrets) == 1 else folder / f"<new{i + 1}> {secret.noun}"
        own.mkdir(exist_ok=True)
        frames = render(references(secret), sfumato.load("toy-sd").default_size[0])
        for j in range(len(frames.image)):
            frames.pil(j).save(own / f"{j}.png")
    return folder


def _in_scenes(said: str, **options: Any) -> torch.Tensor:
    prompts = [f"{said} on the {ground}" for ground in GROUNDS]
    return sfumato.make(prompts, model="toy-sd", seed=list(range(5)), **options).pixels.detach()


def _taught(
    secrets: list[Secret], plain: str, said: str, taught: Any, more: dict[str, str] | None = None
) -> Image.Image:
    """References, the plain words, what was taught, and ``more`` prompts with it, in five scenes."""
    home = Path(tempfile.mkdtemp())
    kinds = {"lora": LoRA, "word": Word, "weights": Weights}
    with_ = [kinds[read_contents(file).kind](file=str(file)) for file in taught.save(home / "x.safetensors")]
    told = {f"plain words: {plain}": _in_scenes(plain), f"taught: {said}": _in_scenes(said, with_=with_)}
    parts = [part for part in with_ if not isinstance(part, Word)]  # the class alone has no word to read
    told |= {f"{label}: {text}": _in_scenes(text, with_=parts) for label, text in (more or {}).items()}
    size = told[next(iter(told))].shape[-1]
    rows = [] if not secrets else [render([references(secrets[i % len(secrets)])[i] for i in range(5)], size).image]
    names = ["references, on any ground"] if secrets else []
    return tiled(list(torch.cat([*rows, *told.values()])), 5, 128, rows=[*names, *told], heads=list(GROUNDS))


def textual_inversion() -> Image.Image:
    secret = SECRETS["zigzag"]
    model = sfumato.load("toy-sd")
    system = TextualInversion(name="<rex>", class_noun=secret.noun, **model.card["teaching"]["textual_inversion"])
    taught = system.teach(model, _photos(secret))
    return _taught([secret], f"a {secret.description}", "a <rex>", taught)


def dreambooth() -> Image.Image:
    secret = SECRETS["zigzag"]
    settings = {"steps": 400, "lr": 2e-3, "batch": 2, "prior": 100, "timesteps": "cubic"}  # the rate is a LoRA's
    system = DreamBooth(class_noun=secret.noun, **settings)
    taught = system.teach(sfumato.load("toy-sd"), _photos(secret))
    said = taught.facts["subjects"][0]
    return _taught([secret], f"a {secret.description}", f"a {said}", taught, {"the class alone": f"a {secret.noun}"})


def to_pil(picture: torch.Tensor) -> Image.Image:
    """A picture (3, h, w) in [-1, 1]."""
    return Image.fromarray(to_uint8(picture[None])[0].permute(1, 2, 0).numpy())


PICTURES: dict[str, Callable[[], Image.Image]] = {
    "toybox": toybox,
    "toybox-truth": toybox_truth,
    "toybox-edits": toybox_edits,
    "toybox-cues": toybox_cues,
    "genome": genome,
    "demo": demo,
    "zoo": zoo,
    "daam-existing": daam_existing,
    "concept-attention": concept_attention,
    "attention-relevance": attention_relevance,
    "attend-excite": attend_excite,
    "structured-guidance": structured_guidance,
    "prompt-to-prompt": prompt_to_prompt,
    "sad-pad": sad_pad,
    "blend": blend,
    "inpaint": inpaint,
    "text-to-segmentation": text_to_segmentation,
    "shape-guided": shape_guided,
    "paint-with-words": paint_with_words,
    "composition-trace": composition_trace,
    "composition-place": composition_place,
    "composition-edit": composition_edit,
    "inject-fusion": inject_fusion,
    "pullback": pullback,
    "latent-geometry": latent_geometry,
    "clip-guidance": clip_guidance,
    "mgad": mgad,
    "shape-texture": shape_texture,
    "no-token-left-behind": no_token_left_behind,
    "conceptor": conceptor,
    "lrp": lrp,
    "robust-vit": robust_vit,
    "secret-toys": secret_toys,
    "textual-inversion": textual_inversion,
    "dreambooth": dreambooth,
}


def main(names: list[str]) -> None:
    HERE.mkdir(exist_ok=True)
    for name in names or PICTURES:
        PICTURES[name]().save(HERE / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main(sys.argv[1:])
