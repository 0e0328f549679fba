"""toy-sd-inpaint: GLIDE's inpainting fine-tune (Nichol et al. 2021, section 3.2) of a latent diffusion model.

The U-Net gets five more input channels, the mask and the latents of the picture with the region erased, whose weights
start at zero: before the first step it is the model that it starts from. It is trained on with random regions erased
and every fifth prompt empty. Two answers to what users of inpainting models complain about: holes have the shape of
things, and of things elsewhere, so that neither shape nor place of a hole says what belongs into it; and half of the
captions tell only what lies in the hole, so that the prompt is worth listening to.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionInpaintPipeline
from PIL.Image import Image
from pydantic import AliasChoices, Field
from torch import Tensor, nn

from sfumato import mask_ops, registry, sheets
from sfumato.arrays import to_tensor
from sfumato.models import Condition, Model
from sfumato.models.hole import hole_of
from sfumato.sampling import Intervention, generate
from sfumato.sampling.run import Run
from sfumato.toybox import COLORS, Scene, ToyboxDataset
from sfumato.toybox import caption as describe
from sfumato.toybox.oracle.presence import RequestedToy, find, requested_toys
from sfumato.toybox.oracle.toy_judge import load_judge
from sfumato.training import data
from sfumato.training.draw import Draw
from sfumato.training.recipe import Section
from sfumato.zoo.objectives.diffusion import DiffusionLoss, DiffusionObjective

PLAIN = """\
import torch
from diffusers import StableDiffusionInpaintPipeline

