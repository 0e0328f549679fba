"""toy-clip: a small ``transformers.CLIPModel`` trained on toybox pictures and captions (Radford et al. 2021).

Pictures and captions of a batch must find each other; beside the captions of the other pictures every picture also sees
*hard negatives*, captions of its own scene with one thing changed (another colour, shape or pattern of one toy, or the
colours of two toys swapped), so that the text tower learns which adjective belongs to which noun (Yuksekgonul et al.
2022). An auxiliary loss keeps the picture tower from resting on colours alone, which tell most scenes of a batch apart:
the patches of a picture must tell which toy they show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from sfumato.toybox import COLORS, PATTERNS, SHAPES, Scene, ToyboxDataset, sample_scene
from sfumato.toybox import caption as describe
from sfumato.training import data
from sfumato.training.draw import Draw
from sfumato.training.objective import Objective
from sfumato.training.recipe import Section
from sfumato.zoo.objectives import labels
from sfumato.zoo.objectives.contrastive import contrastive
from sfumato.zoo.tokenizer import build_tokenizer


class CLIPModelOptions(Section):
    """The ``[model]`` section."""

    text_width: int = 128
    text_layers: int = 4
    text_heads: int = 4
    vision_width: int = 128
    vision_layers: int = 5
    vision_heads: int = 4
    patch: int = 8
    projection: int = 128
    length: int = Field(32, description="text tokens")


KINDS = ("swap", "swap_shape", "swap_pattern", "color", "shape", "pattern")
EXCHANGES = {"swap": 0.8, "swap_pattern": 0.2}
CHANGES = {"swap": 0.3, "color": 0.2, "shape": 0.3, "pattern": 0.2}


class CLIPLoss(Section):
    """The ``[loss]`` section."""

    negatives: int = Field(2, ge=0, description="hard negative captions per picture")
    hard: float = Field(0.0, ge=0, description="weight of the contrast with one's own hard negatives alone")
    changes: dict[str, float] = Field(
        CHANGES, description="what a hard negative changes, each with its share: " + ", ".join(KINDS)
    )
    paraphrases: float = Field(
        0.0,
        ge=0,
        description="weight of a contrast between two captions of one scene, without its picture: the second must find"
        " the first among those of all scenes and among the same with attributes exchanged between toys",
    )
    tellings: int = Field(32, ge=1, description="scenes a step that get two captions for it")
    text_first: int = Field(0, ge=0, description="steps at the start with the paraphrases alone")
    mirror: float = Field(0.0, ge=0, le=1, description="share of the pictures shown with left and right exchanged")
    places: float = Field(0.0, ge=0, description="weight of reading what lies where off the picture's patches")

    @field_validator("changes")
    @classmethod
    def _known(cls, given: dict[str, float]) -> dict[str, float]:
        if not given or not set(given) <= set(KINDS) or min(given.values()) < 0 or abs(sum(given.values()) - 1) > 1e-6:
            raise ValueError(f"shares of {', '.join(KINDS)} that add to 1 are wanted")
        return given


def hard_negative(scene: Scene, rng: np.random.Generator, changes: Mapping[str, float] = CHANGES) -> Scene:
    """A scene that differs in one thing, drawn with the shares ``changes``: the colours, shapes or patterns of two toys
    swapped, or a colour, shape or pattern replaced (also where there are no two toys to swap)."""
    toys = scene.toys
    i = int(rng.integers(len(toys)))
    kind = str(rng.choice(tuple(changes), p=tuple(changes.values())))
    field = {"shape": "shape", "pattern": "pattern"}.get(kind.removeprefix("swap_"), "color")
    old = getattr(toys[i], field)
    others = [k for k, toy in enumerate(toys) if getattr(toy, field) != old]
    if kind.startswith("swap") and others:
        j = int(rng.choice(others))
        return scene.replace(i, **{field: getattr(toys[j], field)}).replace(j, **{field: old})
    words = {"shape": SHAPES, "pattern": PATTERNS}.get(field, COLORS)
    return scene.replace(i, **{field: str(rng.choice([word for word in words if word != old]))})


def mirrored(scene: Scene) -> Scene:
    """The scene with left and right exchanged: what its picture shows when it is flipped."""
    toys = [replace(toy, x=-toy.x, yaw=-toy.yaw) for toy in scene.toys]
    camera, light = (replace(each, azimuth=-each.azimuth) for each in (scene.camera, scene.light))
    return scene.replace(toys=tuple(toys), camera=camera, light=light)


def different_negatives(
    text: str,
    scene: Scene,
    n: int,
    rng: np.random.Generator,
    say: Callable[[Scene], str],
    tries: int = 8,
    changes: Mapping[str, float] = CHANGES,
) -> list[str]:
    """Captions of ``n`` changed scenes in the words and order of ``text``; one that reads like it is drawn again.

    A change that the style does not express leaves the caption equal; after ``tries`` it stays so and must be masked by
    the caller.
    """
    out = []
    for _ in range(n):
        for _ in range(tries):
            caption = say(hard_negative(scene, rng, changes))
            if caption != text:
                break
        out.append(caption)
    return out


def captions_with_negatives(
    source: ToyboxDataset,
    indices: Tensor,
    draw: Draw,
    n: int,
    changes: Mapping[str, float] = CHANGES,
    flipped: Sequence[bool] = (),
) -> list[str]:
    """A caption of each scene, then the ``n`` hard negatives of the first, of the second ...; ``flipped`` says which
    scenes are described with left and right exchanged."""
    own, negatives = [], []
    for row, i in enumerate(indices.tolist()):
        seed = draw.number("caption", i)

        def say(scene: Scene, seed: int = seed) -> str:  # the same draw gives the same style and order
            return describe(scene, np.random.default_rng(seed), "random").text

        scene = mirrored(source.scenes[i]) if flipped and flipped[row] else source.scenes[i]
        own.append(say(scene))
        rng = np.random.default_rng(draw.number("negative", i))
        negatives += different_negatives(own[-1], scene, n, rng, say, changes=changes)
    return own + negatives


def retold(n: int, draw: Draw) -> tuple[list[str], list[str], list[str]]:
    """For ``n`` scenes of two toys unlike in shape and colour a caption, the same with the colours or the patterns of
    the two exchanged, and a second caption of the scene, in words and order of its own."""
    first, changed, again = [], [], []
    for i in range(n):
        rng = np.random.default_rng(draw.number("telling", i))
        scene = sample_scene(rng, 2)
        while scene.toys[0].shape == scene.toys[1].shape or scene.toys[0].color == scene.toys[1].color:
            scene = sample_scene(rng, 2)
        seed = int(rng.integers(2**31))

        def say(one: Scene, seed: int = seed) -> str:
            return describe(one, np.random.default_rng(seed), "random").text

        first.append(say(scene))
        changed += different_negatives(first[-1], scene, 1, rng, say, changes=EXCHANGES)
        again.append(describe(scene, rng, "random").text)
    return first, changed, again


class CLIPObjective(Objective):
    """Symmetric contrastive loss with hard negative captions."""

    NAME = "clip"
    EXPORTED = "clip"
    Model: ClassVar[type[Section]] = CLIPModelOptions
    Loss: ClassVar[type[Section]] = CLIPLoss
    clip: CLIPModel

    def build(self) -> dict[str, nn.Module]:
        o: CLIPModelOptions = self.model_options
        self.tokenizer = build_tokenizer(o.length)
        end = self.tokenizer.eos_token_id
        text = CLIPTextConfig(
            vocab_size=len(self.tokenizer),
            hidden_size=o.text_width,
            intermediate_size=4 * o.text_width,
            projection_dim=o.projection,
            num_hidden_layers=o.text_layers,
            num_attention_heads=o.text_heads,
            max_position_embeddings=o.length,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=end,
            pad_token_id=end,
        )
        vision = CLIPVisionConfig(
            hidden_size=o.vision_width,
            intermediate_size=4 * o.vision_width,
            projection_dim=o.projection,
            num_hidden_layers=o.vision_layers,
            num_attention_heads=o.vision_heads,
            image_size=self.recipe.data.size,
            patch_size=o.patch,
        )
        config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=o.projection)
        self.clip = CLIPModel(config)
        if not self.loss_options.places:
            return {"clip": self.clip}
        return {"clip": self.clip, "readout": nn.Linear(o.vision_width, labels.PLACE_CLASSES)}

    def tokens(self, texts: list[str]) -> Tensor:
        """Token ids (b, t) int64, padded to the longest: attention is causal, what follows the end does not matter."""
        return self.tokenizer(
            texts, max_length=self.model_options.length, padding="longest", truncation=True, return_tensors="pt"
        ).input_ids

    def batch(self, draw: Draw) -> dict[str, Tensor]:
        o: CLIPLoss = self.loss_options
        paraphrases: dict[str, Tensor] = {}
        if o.paraphrases:
            first, changed, again = retold(o.tellings, draw)
            same = torch.tensor([[c in (a, b) for c in first + changed] for a, b in zip(first, again, strict=True)])
            paraphrases = {"paraphrases": self.tokens(first + changed + again), "paraphrases_same": same}
            if draw.step < o.text_first:
                return paraphrases
        indices = draw.indices(len(self.train_data), self.recipe.train.batch)
        flip = torch.rand(len(indices), generator=draw.generator("mirror")) < o.mirror
        texts = captions_with_negatives(self.train_data, indices, draw, o.negatives, o.changes, flip.tolist())
        # two scenes of a batch may share a caption: not each other's negatives
        same = torch.tensor([[a == b for b in texts] for a in texts[: len(indices)]])
        batch = {"pixels": data.pictures(self.train_data, indices), "tokens": self.tokens(texts), "same": same}
        batch["pixels"][flip] = batch["pixels"][flip].flip(-1)
        if o.places:
            cells = self.recipe.data.size // self.model_options.patch
            batch["places"] = labels.place_labels(self.train_data, indices, cells)
            batch["places"][flip] = batch["places"][flip].flip(-1)
        return {**batch, **paraphrases}

    def features(self, pixels: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        """Unit vectors (b, d) of pictures (b, 3, h, w) in [-1, 1] or of token ids (b, t)."""
        if pixels is not None:
            out = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).pooler_output)
        else:
            out = self.clip.text_projection(self.clip.text_model(input_ids=tokens).pooler_output)
        return F.normalize(out.float(), dim=-1)

    def contrast(self, logits: Tensor, same: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The contrastive loss of ``logits`` (b, m) and its figures for the log."""
        found = contrastive(logits, same, self.loss_options.hard)
        logs = {"right": found.right.float().mean()}
        return found.loss, logs if found.duel is None else {**logs, "duel": found.duel.float().mean()}

    def loss(self, batch: dict[str, Tensor], draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        o: CLIPLoss = self.loss_options
        loss, logs = torch.zeros((), device=self.device), {}
        if "paraphrases" in batch:
            n = len(batch["paraphrases_same"])
            out = self.clip.text_model(input_ids=batch["paraphrases"])
            text = F.normalize(self.clip.text_projection(out.pooler_output).float(), dim=-1)
            scale = self.clip.logit_scale.exp().clamp(max=100)
            part, figures = self.contrast(scale * text[2 * n :] @ text[: 2 * n].T, batch["paraphrases_same"])
            loss, logs = loss + o.paraphrases * part, {f"again_{key}": value for key, value in figures.items()}
        if "pixels" not in batch:
            return loss, logs
        vision = self.clip.vision_model(pixel_values=batch["pixels"])
        read = self.clip.text_model(input_ids=batch["tokens"])
        image = F.normalize(self.clip.visual_projection(vision.pooler_output).float(), dim=-1)
        text = F.normalize(self.clip.text_projection(read.pooler_output).float(), dim=-1)
        part, figures = self.contrast(self.clip.logit_scale.exp().clamp(max=100) * image @ text.T, batch["same"])
        loss, logs = loss + part, {**figures, **logs}
        if o.places:
            patches = self.modules["readout"](vision.last_hidden_state[:, 1:]).transpose(1, 2)
            part = labels.place_loss(patches.unflatten(2, batch["places"].shape[-2:]), batch["places"]).mean()
            loss = loss + o.places * part
            logs["places"] = part.detach()
        return loss, logs

    def evaluate(self) -> dict[str, float]:
        """Retrieval among the captions of 64 pictures, and one caption against its own hard negatives."""
        right: dict[str, list[bool]] = {
            "caption_of_64": [],
            "picture_of_64": [],
            "beats_hard_negative": [],
            "beats_colour_swap": [],
        }
        for number, part in enumerate(torch.arange(len(self.val_data) // 64 * 64).split(64)):
            draw = Draw(1, number)
            image = self.features(pixels=data.pictures(self.val_data, part).to(self.device))
            captions = [self.val_data.caption(i, style="full").text for i in part.tolist()]
            scenes = [self.val_data.scenes[i] for i in part.tolist()]
            scores = image @ self.features(tokens=self.tokens(captions).to(self.device)).T
            own = torch.arange(64, device=self.device)
            right["caption_of_64"] += (scores.argmax(1) == own).tolist()
            right["picture_of_64"] += (scores.argmax(0) == own).tolist()
            rng = np.random.default_rng(draw.number("negative"))
            changed = [describe(hard_negative(scene, rng)).text for scene in scenes]
            rival = (image * self.features(tokens=self.tokens(changed).to(self.device))).sum(1)
            right["beats_hard_negative"] += (scores.diagonal() > rival).tolist()
            pairs = [k for k, s in enumerate(scenes) if len(s.toys) == 2 and s.toys[0].color != s.toys[1].color]
            swapped = []
            for k in pairs:
                a, b = (toy.color for toy in scenes[k].toys)
                swapped.append(describe(scenes[k].replace(0, color=b).replace(1, color=a)).text)
            rival = (image[pairs] * self.features(tokens=self.tokens(swapped).to(self.device))).sum(1)
            right["beats_colour_swap"] += (scores.diagonal()[pairs] > rival).tolist()
        return {name: float(np.mean(values)) for name, values in right.items()}

    def processors(self) -> list[Any]:
        size = self.recipe.data.size
        half = [0.5, 0.5, 0.5]
        processor = CLIPImageProcessorPil(
            size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_mean=half, image_std=half
        )
        return [self.tokenizer, processor]
