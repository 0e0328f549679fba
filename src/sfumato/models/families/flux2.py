"""Flux.2: double and single transformer blocks over patched latents, Mistral 3 as text encoder, reference pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sfumato.models.condition import Rows
from sfumato.models.families.base import TextStream
from sfumato.models.families.chat_template import TemplatedTokenizer
from sfumato.models.families.flux import Flux
from sfumato.models.site import Layer, Site

if TYPE_CHECKING:
    from PIL.Image import Image


class Flux2(Flux):
    """Black Forest Labs 2025. Attention sees the tokens of the whole chat template first, padding included and not
    masked, then the image, then the reference pictures, in double and in single blocks. A state is patched and
    normalised as the denoiser gets it: one token is one place of the grid. Its prompts are not rewritten by the
    language model (the pipeline's ``caption_upsample_temperature``): give them in full."""

    name = "flux2"
    pipeline_classes = ("Flux2Pipeline",)
    further_channels = 0  # four latents make one place
    capabilities = Flux.capabilities | {"reference"}
    references = range(11)

    def __init__(self, pipe: Any, max_sequence_length: int | None = None):
        super().__init__(pipe, max_sequence_length)
        self.defaults = {"steps": 50, "guidance": 4.0}

    @property
    def channels(self) -> int:
        return int(self.config.in_channels)

    @property
    def scale(self) -> int:
        return int(self.pipe.vae_scale_factor) * 2

    @property
    def size_multiple(self) -> int:
        return self.scale

    @property
    def default_size(self) -> tuple[int, int]:
        side = self.pipe.default_sample_size * int(self.pipe.vae_scale_factor)
        return side, side

    @property
    def streams(self) -> list[TextStream]:
        reader = self.pipe.tokenizer
        if reader is None:
            return []

        def template(text: str) -> str:
            from diffusers.pipelines.flux2.pipeline_flux2 import format_input

            (messages,) = format_input([text], self.pipe.system_message)
            return str(reader.apply_chat_template(messages, add_generation_prompt=False, tokenize=False))

        # the template writes its special tokens itself; a processor holds the tokenizer beside what reads pictures
        templated = TemplatedTokenizer(getattr(reader, "tokenizer", reader), template, add_special_tokens=False)
        return [self._templated("mistral", templated)]

    def _templated(self, name: str, tokenizer: TemplatedTokenizer) -> TextStream:
        left = tokenizer.padding_side == "left"
        return TextStream(tokenizer, name, 0, self.max_sequence_length or 0, lambda text: text, left=left)

    @property
    def layers(self) -> list[Layer]:
        # single blocks give one sequence of text and image, not a picture
        return [layer for layer in super().layers if layer.name.startswith("joint")]

    def encode(self, prompts: list[str], negatives: list[str] | None, guidance: bool) -> tuple[Rows, Rows | None]:
        def rows(texts: list[str]) -> Rows:
            embeds, _ = self.pipe.encode_prompt(texts, device=self.device, max_sequence_length=self.max_sequence_length)
            return {"embeds": embeds}

        return rows(prompts), rows(negatives or [""] * len(prompts)) if guidance else None

    def predict(self, x: Tensor, t: Tensor, rows: Rows, guidance: float | None, extra: dict[str, Any]) -> Tensor:
        embeds = rows["embeds"]
        tokens, ids = self._sequence(x, rows)
        scale = None
        if self.embeds_guidance:
            value = self.defaults["guidance"] if guidance is None else guidance
            scale = torch.full([1], value, device=x.device, dtype=torch.float32).expand(len(x))
        out = self.denoiser(
            hidden_states=tokens.to(self.denoiser.dtype),
            timestep=t.expand(x.shape[0]).to(x.dtype) / 1000,
            guidance=scale,
            encoder_hidden_states=embeds,
            txt_ids=self.pipe._prepare_text_ids(embeds).to(x.device),
            img_ids=ids.to(x.device),
            return_dict=False,
            **extra,
        )[0]
        return out[:, : x[0, 0].numel()].transpose(1, 2).reshape(x.shape)

    def _sequence(self, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        references = self.references_of(rows)
        tokens = [self.pipe._pack_latents(state) for state in (x, *references)]
        ids = self.pipe._prepare_latent_ids(x)
        if references:  # each at a time of its own, behind the picture that is drawn
            further = self.pipe._prepare_image_ids([state[:1] for state in references])
            ids = torch.cat([ids, further.repeat(len(x), 1, 1)], 1)
        return torch.cat(tokens, 1), ids

    def fit_reference(self, picture: Image) -> Image:
        """At most as large as a picture that is drawn, and cut to whole places around its centre."""
        most = self.default_size[0] * self.default_size[1]
        processor = self.pipe.image_processor
        if picture.width * picture.height > most:
            picture = processor._resize_to_target_area(picture, most)
        width, height = (side // self.size_multiple * self.size_multiple for side in picture.size)
        return processor._resize_and_crop(picture, width, height)

    def grid_of_call(self, arguments: dict[str, Any]) -> tuple[int, int, int]:
        return 1, *self.tokens_of_call(arguments)

    def unpacked(self, x: Tensor, h: int, w: int) -> Tensor:
        return x[:, : h * w].transpose(1, 2).unflatten(-1, (h, w))

    def set_timesteps(
        self, scheduler: Any, steps: int, h: int, w: int, device: torch.device, frames: int = 1, **given: list[float]
    ) -> None:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        kwargs = self._spaced(scheduler, np.linspace(1.0, 1 / steps, steps), given)
        if scheduler.config.get("use_dynamic_shifting"):
            kwargs["mu"] = compute_empirical_mu(image_seq_len=h * w, num_steps=steps)
        self._set(scheduler, steps, device, given, **kwargs)
        scheduler.set_begin_index(0)

    def decode(self, state: Tensor) -> Tensor:
        mean, std = self._statistics(state)
        latents = self.pipe._unpatchify_latents(state * std + mean)
        return self.pipe.vae.decode(latents.to(self.pipe.vae.dtype), return_dict=False)[0]

    def encode_image(self, images: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
        vae = self.pipe.vae
        spread = vae.encode(images.to(self.device, vae.dtype)).latent_dist
        latents = self.pipe._patchify_latents(spread.mode())  # as the pipeline reads pictures: nothing is drawn
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per channel of patched latents (1 c 1 1)."""
        norm = self.pipe.vae.bn
        variance = norm.running_var.view(1, -1, 1, 1) + self.pipe.vae.config.batch_norm_eps
        return norm.running_mean.view(1, -1, 1, 1).to(like), torch.sqrt(variance).to(like)

    def sites(self, h: int, w: int, text: int, frames: int = 1) -> list[Site]:
        return super().sites(2 * h, 2 * w, text)  # Flux counts latents before they are patched