# once, for a built-in model: sfumato models $name --export $name
pipe = StableDiffusionInpaintPipeline.from_pretrained("$name", torch_dtype=torch.float32)
prompt, photo, mask = "a blue ball", torch.zeros(1, 3, $side, $side), torch.ones(1, 1, $side, $side)  # 1: draw anew
with torch.no_grad():  # pipe(...) itself knows U-Nets of 9 input channels only
    words, none = pipe.encode_prompt(prompt, "cpu", 1, True)
    known = pipe.vae.encode(photo * (1 - mask)).latent_dist.mean * pipe.vae.config.scaling_factor
    hole = torch.cat([torch.nn.functional.adaptive_max_pool2d(mask, known.shape[-2:]), known], 1)
    pipe.scheduler.set_timesteps($steps)
    x = torch.randn_like(known)
    for t in pipe.scheduler.timesteps:
        both = pipe.unet(torch.cat([x, hole], 1).repeat(2, 1, 1, 1), t, torch.cat([none, words])).sample
        x = pipe.scheduler.step(torch.lerp(*both.chunk(2), $guidance), t, x).prev_sample
    picture = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample.clamp(-1, 1)"""
INSIDE = 0.3  # a toy is named when so much of it lies in the hole
VISIBLE = 100 / 64**2  # of the picture: toys that show less are not asked for


class InpaintLoss(DiffusionLoss):
    """The ``[loss]`` section."""

    empty: float = Field(0.2, ge=0, le=1, description="share of empty prompts, for classifier-free guidance")
    hole_weight: float = Field(3.0, gt=0, description="weight of latents in the hole beside those outside")
    rectangle: float = Field(0.3, ge=0, description="how often the hole is a rectangle anywhere")
    toy: float = Field(0.35, ge=0, description="how often it is a toy of the picture: its silhouette or box, grown")
    stranger: float = Field(0.25, ge=0, description="how often it has the shape and place of a toy of another picture")
    all: float = Field(0.1, ge=0, description="how often it is the whole picture")
    background: float = Field(0.0, ge=0, description="how often it is a rectangle in which no toy lies")
    coverage: float = Field(
        0.5, gt=0, le=1, description="share of a latent's pixels in the hole from which on the latent is drawn anew"
    )
    hole_captions: float = Field(
        0.5, ge=0, le=1, description="share of captions that name only what lies in the hole",
        validation_alias=AliasChoices("hole_captions", "told"),  # older recipes: told
    )  # fmt: skip
    grow: int = Field(4, ge=0, description="most pixels by which holes of the shape of toys are grown")


class Known(Intervention):
    """Shows the denoiser ``pictures`` (b, 3, H, W) around their ``holes`` (b, 1, H, W)."""

    role = "conditioner"

    def __init__(self, pictures: Tensor, holes: Tensor, coverage: float):
        self.pictures, self.holes, self.least = pictures, holes, coverage

    def on_condition(self, run: Run, condition: Condition) -> Condition:
        pictures, holes = self.pictures[run.samples], self.holes[run.samples]
        share = mask_ops.on_grid(holes[:, 0], run.grid, self.least)[:, None]
        self.mark()
        return condition.with_rows(hole=hole_of(run.model, pictures, holes, share))


class InpaintObjective(DiffusionObjective):
    """Denoising of pictures whose surroundings are known."""

    NAME = "inpaint"
    plain: ClassVar[str] = PLAIN
    Loss: ClassVar[type[Section]] = InpaintLoss

    def build(self) -> dict[str, nn.Module]:
        parts = super().build()
        widen(self.unet)
        return parts

    def take(self, weights: dict[str, Tensor]) -> None:
        first = weights["conv_in.weight"]
        more = self.unet.conv_in.in_channels - first.shape[1]  # none when it goes on from an inpainting model
        super().take({**weights, "conv_in.weight": F.pad(first, (0, 0, 0, 0, 0, more))})

    def draw_latents(
        self, source: ToyboxDataset, latents: np.ndarray, indices: Tensor, draw: Draw
    ) -> dict[str, Tensor]:
        """The batch of a diffusion model with ``hole`` (b, 1, h, w) on the grid of the latents and ``erased``
        (b, 3, H, W), the pictures with the hole in grey."""
        batch = super().draw_latents(source, latents, indices, draw)
        hole = self.holes(source, indices, draw)
        grid = mask_ops.on_grid(hole, batch["x0"].shape[-2:], self.loss_options.coverage)[:, None]
        erased = data.pictures(source, indices) * (1 - hole[:, None])
        return {**batch, "hole": grid, "erased": erased}

    def place_weights(self, batch: dict[str, Tensor], signal: Tensor) -> Tensor:
        weight = super().place_weights(batch, signal) * (1 + (self.loss_options.hole_weight - 1) * batch["hole"])
        return weight / weight.mean()

    def network_input(self, noisy: Tensor, batch: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            known = self.vae.encode(batch["erased"]).latent_dist.mean * self.vae.config.scaling_factor
        return torch.cat([noisy, batch["hole"], known.to(noisy.dtype)], 1)

    def captions(self, source: ToyboxDataset, indices: Tensor, draw: Draw) -> list[str]:
        """Captions of the whole scene, or only of what lies in the hole."""
        holes = self.holes(source, indices, draw)
        only = torch.rand(len(indices), generator=draw.generator("told")) < self.loss_options.hole_captions
        texts = []
        for i, hole, short in zip(indices.tolist(), holes.numpy(), only.tolist(), strict=True):
            scene = source.scenes[i]
            rng = np.random.default_rng(draw.number("caption", i))
            told = inside(scene, source.masks[i], hole) if short else scene
            texts.append(describe(told, rng, "random", self.loss_options.colorless).text)
        return texts

    def holes(self, source: ToyboxDataset, indices: Tensor, draw: Draw) -> Tensor:
        """Random holes (b, H, W) of 0 and 1, a pure function of the draw."""
        o: InpaintLoss = self.loss_options
        rng = np.random.default_rng(draw.number("holes"))
        shares = np.array([o.rectangle, o.toy, o.stranger, o.all, o.background])
        kinds = rng.choice(5, size=len(indices), p=shares / shares.sum())
        toys = source.masks[indices.numpy()]
        holes = []
        for i, kind in enumerate(kinds.tolist()):
            whose = toys[i] if kind == 1 else toys[(i + 1) % len(toys)]
            if kind in (1, 2) and (whose >= 0).any():
                holes.append(toy_hole(whose, o.grow, rng))
            elif kind == 4:
                holes.append(empty_hole(toys[i] >= 0, rng))
            else:
                holes.append(torch.ones(whose.shape) if kind == 3 else rectangle(whose.shape, rng))
        return torch.stack(holes)

    # -- measuring -----------------------------------------------------------------------------------------------------

    def pipeline(self) -> StableDiffusionInpaintPipeline:
        own = super().pipeline().components
        return StableDiffusionInpaintPipeline(**own, requires_safety_checker=False)

    def sample(self, prompts: list[str], seed: int = 0) -> Tensor:
        """Pictures from prompts alone: everything is the hole."""
        side = self.recipe.data.size
        grey, hole = torch.zeros(len(prompts), 3, side, side), torch.ones(len(prompts), 1, side, side)
        return self.fill(grey, hole, prompts, seed)

    def fill(self, pictures: Tensor, holes: Tensor, prompts: list[str], seed: int = 0) -> Tensor:
        """``pictures`` (b, 3, H, W) in [-1, 1] with ``holes`` (b, 1, H, W) redrawn, and nothing put back outside."""
        model = Model(self.pipeline(), card={"sampling": self.sampling})
        known = Known(pictures, holes, self.loss_options.coverage)
        drawn = generate(model, prompts, seed=[seed + i for i in range(len(prompts))], interventions=known).pixels
        assert drawn is not None
        return drawn.cpu()

    def measure(self, n: int = 100) -> dict[str, float]:
        """Beside the loss: how often a toy asked for in another's place is there, by the toy-judge, on ``n`` unseen
        scenes; nothing is added when there is no toy-judge."""
        quality = self.evaluate()
        self.look_inside()
        if registry.find("toy-judge") is None:
            return quality
        cases = recolourings(self.val_data, n)
        judge, hits = load_judge(), []
        for start in range(0, len(cases), 25):
            part = cases[start : start + 25]
            pictures = data.pictures(self.val_data, torch.tensor([case[0] for case in part]))
            holes = torch.stack([case[1] for case in part])[:, None]
            filled = self.fill(pictures, holes, [case[2] for case in part], seed=start).clamp(-1, 1)
            read = judge.read(torch.where(holes > 0, filled, pictures))
            hits += [find(reading, case[3]) is not None for reading, case in zip(read, part, strict=True)]
        return {**quality, "toy_in_hole_right": float(np.mean(hits))}

    def grid(self) -> Image:
        """Held-out pictures with a toy erased, above what is drawn for a caption with another colour."""
        cases = recolourings(self.val_data, 8)
        pictures = data.pictures(self.val_data, torch.tensor([case[0] for case in cases]))
        holes = torch.stack([case[1] for case in cases])[:, None]
        filled = self.fill(pictures, holes, [case[2] for case in cases])
        return sheets.sheet(torch.cat([pictures, pictures * (1 - holes), filled]), 8, scale=2, gap=0)

    def export(self, folder: Any) -> dict[str, Any]:
        return {**super().export(folder), "pipeline": "StableDiffusionInpaintPipeline"}


def widen(unet: Any) -> None:
    """Gives a U-Net the input channels of an inpainting model, with weights of zero."""
    old = unet.conv_in
    c = old.in_channels
    new = nn.Conv2d(2 * c + 1, old.out_channels, old.kernel_size, old.stride, old.padding)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, :c] = old.weight
        new.bias.copy_(old.bias)
    unet.conv_in = new
    unet.register_to_config(in_channels=2 * c + 1)


def rectangle(shape: tuple[int, int], rng: np.random.Generator) -> Tensor:
    """A hole (H, W): a rectangle with sides of a fifth to three quarters of the picture's."""
    hole = torch.zeros(shape)
    h, w = (int(rng.integers(side // 5, 3 * side // 4 + 1)) for side in shape)
    y, x = int(rng.integers(shape[0] - h + 1)), int(rng.integers(shape[1] - w + 1))
    hole[y : y + h, x : x + w] = 1
    return hole


def empty_hole(toys: np.ndarray, rng: np.random.Generator, tries: int = 8) -> Tensor:
    """A hole (H, W) in which no toy of the mask (H, W; bool) lies: a rectangle, after ``tries`` without the toys."""
    for _ in range(tries):
        hole = rectangle(toys.shape, rng)
        if not (hole.numpy() * toys).any():
            break
    return hole * to_tensor(~toys)


def toy_hole(toys: np.ndarray, grow: int, rng: np.random.Generator) -> Tensor:
    """A hole (H, W): one of the toys in an integer mask (H, W; -1 is none), its silhouette or its box, grown."""
    which = rng.choice(np.unique(toys[toys >= 0]))
    hole = to_tensor((toys == which).astype(np.float32))
    if rng.random() < 0.5:
        rows, columns = hole.amax(1).nonzero()[:, 0], hole.amax(0).nonzero()[:, 0]
        hole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = 1
    return mask_ops.dilate(hole, int(rng.integers(1, grow + 1)) if grow else 0)


def inside(scene: Scene, toys: np.ndarray, hole: np.ndarray) -> Scene:
    """The scene with only those toys that lie in the hole, by :data:`INSIDE`."""
    masks_of_toys = [(toys == i) for i in range(len(scene.toys))]
    toys_inside = [
        toy
        for toy, mask in zip(scene.toys, masks_of_toys, strict=True)
        if (hole * mask).sum() > INSIDE * max(mask.sum(), 1)
    ]
    return scene.replace(toys=tuple(toys_inside))


def recolourings(source: ToyboxDataset, n: int) -> list[tuple[int, Tensor, str, RequestedToy]]:
    """Up to ``n`` times: a picture's index, the box (H, W) of its first toy, the caption with another colour for that
    toy, and what the judge should find."""
    found: list[tuple[int, Tensor, str, RequestedToy]] = []
    for i, scene in enumerate(source.scenes):
        if len(found) == n:
            break
        if not scene.toys or (source.masks[i] == 0).mean() < VISIBLE:
            continue
        color = COLORS[(COLORS.index(scene.toys[0].color) + 1 + i % 6) % len(COLORS)]
        other = scene.replace(0, color=color)
        if (scene.toys[0].shape, color) in {(toy.shape, toy.color) for toy in scene.toys}:
            continue
        caption = describe(other, None, "plain")
        rows, columns = np.nonzero(source.masks[i] == 0)
        hole = torch.zeros(source.masks[i].shape)
        rim = len(hole) // 32
        hole[max(rows.min() - rim, 0) : rows.max() + rim + 1, max(columns.min() - rim, 0) : columns.max() + rim + 1] = 1
        request = next(w for w in requested_toys(caption) if (w.shape, w.color) == (other.toys[0].shape, color))
        found.append((i, hole, caption.text, request))
    return found
