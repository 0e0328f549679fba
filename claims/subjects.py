"""Secret toys for the claims of what teaches: their pictures, and how a drawn one is read and scored.

Three readers, none of which has a part in the teaching: the toy-judge (shape, ground, masks), the hue inside its mask,
and an *identity reader* - a ridge classifier over a close view of the toy, fitted on renders of all secrets and of the
plain toys nearest to them. Its accuracy on renders it has not seen is printed with every row.

Settings are chosen on other secrets than those reported (:func:`chosen`), and the pictures that are taught stand on
three of the five grounds, so that two are left that a word was never taught with.
"""

from __future__ import annotations

import colorsys
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from claims import children, common
from claims.core import Context
from sfumato.metrics import stats
from sfumato.protocol import Work
from sfumato.toybox import GROUNDS, SECRETS, VALIDATION, Secret, Toy, references, render

SIDE = 64
REPORT, TUNE, FIT, HELD_OUT = 8100, 8200, 41, 42
TAUGHT, UNSEEN = GROUNDS[:3], GROUNDS[3:]
T = TypeVar("T")
PROMPTS = ("a {}", *(f"a {{}} on the {ground}" for ground in GROUNDS))


def secrets(context: Context, kinds: str = "AB", quick: int = 1) -> list[Secret]:
    """The secret toys of some kinds, fewer of each kind in a quick run."""
    found = [each for each in SECRETS.values() if each.kind in kinds]
    if not context.quick:
        return found
    return [each for kind in kinds for each in [s for s in found if s.kind == kind][:quick]]


def validation(context: Context, kinds: str = "AB") -> list[Secret]:
    """The secrets that settings are chosen on, two of each kind; one in a quick run."""
    found = [each for each in VALIDATION.values() if each.kind in kinds]
    return found[: context.count(len(found), 1)]


def folder_of(context: Context, secret: Secret, n: int = 5, side: int = SIDE) -> Path:
    """A folder with ``n`` renders of a secret on the grounds that are taught, once per run."""

    def made() -> Path:
        folder = Path(tempfile.mkdtemp(prefix=f"secret-{secret.key}-"))
        frames = render(references(secret, n, among=TAUGHT), side)
        for i in range(n):
            frames.pil(i).save(folder / f"{i}.png")
        return folder

    return context.once(f"secret {secret.key} {n} {side}", made)


@contextmanager
def at_work(context: Context, model: Any, noun: str) -> Iterator[Work]:
    """A folder to teach in, which has the pictures of a class where the model has drawn them before."""
    home = context.home(children.__file__, (model.name,))
    home = home or context.once("priors", lambda: Path(tempfile.mkdtemp(prefix="priors-")))
    known = home / "priors" / f"{model.name} {noun}"
    with tempfile.TemporaryDirectory(prefix="teaching-") as folder:
        for each in known.glob("*"):
            shutil.copy(each, folder)
        yield Work(Path(folder))
        known.mkdir(parents=True, exist_ok=True)
        for each in Path(folder).glob("prior*.safetensors"):
            shutil.move(each, known / each.name)


def asked(noun: str, n: int) -> list[str]:
    """``n`` prompts with ``noun`` in them, each ground in turn."""
    return [PROMPTS[i % len(PROMPTS)].format(noun) for i in range(n)]


@dataclass(frozen=True)
class Read:
    """What is seen in one picture: whether a toy of the shape is there, whether it is the secret, its hue's error in
    degrees (nan without a toy), and whether the ground is the one asked for (None where none was)."""

    shape: bool
    identity: bool
    hue: float
    ground: bool | None


