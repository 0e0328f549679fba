"""aMUSEd: masked tokens of a VQ-GAN, drawn by a U-ViT that attends to the text at every block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.models import codec
from sfumato.models.condition import Rows
from sfumato.models.families.base import Family, TextStream, sibling_classes
from sfumato.models.site import Layer, Site, SiteList

#: of the pipeline's ``__call__``: micro-conditions besides the size
CROP, AESTHETIC_SCORE = (0, 0), 6


class Amused(Family):
    """Patil et al. 2024 (arXiv 2401.01808), an open Muse (Chang et al. 2023). States are token ids (b h w), predictions
    logits (b v h w). Conditions may hold ``micro`` (b 5): width, height, the crop's corner, aesthetic score; else the
    size is taken from the state and the rest as the pipeline has it."""

    name = "amused"
    capabilities = frozenset({"pictures", "text_attention"})
    pipeline_classes = ("AmusedPipeline",)
    siblings = sibling_classes("AmusedPipeline", "Amused{}Pipeline", "Img2Img Inpaint")
    further_channels = 0  # the state is token ids
    denoiser_name = "transformer"
    components = ("vqvae", "scheduler", "tokenizer")
    process = "masked"
    state = "h w"
    defaults = {"steps": 12, "guidance": 10.0}

    @property
    def channels(self) -> int:
        return int(self.pipe.vqvae.config.latent_channels)

    @property
    def vocabulary(self) -> int:
        return int(self.config.codebook_size)

    def state_shape(self, h: int, w: int, frames: int = 1) -> tuple[int, ...]:
        return h, w

    @property
    def size_multiple(self) -> int:
        return self.scale * (2 if self.config.downsample else 1)

    @property
    def default_size(self) -> tuple[int, int]:
        side = int(self.config.sample_size) * self.scale
        return side, side

    @property
    def streams(self) -> list[TextStream]:
        return self._stream("tokenizer", "clip", 0, chunked=True)

    @property
    def layers(self) -> list[Layer]:
        blocks = [Layer(f"block.{i}", f"transformer_layers.{i}") for i in range(len(self.denoiser.transformer_layers))]
        return [Layer("down.0", "down_block"), *blocks, Layer("up.0", "up_block")]

    def encode(self, prompts: list[str], negatives: list[str] | None, guidance: bool) -> tuple[Rows, Rows | None]:
        def rows(texts: list[str]) -> Rows:
            tokenizer = self.pipe.tokenizer
            ids = tokenizer(
                texts,
                return_tensors="pt",
                padding="max_length",
                truncation=True,
                max_length=tokenizer.model_max_length,
            ).input_ids
            encoded = self.pipe.text_encoder(ids.to(self.device), return_dict=True, output_hidden_states=True)
            return {"embeds": encoded.hidden_states[-2], "pooled": encoded.text_embeds}

        return rows(prompts), rows(negatives or [""] * len(prompts)) if guidance else None

    def predict(self, x: Tensor, t: Tensor, rows: Rows, guidance: float | None, extra: dict[str, Any]) -> Tensor:
        embeds = rows["embeds"]
        values = [x.shape[-1] * self.scale, x.shape[-2] * self.scale, *CROP, AESTHETIC_SCORE]
        micro = torch.tensor(values, device=x.device, dtype=embeds.dtype).expand(len(x), -1)
        return self.denoiser(
            x,
            encoder_hidden_states=embeds,
            pooled_text_emb=rows["pooled"],
            micro_conds=rows.get("micro", micro),
            **extra,
        )

    def decode(self, state: Tensor) -> Tensor:
        vqvae = self.pipe.vqvae
        with codec.upcast(vqvae, True):
            shape = (*state.shape, self.channels)
            return vqvae.decode(state, force_not_quantize=True, shape=shape).sample * 2 - 1

    def encode_image(self, images: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
        vqvae = self.pipe.vqvae
        with codec.upcast(vqvae, True):

            def read(which: codec.Which) -> Tensor:
                return vqvae.encode((images[which].to(self.device, vqvae.dtype) + 1) / 2).latents

            features = codec.finite(vqvae, read, "encoded", self.name)  # tokens would not show it
            return vqvae.quantize(features)[2][2].reshape(len(features), *features.shape[-2:])

    def sites(self, h: int, w: int, text: int, frames: int = 1) -> list[Site]:
        unit = 2 if self.config.downsample else 1
        grid = (h // unit, w // unit)
        found = SiteList()
        places = [("down.0", f"down_block.attention_blocks.{i}") for i in range(self.config.num_res_blocks)]
        places += [(f"block.{i}", f"transformer_layers.{i}") for i in range(self.config.num_hidden_layers)]
        places += [("up.0", f"up_block.attention_blocks.{i}") for i in range(self.config.num_res_blocks)]
        for block, path in places:
            for name in ("attn1", "attn2"):
                module = self.denoiser.get_submodule(f"{path}.{name}")
                cross = bool(module.is_cross_attention)
                span = (0, text) if cross else None
                found.put(
                    f"{path}.{name}", module, kind="cross" if cross else "self", grid=grid, block=block, text=span
                )
        return found
