"""Families that exist in tests only: an autoregressive model and a one-pass generator, made of genuine small networks.

Defining a subclass of :class:`Family` is all it takes for :class:`Model` to know the pipeline.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin, VQModel
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from sfumato.models import Model, Site, quiet
from sfumato.models.condition import Rows
from sfumato.models.families import Family, TextStream
from tests.tiny import _clip

CODES = 32
GRID = 4


class TinyTokensPipeline(DiffusionPipeline):
    """GPT-2 with cross attention to the text, over the 16 tokens of a VQ-GAN."""

    def __init__(self, vqvae: Any, transformer: Any, text_encoder: Any, tokenizer: Any):
        super().__init__()
        self.register_modules(vqvae=vqvae, transformer=transformer, text_encoder=text_encoder, tokenizer=tokenizer)
        self.vae_scale_factor = 2


class TinyGeneratorPipeline(DiffusionPipeline):
    """A generator from noise and text to a picture."""

    def __init__(self, generator: Any, text_encoder: Any, tokenizer: Any):
        super().__init__()
        self.register_modules(generator=generator, text_encoder=text_encoder, tokenizer=tokenizer)


class Generator(ModelMixin, ConfigMixin):
    """Noise (b d) and a text vector (b 16) to pictures (b 3 8 8)."""

    @register_to_config
    def __init__(self, d: int = 6):
        super().__init__()
        self.text, self.noise = nn.Linear(16, 32), nn.Linear(d, 32)
        self.up = nn.ConvTranspose2d(8, 3, 4, 4)

    def forward(self, z: Tensor, text: Tensor) -> Tensor:
        return self.up(F.silu(self.noise(z) + self.text(text)).view(-1, 8, 2, 2)).tanh()


class _WithText(Family):
    @property
    def streams(self) -> list[TextStream]:
        return self._stream("tokenizer", "clip", 0)

    def encode(self, prompts: list[str], negatives: list[str] | None, guidance: bool) -> tuple[Rows, Rows | None]:
        def rows(texts: list[str]) -> Rows:
            ids = self.pipe.tokenizer(texts, return_tensors="pt", padding="max_length", max_length=77).input_ids
            said = self.pipe.text_encoder(ids)
            return {"embeds": said.last_hidden_state, "pooled": said.pooler_output}

        return rows(prompts), rows(negatives or [""] * len(prompts)) if guidance else None


class TinyTokens(_WithText):
    name = "tiny_tokens"
    capabilities = frozenset({"pictures", "text_attention"})
    pipeline_classes = ("TinyTokensPipeline",)
    denoiser_name = "transformer"
    components = ("vqvae", "tokenizer")
    process = "autoregressive"
    state = "n"
    defaults = {"guidance": 3.0}

    @property
    def vocabulary(self) -> int:
        return CODES

    @property
    def size_multiple(self) -> int:
        return GRID * self.scale

    @property
    def size_limit(self) -> int:
        return GRID * self.scale

    @property
    def default_size(self) -> tuple[int, int]:
        return GRID * self.scale, GRID * self.scale

    def state_shape(self, h: int, w: int, frames: int = 1) -> tuple[int, ...]:
        return (h * w,)

    def predict(self, x: Tensor, t: Tensor, rows: Rows, guidance: float | None, extra: dict[str, Any]) -> Tensor:
        ids = F.pad(x[:, :-1], (1, 0), value=CODES)
        ids = torch.where(ids < 0, 0, ids)  # behind t, where a causal network does not look
        logits = self.denoiser(ids, encoder_hidden_states=rows["embeds"], use_cache=False, **extra).logits
        return logits[:, int(t), :CODES]

    def decode(self, state: Tensor) -> Tensor:
        vqvae = self.pipe.vqvae
        shape = (len(state), GRID, GRID, vqvae.config.latent_channels)
        return vqvae.decode(state, force_not_quantize=True, shape=shape).sample

    def sites(self, h: int, w: int, text: int, frames: int = 1) -> list[Site]:
        found = []
        for i in range(self.config.n_layer):
            for name, kind, span in (("attn", "self", None), ("crossattention", "cross", (0, text))):
                path = f"transformer.h.{i}.{name}"
                found.append(Site(path, kind, (h, w), span, (0, h * w), self.config.n_head, f"block.{i}", len(found)))
        return found


class TinyGenerator(_WithText):
    name = "tiny_generator"
    capabilities = frozenset({"pictures", "differentiable_state"})
    pipeline_classes = ("TinyGeneratorPipeline",)
    denoiser_name = "generator"
    components = ("tokenizer",)
    process = "onepass"
    state = "d"
    defaults = {"guidance": 1.0}
    scale = 1  # type: ignore[assignment]
    size_multiple = 8  # type: ignore[assignment]
    size_limit = 8  # type: ignore[assignment]
    default_size = (8, 8)  # type: ignore[assignment]

    def state_shape(self, h: int, w: int, frames: int = 1) -> tuple[int, ...]:
        return (self.config.d,)

    def predict(self, x: Tensor, t: Tensor, rows: Rows, guidance: float | None, extra: dict[str, Any]) -> Tensor:
        return self.denoiser(x, rows["pooled"])

    def decode(self, state: Tensor) -> Tensor:
        return state

    def sites(self, h: int, w: int, text: int, frames: int = 1) -> list[Site]:
        return []


@functools.cache
def tokens_model() -> Model:
    """The autoregressive model: 8x8 pixels from 16 tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text_encoder, tokenizer = _clip()
        config = GPT2Config(
            vocab_size=CODES + 1, n_positions=GRID**2, n_embd=16, n_layer=2, n_head=2, add_cross_attention=True,
            bos_token_id=CODES, eos_token_id=CODES, initializer_range=0.5,
        )  # fmt: skip
        vqvae = VQModel(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16), latent_channels=4, num_vq_embeddings=CODES, norm_num_groups=4,
            mid_block_add_attention=False, lookup_from_codebook=True,
        )  # fmt: skip
        return _model(TinyTokensPipeline(vqvae, GPT2LMHeadModel(config), text_encoder, tokenizer), "tiny-tokens")


@functools.cache
def generator_model() -> Model:
    """The one-pass model: 8x8 pixels from noise (6)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        text_encoder, tokenizer = _clip()
        return _model(TinyGeneratorPipeline(Generator(), text_encoder, tokenizer), "tiny-generator")


def _model(pipe: Any, name: str) -> Model:
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    with quiet():
        return Model(pipe, name=name)
