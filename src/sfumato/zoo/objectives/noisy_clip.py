"""toy-clip-noisy: toy-clip that reads noised latents, for guidance at every noise level (Nichol et al. 2021).

The text tower is toy-clip's and stays as it is. The picture tower begins as toy-clip's as well, with one new layer: a
patch of 8 x 8 pixels is a patch of 2 x 2 latents, so the patch embedding is fitted to toy-clip's by least squares and
everything behind it fits at once. Training then shows it latents at noise levels from clean to pure noise, with the
losses of :mod:`.clip`. What cannot be recognised any more at a level leaves the vector at what captions have in common,
and its gradient is small.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from sfumato.arrays import to_tensor
from sfumato.errors import BadInput
from sfumato.models.readers.noised import PLANES, alpha_sigma, codec_hash, noised_input
from sfumato.models.readers.preprocessing import Preprocessing
from sfumato.toybox import caption as describe
from sfumato.training import data
from sfumato.training.draw import Draw
from sfumato.training.recipe import Section
from sfumato.zoo.objectives import labels
from sfumato.zoo.objectives.clip import captions_with_negatives, hard_negative
from sfumato.zoo.objectives.contrastive import contrastive
from sfumato.zoo.objectives.latent import LatentObjective, codec_shape, zoo_folder

LEVELS = (0.0, 0.25, 0.5, 0.75)
"""Noise levels at which quality is measured."""


class NoisyCLIPModel(Section):
    """The ``[model]`` section."""

    vae: str = Field("toy-vae", description="zoo name or folder of the autoencoder whose latents are read")
    clip: str = Field("toy-clip", description="zoo name or folder of the CLIP to start from; its text tower is kept")
    patch: int = Field(2, ge=1, description="side of a patch in latents")
    text_rate: float = 0.0


class NoisyCLIPLoss(Section):
    """The ``[loss]`` section."""

    negatives: int = Field(2, ge=0, description="hard negative captions per picture")
    hard: float = Field(0.5, ge=0, description="weight of the contrast with one's own hard negatives alone")
    places: float = Field(0.5, ge=0, description="weight of reading what lies where off the patches")


class NoisyCLIPObjective(LatentObjective):
    """Symmetric contrastive loss of noised latents with captions and hard negative captions."""

    NAME = "noisy_clip"
    EXPORTED = "clip"
    Model: ClassVar[type[Section]] = NoisyCLIPModel
    Loss: ClassVar[type[Section]] = NoisyCLIPLoss
    clip: CLIPModel

    def build(self) -> dict[str, nn.Module]:
        o: NoisyCLIPModel = self.model_options
        folder = zoo_folder(o.clip)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder)
        self.teacher = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
        config = self.teacher.config.to_dict()
        self.preprocessing = Preprocessing.of(folder, self.teacher.config.vision_config)
        channels, side = codec_shape(o.vae, self.recipe.data.size)
        seen = config["vision_config"]
        cells = seen["image_size"] // seen["patch_size"]
        if side != cells * o.patch:
            raise BadInput(
                f"recipe key model.patch: {side} x {side} latents in patches of {o.patch} are not the {cells} x "
                f"{cells} places of {o.clip}."
            )
        seen |= {"num_channels": channels + PLANES, "image_size": side, "patch_size": o.patch}
        self.clip = CLIPModel(CLIPConfig(**config))
        mine = self.clip.state_dict()
        fits = {k: v for k, v in self.teacher.state_dict().items() if mine[k].shape == v.shape}
        self.clip.load_state_dict(fits, strict=False)
        for part in (self.clip.text_model, self.clip.text_projection):
            part.requires_grad_(False)
        self.text = self.clip.text_model
        width = self.clip.config.vision_config.hidden_size
        readout = nn.Linear(width, labels.PLACE_CLASSES)
        nn.init.zeros_(readout.weight)  # an untrained read-out should not push a trained tower about
        return {"clip": self.clip, "readout": readout}

    def setup(self, device: torch.device) -> None:
        super().setup(device)
        self.teacher.to(device)
        self.clip.config.noised = {"planes": PLANES, "codec": codec_hash(self.vae)}
        if not self.recipe.init_from:
            self.fit_patches(min(1000, len(self.train_data)))

    @torch.no_grad()
    def fit_patches(self, n: int) -> None:
        """The patch embedding that makes most of toy-clip's from clean latents, by least squares over n pictures."""
        o: NoisyCLIPModel = self.model_options
        indices = torch.arange(n)
        x = to_tensor(self.train_latents[:n].copy()).float().to(self.device)
        patches = F.unfold(noised_input(x, torch.zeros(n)), o.patch, stride=o.patch).transpose(1, 2).flatten(0, 1)
        old = self.teacher.vision_model.embeddings.patch_embedding
        shown = (data.pictures(self.train_data, part).to(self.device) for part in indices.split(100))
        wanted = torch.cat([old(self.preprocessing.tensor(pictures)) for pictures in shown])
        wanted = wanted.flatten(2).transpose(1, 2).flatten(0, 1)
        gram = patches.T @ patches
        ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
        weight = torch.linalg.solve(gram + ridge, patches.T @ wanted).T
        embedding = self.clip.vision_model.embeddings.patch_embedding.weight
        embedding.copy_(weight.reshape(embedding.shape))

    def tokens(self, texts: list[str]) -> Tensor:
        """Token ids (b, t) int64, padded to the longest: attention is causal, what follows the end does not matter."""
        return self.tokenizer(texts, padding="longest", truncation=True, return_tensors="pt").input_ids

    def batch(self, draw: Draw) -> dict[str, Tensor]:
        o: NoisyCLIPLoss = self.loss_options
        b = self.recipe.train.batch
        indices = draw.indices(len(self.train_data), b)
        texts = captions_with_negatives(self.train_data, indices, draw, o.negatives)
        x0 = to_tensor(self.train_latents[indices.numpy()]).float()
        # evenly spread over the batch: the loss then varies less with the draw of levels
        spread = torch.rand(1, generator=draw.generator("level")) + torch.arange(len(indices)) / len(indices)
        level = (spread % 1)[torch.randperm(len(indices), generator=draw.generator("order"))]
        batch = {
            "x0": x0,
            "noise": torch.randn(x0.shape, generator=draw.generator("noise")),
            "level": level,
            "tokens": self.tokens(texts),
            "same": torch.tensor([[a == c for c in texts] for a in texts[: len(indices)]]),
        }
        if o.places:
            batch["places"] = labels.place_labels(self.train_data, indices, x0.shape[-1] // self.model_options.patch)
        return batch

    def image_features(self, x0: Tensor, noise: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors (b, d) of latents noised to ``level`` (b), and the patches' features (b, n, width)."""
        alpha, sigma = (part.view(-1, 1, 1, 1) for part in alpha_sigma(level))
        out = self.clip.vision_model(pixel_values=noised_input(alpha * x0 + sigma * noise, level))
        return F.normalize(self.clip.visual_projection(out.pooler_output).float(), dim=-1), out.last_hidden_state[:, 1:]

    def read(self, tokens: Tensor) -> Tensor:
        """Unit vectors (b, d) of token ids (b, t)."""
        with torch.no_grad():
            out = self.clip.text_projection(self.clip.text_model(input_ids=tokens).pooler_output)
        return F.normalize(out.float(), dim=-1)

    def loss(self, batch: dict[str, Tensor], draw: Draw) -> tuple[Tensor, dict[str, Tensor]]:
        o: NoisyCLIPLoss = self.loss_options
        image, patches = self.image_features(batch["x0"], batch["noise"], batch["level"])
        text = self.read(batch["tokens"])
        logits = self.clip.logit_scale.exp().clamp(max=100) * image @ text.T
        loss, right, _ = contrastive(logits, batch["same"], o.hard)
        clearer = right[batch["level"] < 0.5]
        logs = {"right": right.float().mean(), "right_clearer_half": clearer.float().mean()}
        if o.places:
            read = self.modules["readout"](patches).transpose(1, 2).unflatten(2, batch["places"].shape[-2:])
            part = labels.place_loss(read, batch["places"]).mean()
            loss = loss + o.places * part
            logs["places"] = part.detach()
        return loss, logs

    def evaluate(self, n: int = 256) -> dict[str, float]:
        """The right caption of 64, and one caption against a hard negative, by noise level."""
        return self._retrieval(n, plain=False)

    def measure(self, n: int = 640) -> dict[str, float]:
        """As :meth:`evaluate`, beside what the CLIP it comes from makes of the same noised latents, decoded."""
        return self._retrieval(n, plain=True)

    def _retrieval(self, n: int, plain: bool) -> dict[str, float]:
        hits: dict[str, list[bool]] = {}
        for number in range(min(n, len(self.val_data)) // 64):
            part = torch.arange(64 * number, 64 * number + 64)
            draw = Draw(1, number)
            scenes = [self.val_data.scenes[i] for i in part.tolist()]
            captions = [self.val_data.caption(i, style="full").text for i in part.tolist()]
            rng = np.random.default_rng(draw.number("negative"))
            changed = [describe(hard_negative(scene, rng)).text for scene in scenes]
            text, rival = (self.read(self.tokens(texts).to(self.device)) for texts in (captions, changed))
            x0 = to_tensor(self.val_latents[part.numpy()]).float().to(self.device)
            noise = torch.randn(x0.shape, generator=draw.generator("noise")).to(self.device)
            own = torch.arange(len(part), device=self.device)
            for u in LEVELS:
                level = torch.full((len(part),), u, device=self.device)
                images = {"": self.image_features(x0, noise, level)[0]}
                if plain:
                    images["toy_clip_"] = self._decoded(x0, noise, level)
                for name, image in images.items():
                    scores = image @ text.T
                    found = (scores.argmax(1) == own, scores.diagonal() > (image * rival).sum(1))
                    for key, right in zip(("caption_of_64", "beats_hard_negative"), found, strict=True):
                        hits.setdefault(f"{name}{key}_at_{u:g}", []).extend(right.tolist())
        return {name: float(np.mean(values)) for name, values in hits.items()}

    def _decoded(self, x0: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """What the CLIP of pictures makes of noised latents: unit vectors (b, d)."""
        alpha, sigma = (part.view(-1, 1, 1, 1) for part in alpha_sigma(level))
        pixels = self.vae.decode((alpha * x0 + sigma * noise) / self.vae.config.scaling_factor).sample.clamp(-1, 1)
        out = self.teacher.vision_model(pixel_values=self.preprocessing.tensor(pixels)).pooler_output
        return F.normalize(self.teacher.visual_projection(out), dim=-1)

    def grid(self) -> None:
        return None

    def processors(self) -> list[Any]:
        return [self.tokenizer]

    def export(self, folder: Path) -> dict[str, Any]:
        return {**super().export(folder), "latents_of": self.model_options.vae}
