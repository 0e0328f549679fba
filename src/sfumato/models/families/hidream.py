"""HiDream-I1: double and single transformer blocks with experts, two CLIPs pooled, T5 and every layer of a Llama."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfumato.errors import BadInput
from sfumato.models.condition import Rows
from sfumato.models.families.base import Family, TextStream
from sfumato.models.site import Site, SiteList


class HiDream(Family):
    """HiDream.ai 2025, arXiv 2505.22705. Attention sees the image first, then T5's tokens, those of the Llama's last
    layer, and those of the Llama's layer that belongs to the block: a word has three places. A picture that is not
    square is filled up with empty places that take part. Nothing is masked.

    Row i of ``embeds`` (b 3t L*d) holds the features of text position i, T5's in front and zeros behind them, the
    Llama's with its L layers side by side. The denoiser reads one tensor for both places of the Llama's last layer, the
    later ones. Its experts run without gradients, so states have none.
    """

    name = "hidream"
    pipeline_classes = ("HiDreamImagePipeline",)
    shifts_latents = True
    denoiser_name = "transformer"
    capabilities = frozenset({"pictures", "noise_path", "text_attention", "joint_attention"})
    defaults = {"steps": 50, "guidance": 5.0}
    max_sequence_length = 128
    half = torch.bfloat16
    negates = True

    @property
    def size_multiple(self) -> int:
        return self.scale * int(self.config.patch_size)

    @property
    def streams(self) -> list[TextStream]:
        first, second = self._lengths
        t5 = self._stream("tokenizer_3", "t5", 0, first)
        names = (("llama", first), ("llama_layer", first + second))
        return [*t5, *(part for name, at in names for part in self._stream("tokenizer_4", name, at, second))]

    @property
    def _lengths(self) -> tuple[int, int]:
        """Positions of T5 and of the Llama."""
        tokenizers = (self.pipe.tokenizer_3, self.pipe.tokenizer_4)
        first, second = (min(self.max_sequence_length or 0, int(each.model_max_length)) for each in tokenizers)
        return first, second

    @property
    def _layers(self) -> list[int]:
        """The Llama's layers that blocks read, each once."""
        return sorted(set(self.config.llama_layers))

    def state_shape(self, h: int, w: int, frames: int = 1) -> tuple[int, ...]:
        if h != w and self._tokens(h, w)[0] > self.denoiser.max_seq:
            most = self.denoiser.max_seq * self.size_multiple**2
            raise BadInput(f"a picture that is not square may have {most} pixels here; {w}x{h} latents are too many.")
        return super().state_shape(h, w, frames)

    def encode(self, prompts: list[str], negatives: list[str] | None, guidance: bool) -> tuple[Rows, Rows | None]:
        t5, no_t5, llama, no_llama, pooled, no_pooled = self.pipe.encode_prompt(
            prompts,
            device=self.device,
            do_classifier_free_guidance=guidance,
            negative_prompt=negatives,
            max_sequence_length=self.max_sequence_length,
        )
        cond = {"embeds": self._embeds(t5, llama), "pooled": pooled}
        return cond, {"embeds": self._embeds(no_t5, no_llama), "pooled": no_pooled} if guidance else None

    def _embeds(self, t5: Tensor, llama: Tensor) -> Tensor:
        """Of T5's features (b t d) and those of the Llama (L b t d) in all its layers."""
        layers = llama[self._layers].permute(1, 2, 0, 3).flatten(2)  # b t (L d)
        width = max(layers.shape[-1], t5.shape[-1])
        parts = [torch.nn.functional.pad(each, (0, width - each.shape[-1])) for each in (t5, layers, layers)]
        return torch.cat(parts, 1)

    def _apart(self, embeds: Tensor) -> dict[str, Any]:
        """The same as the denoiser is given them; of the Llama only the layers that blocks read."""
        (first, second), layers = self._lengths, self._layers
        wide, deep = self.config.caption_channels
        held = embeds[:, first + second :, : deep * len(layers)].unflatten(-1, (len(layers), deep))
        return {
            "encoder_hidden_states_t5": embeds[:, :first, :wide].contiguous(),
            "encoder_hidden_states_llama3": {k: held[:, :, i].contiguous() for i, k in enumerate(layers)},
        }

    def predict(self, x: Tensor, t: Tensor, rows: Rows, guidance: float | None, extra: dict[str, Any]) -> Tensor:
        out = self.denoiser(
            hidden_states=x,
            timesteps=t.expand(len(x)),
            pooled_embeds=rows["pooled"],
            return_dict=False,
            **self._apart(rows["embeds"]),
            **extra,
        )[0]
        return -out

    def rows_of_call(self, arguments: dict[str, Any]) -> Rows:
        t5, llama = arguments["encoder_hidden_states_t5"], arguments["encoder_hidden_states_llama3"]
        return {"embeds": self._embeds(t5, llama), "pooled": arguments["pooled_embeds"]}

    def call_with(self, arguments: dict[str, Any], embeds: Tensor) -> dict[str, Any]:
        return {**arguments, **self._apart(embeds)}

    def texts_of_encoding(self, result: Any) -> list[Tensor]:
        t5, no_t5, llama, no_llama, *_ = result
        return [self._embeds(*pair) for pair in ((t5, llama), (no_t5, no_llama)) if pair[0] is not None]

    def set_timesteps(
        self, scheduler: Any, steps: int, h: int, w: int, device: torch.device, frames: int = 1, **given: list[float]
    ) -> None:
        from diffusers.pipelines.hidream_image.pipeline_hidream_image import calculate_shift

        shift = {"mu": calculate_shift(self.denoiser.max_seq)} if scheduler.config.get("use_dynamic_shifting") else {}
        self._set(scheduler, steps, device, given, **shift)

    def prepare(self, noise: Tensor, scheduler: Any) -> Tensor:
        return noise

    def _tokens(self, h: int, w: int) -> tuple[int, tuple[int, int]]:
        patch = int(self.config.patch_size)
        grid = (h // patch, w // patch)
        return grid[0] * grid[1], grid

    def sites(self, h: int, w: int, text: int, frames: int = 1) -> list[Site]:
        n, grid = self._tokens(h, w)
        end = n if h == w else int(self.denoiser.max_seq)
        found = SiteList()
        for name, attribute in (("joint", "double_stream_blocks"), ("single", "single_stream_blocks")):
            for i, each in enumerate(getattr(self.denoiser, attribute)):
                found.put(
                    f"{attribute}.{i}.block.attn1",
                    each.block.attn1,
                    kind="joint",
                    grid=grid,
                    block=f"{name}.{i}",
                    image=(0, n),
                    text=(end, end + text),
                )
        return found