class Reader:
    """Reads pictures of the secrets in ``among``."""

    def __init__(self, context: Context, among: Mapping[str, Secret] = SECRETS):
        self.judge, self.among = common.judge_of(context), among
        fitted, names = self._renders(FIT, 24 if not context.quick else 5)
        unseen, truth = self._renders(HELD_OUT, 8 if not context.quick else 2)
        classes = sorted(set(names))
        x, y = fitted, F.one_hot(torch.tensor([classes.index(n) for n in names])).double()
        self.mean, self.std = x.mean(0), x.std(0).clamp_min(1e-6)
        x = self._scaled(x)
        # ridge in its dual form: fewer pictures than features
        self.weights = x.T @ torch.linalg.solve(x @ x.T + 10.0 * torch.eye(len(x), dtype=x.dtype), y)
        self.classes = classes
        said = [classes[i] for i in (self._scaled(unseen) @ self.weights).argmax(1).tolist()]
        self.accuracy = float(np.mean([a == b for a, b in zip(said, truth, strict=True)]))
        self.n = len(truth)

    @property
    def leans(self) -> str:
        """The reader's accuracy, in words."""
        return f"identity reader {100 * self.accuracy:.1f} % of {self.n} unseen renders, {len(self.classes)} classes"

    def _scaled(self, x: Tensor) -> Tensor:
        scaled = (x - self.mean) / self.std
        return torch.cat([scaled, torch.ones(len(x), 1, dtype=x.dtype)], 1)

    def _renders(self, seed: int, n: int) -> tuple[Tensor, list[str]]:
        """Features of renders of every secret and of the plain toy that is nearest to it, with their names."""
        scenes, names = [], []
        for key, secret in self.among.items():
            posed = references(secret, n, seed)
            scenes += posed
            names += [key] * n
            for scene in posed:
                toy = scene.toys[0]
                plain = Toy(toy.shape, secret.near, toy.pattern, "large", toy.x, toy.z, toy.yaw, toy.gloss)
                scenes.append(type(scene)((plain,), scene.ground, scene.sky, scene.camera, scene.light))
                names.append(f"plain {key}")
        frames = render(scenes, SIDE)
        return torch.stack([self._features(i, m >= 0) for i, m in zip(frames.image, frames.mask, strict=True)]), names

    @torch.no_grad()
    def _features(self, picture: Tensor, mask: Tensor) -> Tensor:
        """The toy at 24 x 24 pixels around its mask, and its colours: (d) float64."""
        ys, xs = mask.nonzero(as_tuple=True)
        if not len(ys):
            return torch.zeros(24 * 24 * 3 + 6, dtype=torch.double)
        top, bottom, left, right = int(ys.min()), int(ys.max()) + 1, int(xs.min()), int(xs.max()) + 1
        cut = torch.where(mask, picture, torch.zeros(()))[:, top:bottom, left:right]
        small = F.interpolate(cut[None], (24, 24), mode="bilinear", antialias=True)[0]
        inside = picture[:, mask]
        return torch.cat([small.flatten(), inside.mean(1), inside.std(1, correction=0)]).double()

    def read(self, secret: Secret, pictures: Tensor, prompts: Sequence[str]) -> list[Read]:
        """Pictures (n 3 H W) in [-1, 1] at any size, brought to the judge's."""
        pictures, out = self.sized(pictures), []
        for picture, reading, prompt in zip(pictures, self.judge.read(pictures), prompts, strict=True):
            toys = [toy for toy in reading.objects if toy.shape == secret.noun] or list(reading.objects)
            ground = next((g for g in GROUNDS if f"the {g}" in prompt), None)
            right = None if ground is None else reading.ground == ground
            if not toys:
                out.append(Read(False, False, float("nan"), right))
                continue
            toy = toys[0]
            said = self.said(picture, toy.mask)
            out.append(
                Read(toy.shape == secret.noun, said == secret.key, self.hue_error(secret, picture, toy.mask), right)
            )
        return out

    def sized(self, pictures: Tensor) -> Tensor:
        """Pictures (n 3 H W) at the judge's size."""
        if pictures.shape[-1] == SIDE:
            return pictures
        return F.interpolate(pictures, (SIDE, SIDE), mode="bilinear", antialias=True)

    def said(self, picture: Tensor, mask: Tensor) -> str:
        """What the toy inside a mask is taken for: a secret's key, or "plain KEY"."""
        return self.classes[int((self._scaled(self._features(picture, mask)[None]) @ self.weights).argmax())]

    def hue_error(self, secret: Secret, picture: Tensor, mask: Tensor) -> float:
        """Degrees between the hue inside a mask and the secret's own, from 0 to 180."""
        r, g, b = ((picture[:, mask].mean(1) + 1) / 2).clamp(0, 1).tolist()
        hue = 360 * colorsys.rgb_to_hsv(r, g, b)[0]
        own = 360 * colorsys.rgb_to_hsv(*secret.toy.rgb)[0]
        return min(abs(hue - own), 360 - abs(hue - own))


def reader_of(context: Context, secret: Secret | None = None) -> Reader:
    """The readers, fitted once per run; of a validation secret, one for these."""
    if secret is not None and secret.key in VALIDATION:
        return context.once("validation reader", lambda: Reader(context, VALIDATION))
    return context.once("identity reader", lambda: Reader(context))


@dataclass(frozen=True, eq=False)
class Arm:
    """What one way of asking gave for one secret."""

    name: str
    secret: Secret
    pictures: Tensor
    reads: list[Read]
    prompts: Sequence[str] = ()

    @cached_property
    def identity(self) -> float:
        """Share of pictures recognised as the secret."""
        return float(np.mean([each.identity for each in self.reads]))

    @cached_property
    def hue(self) -> float:
        """Median error in degrees; half a turn where no toy was drawn."""
        return float(np.median([each.hue if each.hue == each.hue else 180.0 for each in self.reads]))

    @cached_property
    def ground(self) -> float:
        """Share of pictures on the ground that was asked for."""
        return share([each.ground for each in self.reads])

    @cached_property
    def unseen(self) -> float:
        """The same, of the grounds that the secret was never taught on."""
        found = zip(self.reads, self.prompts, strict=True)
        return share([each.ground for each, prompt in found if any(f"the {g}" in prompt for g in UNSEEN)])


def share(found: Iterable[bool | None]) -> float:
    """Of those that are known; nan where none is."""
    known = [each for each in found if each is not None]
    return float(np.mean(known)) if known else float("nan")


