"""Qwen-Image: a multimodal transformer (MM-DiT) beside a language model that reads the prompt in a template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.models import codec
from sfumato.models.condition import Rows
from sfumato.models.families.base import NO_CONTROL, TextStream, sibling_classes
from sfumato.models.families.chat_template import TemplatedTokenizer
from sfumato.models.families.flux import Flux


class QwenImage(Flux):
    """Wu et al. 2025, arXiv 2508.02324. As in Flux, latents are packed by 2x2, attention sees the text first and a
    denoiser call one guidance branch; the text is what is behind the template's head, as long as the longest prompt of
    the call, so the two branches may differ in length. The guided output of each place gets the length that the
    conditional one has there."""

    name = "qwenimage"
    pipeline_classes = ("QwenImagePipeline",)
    siblings = {
        **sibling_classes("QwenImagePipeline", "QwenImage{}Pipeline", "Img2Img Inpaint"),
        **sibling_classes("QwenImagePipeline", "QwenImage{}Pipeline", "ControlNet ControlNetInpaint", NO_CONTROL),
    }
    blocks = (("joint", "transformer_blocks"),)

    def __init__(self, pipe: Any, max_sequence_length: int | None = None):
        super().__init__(pipe, max_sequence_length)
        self.defaults = {"steps": 50, "guidance": 4.0}

    @property
    def embeds_guidance(self) -> bool:
        return False

    @property
    def streams(self) -> list[TextStream]:
        if self.pipe.tokenizer is None:
            return []
        head = int(self.pipe.prompt_template_encode_start_idx)
        length = head + (self.max_sequence_length or 0)
        tokenizer = TemplatedTokenizer(self.pipe.tokenizer, self.pipe.prompt_template_encode.format)
        return [TextStream(tokenizer, "qwen", -head, length, lambda text: text, padded=False)]

    def encode(self, prompts: list[str], negatives: list[str] | None, guidance: bool) -> tuple[Rows, Rows | None]:
        def rows(texts: list[str]) -> Rows:
            embeds, mask = self.pipe.encode_prompt(texts, self.device, max_sequence_length=self.max_sequence_length)
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device) if mask is None else mask
            return {"embeds": embeds, "mask": mask}

        return rows(prompts), rows(negatives or [" "] * len(prompts)) if guidance else None

    def text_in(self, rows: Rows) -> int:
        return int(rows["mask"].sum(1).max())

    def grid_of_call(self, arguments: dict[str, Any]) -> tuple[int, int, int]:
        first = arguments["img_shapes"][0]
        _, h, w = first[0] if isinstance(first, list) else first  # pictures that are edited follow
        return 1, 2 * h, 2 * w

    def rows_of_call(self, arguments: dict[str, Any]) -> Rows:
        rows = super().rows_of_call(arguments)
        return {"mask": rows["embeds"].new_ones(rows["embeds"].shape[:2], dtype=torch.long), **rows}

    def unpacked(self, x: Tensor, h: int, w: int) -> Tensor:
        return self._unpacked(x[:, : (h // 2) * (w // 2)], h, w)

    def predict(self, x: Tensor, t: Tensor, rows: Rows, guidance: float | None, extra: dict[str, Any]) -> Tensor:
        b, c, h, w = x.shape
        text = self.text_in(rows)
        mask = rows["mask"][:, :text]
        states = [x, *self.references_of(rows)]
        out = self.denoiser(
            hidden_states=torch.cat([self._packed(state) for state in states], 1),
            timestep=t.expand(b).to(x.dtype) / 1000,
            encoder_hidden_states=rows["embeds"][:, :text],
            encoder_hidden_states_mask=None if mask.all() else mask,
            img_shapes=[[(1, state.shape[-2] // 2, state.shape[-1] // 2) for state in states]] * b,
            return_dict=False,
            **extra,
        )[0]
        return self._unpacked(out[:, : (h // 2) * (w // 2)], h, w)

    def combine(self, uncond: Tensor, conds: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        guided, cond = (self._packed(each) for each in (super().combine(uncond, conds, weights), conds[0]))
        length, wanted = (torch.norm(each, dim=-1, keepdim=True) for each in (guided, cond))
        return self._unpacked(guided * (wanted / length), *uncond.shape[-2:])

    def decode(self, state: Tensor) -> Tensor:
        return codec.decode_frames(self.pipe.vae, state[:, :, None])[:, :, 0]

    def encode_image(self, images: Tensor, generators: Sequence[torch.Generator] | None) -> Tensor:
        return codec.encode_frames(self.pipe.vae, images[:, :, None], generators)[:, :, 0]

    def _packed(self, x: Tensor) -> Tensor:
        return self.pipe._pack_latents(x.contiguous(), *x.shape)

    def _unpacked(self, tokens: Tensor, h: int, w: int) -> Tensor:
        return self.pipe._unpack_latents(tokens, h * self.scale, w * self.scale, self.scale)[:, :, 0]
