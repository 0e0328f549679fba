"""Z-Image: one sequence of image and text through every block, padded with learned tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sfumato.models.condition import COND, UNCOND, Rows
from sfumato.models.families.base import NO_CONTROL, TEXT_TO_IMAGE, Family, TextStream, sibling_classes
from sfumato.models.families.chat_template import TemplatedTokenizer, chat_template
from sfumato.models.site import Site, SiteList

#: image and text are padded to multiples of this
MULTIPLE = 32


class ZImage(Family):
    """Tongyi-MAI 2025, arXiv 2511.22699. Attention sees the image first, then the whole chat template, each followed by
    learned padding that takes part. Attention among the text alone, in the blocks that refine it first, is part of its
    encoding and no site. Latents stay in float32. Guidance counts from 0, ``c + w (c - u)``: w is one less than in
    other families, and the distilled Turbo checkpoint wants 0."""

    name = "z_image"
    pipeline_classes = ("ZImagePipeline",)
    siblings = {
        **sibling_classes("ZImagePipeline", "ZImage{}Pipeline", "Img2Img Inpaint"),
        **sibling_classes("ZImagePipeline", "ZImage{}Pipeline", "ControlNet ControlNetInpaint", NO_CONTROL),
    }
    shifts_latents = True
    denoiser_name = "transformer"
    capabilities = TEXT_TO_IMAGE
    defaults = {"steps": 50, "guidance": 5.0}
    max_sequence_length = 512
    branch_order = (COND, UNCOND)
    guidance_off = 0.0
    half = torch.bfloat16

    @property
    def size_multiple(self) -> int:
        return self.scale * 2

    @property
    def default_size(self) -> tuple[int, int]:
        return 1024, 1024

    @property
    def state_dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def streams(self) -> list[TextStream]:
        tokenizer = self.pipe.tokenizer
        if tokenizer is None:
            return []
        length = self.max_sequence_length or 0
        templated = TemplatedTokenizer(tokenizer, chat_template(tokenizer, thinking=True))
        return [TextStream(templated, "qwen", 0, length, lambda text: text, padded=False)]

    def encode(self, prompts: list[str], negatives: list[str] | None, guidance: bool) -> tuple[Rows, Rows | None]:
        conds, unconds = self.pipe.encode_prompt(
            list(prompts),  # it writes the template into the list
            self.device,
            guidance,
            negative_prompt=list(negatives) if negatives else None,
            max_sequence_length=self.max_sequence_length,
        )
        texts = [*conds, *unconds]
        embeds = pad_sequence(texts, batch_first=True)
        mask = torch.arange(embeds.shape[1]) < torch.tensor([len(text) for text in texts])[:, None]
        rows = {"embeds": embeds, "mask": mask.to(embeds.device)}
        b = len(prompts)
        cond, uncond = ({key: each[part] for key, each in rows.items()} for part in (slice(b), slice(b, None)))
        return cond, uncond if guidance else None

    def text_in(self, rows: Rows) -> int:
        return int(rows["mask"].sum(1).max())

    def predict(self, x: Tensor, t: Tensor, rows: Rows, guidance: float | None, extra: dict[str, Any]) -> Tensor:
        texts = [embeds[mask] for embeds, mask in zip(rows["embeds"], rows["mask"], strict=True)]
        pictures = list(x.to(self.denoiser.dtype).unsqueeze(2).unbind(0))
        time = (1000 - t.expand(len(x))) / 1000  # it counts from noise to picture
        out = self.denoiser(pictures, time, texts, return_dict=False, **extra)[0]
        return self._velocity(out)

    def state_of_call(self, arguments: dict[str, Any]) -> Tensor:
        return torch.stack(arguments["x"]).squeeze(2)

    def rows_of_call(self, arguments: dict[str, Any]) -> Rows:
        return self._padded(arguments["cap_feats"])

    def call_with(self, arguments: dict[str, Any], embeds: Tensor) -> dict[str, Any]:
        lengths = [len(text) for text in arguments["cap_feats"]]
        return {**arguments, "cap_feats": [text[:n] for text, n in zip(embeds, lengths, strict=True)]}

    def texts_of_encoding(self, result: Any) -> list[Tensor]:
        return [self._padded(texts)["embeds"] for texts in result if texts]

    def unpacked(self, x: Any, h: int, w: int) -> Tensor:
        return x if isinstance(x, Tensor) else self._velocity(x)

    def _padded(self, texts: Sequence[Tensor]) -> Rows:
        """Texts (t d) of any length as rows of one length, that of the longest text there may be."""
        lengths = torch.tensor([len(text) for text in texts], device=texts[0].device)
        t = max(self.text_length, *map(len, texts))
        embeds = torch.stack([torch.nn.functional.pad(text, (0, 0, 0, t - len(text))) for text in texts])
        return {"embeds": embeds, "mask": torch.arange(t, device=embeds.device) < lengths[:, None]}

    @staticmethod
    def _velocity(out: Sequence[Tensor]) -> Tensor:
        """What the denoiser gives for each picture, as the scheduler takes it."""
        return -torch.stack([each.float() for each in out]).squeeze(2)

    def combine(self, uncond: Tensor, conds: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        guided = conds[0]
        for cond, weight in zip(conds, weights, strict=True):
            guided = guided + weight * (cond - uncond)
        return guided

    def set_timesteps(
        self, scheduler: Any, steps: int, h: int, w: int, device: torch.device, frames: int = 1, **given: list[float]
    ) -> None:
        sigmas = self._spaced(scheduler, torch.linspace(1.0, 1 / steps, steps).tolist(), given)
        tokens = (h // 2) * (w // 2)
        self._shifted_timesteps(scheduler, steps, device, tokens, max_shift=1.15, given=given, **sigmas)
        scheduler.set_begin_index(0)

    def prepare(self, noise: Tensor, scheduler: Any) -> Tensor:
        return noise

    def sites(self, h: int, w: int, text: int, frames: int = 1) -> list[Site]:
        grid = (h // 2, w // 2)
        n = grid[0] * grid[1]
        first = -(-n // MULTIPLE) * MULTIPLE
        found = SiteList()
        for i, block in enumerate(self.denoiser.noise_refiner):
            found.put(f"noise_refiner.{i}.attention", block.attention, kind="self", grid=grid, block=f"refiner.{i}")
        words = (first, first + text)
        found.put_joint(self.denoiser.layers, "layers", "attention", "joint", grid=grid, image=(0, n), text=words)
        return found