def drawn(context: Context, name: str, model: Any, secret: Secret, noun: str, n: int) -> Arm:
    """Pictures of ``noun`` on every ground, from seeds that are the same in every arm."""
    return seen(context, name, secret, noun, pictured(context, name, model, secret, noun, n))


def pictured(context: Context, name: str, model: Any, secret: Secret, noun: str, n: int) -> Tensor:
    """The pictures (n 3 h w) alone."""
    seed = TUNE if secret.key in VALIDATION else REPORT
    return common.generate(context, model, asked(noun, n), seed, f"{name}, {secret.key}", **quickly(context))


def kept(context: Context, name: str, model: Any, secret: Secret, noun: str, n: int) -> Arm:
    """:func:`drawn`, by an interrupted run of the experiment or now. ``name`` tells its words and weights apart."""
    what = (f"{secret.key}, {name}", model.name, noun, n)
    return seen(
        context, name, secret, noun, context.kept(what, partial(pictured, context, name, model, secret, noun, n))
    )


def seen(context: Context, name: str, secret: Secret, noun: str, pictures: Tensor) -> Arm:
    """What is read in pictures of ``noun``."""
    texts = asked(noun, len(pictures))
    return Arm(name, secret, pictures, reader_of(context, secret).read(secret, pictures, texts), texts)


def chosen(
    context: Context, label: str, settings: Sequence[T], score: Callable[[T], float], by: str = "",
    models: Sequence[str] = (),
) -> T:  # fmt: skip
    """The setting with the highest score on the validation secrets, the first of equals; once per run. ``by``,
    ``models``: as in :meth:`~claims.core.Context.kept`."""

    def made() -> T:
        scores = [context.kept((f"{label} {each}",), lambda each=each: score(each), by, models) for each in settings]
        summary = ", ".join(f"{each}: {value:.2f}" for each, value in zip(settings, scores, strict=True))
        context.report(f"  {label}: {summary}")
        return settings[int(np.argmax(scores))]

    return context.once(f"chosen {label}", made)


def worth(arms: Sequence[Arm]) -> float:
    """What settings are chosen by: how often the secret is recognised and how often the ground is obeyed, together."""
    return float(np.mean([each.identity + each.ground for each in arms]))


def scenes(arms: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> Image.Image:
    """For the first secret of each kind a row for each of the arms ``names`` (name: what the picture says), the prompts
    of :data:`PROMPTS` as columns. Renders, which are asked for nothing, stand on any ground."""
    firsts = {arms_of[next(iter(names))].secret.kind: arms_of for arms_of in reversed(arms)}
    side = max(found[name].pictures.shape[-1] for found in firsts.values() for name in names)
    rows, labels = [], []
    for _, found in sorted(firsts.items()):
        for name, says in names.items():
            arm = found[name]
            rows.append(list(F.interpolate(arm.pictures[: len(PROMPTS)], (side, side))))
            labels.append(f"{arm.secret.key} {arm.secret.noun}: {says}")
    return common.sheet(rows, names=labels, heads=[prompt.format("...") for prompt in PROMPTS])


def median(values: Sequence[float]) -> stats.Interval:
    """Median over toys, resampled by toy."""
    return stats.bootstrap(values, statistic=lambda x: np.median(x, -1))


def of_medians(first: Sequence[float], second: Sequence[float]) -> stats.Interval:
    """Ratio of two medians over the same toys, resampled by toy."""
    return stats.bootstrap(
        first, second, paired=True, statistic=lambda a, b: np.median(a, -1) / np.maximum(np.median(b, -1), 1e-9)
    )


def average(values: Sequence[float]) -> stats.Interval:
    """Mean over toys, resampled by toy."""
    return stats.bootstrap(values)


def against(first: Sequence[float], second: Sequence[float]) -> stats.Interval:
    """Ratio of two means over the same toys, resampled by toy."""
    return stats.ratio(first, second, paired=True)


def quickly(context: Context) -> dict[str, Any]:
    """Fewer denoising steps in a quick run, which shows that everything runs and proves nothing."""
    return {"steps": 3} if context.quick else {}


def ceiling(context: Context, secret: Secret, n: int) -> Arm:
    """Renders of the secret, read in the same way."""
    scenes = references(secret, n, REPORT)
    pictures = render(scenes, SIDE).image
    texts = [f"on the {scene.ground}" for scene in scenes]
    return Arm("renders", secret, pictures, reader_of(context, secret).read(secret, pictures, texts), texts)


def gap(arm: Arm, floors: Sequence[Arm], top: Arm) -> float:
    """Which share of the gap in identity between the best of the plain prompts and renders an arm closes."""
    return closed(arm.identity, max(each.identity for each in floors), top.identity)


def closed(score: float, floor: float, top: float) -> float:
    """Which share of the gap between floor and ceiling is closed; nan where there is none."""
    return (score - floor) / (top - floor) if top - floor > 1e-6 else float("nan")
