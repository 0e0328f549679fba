"""Word maps on a full-size SD1.5 U-Net: ours against no maps, and against what the original implementation does.

The original (castorini/daam) replaces the cross-attention processors of the up and down blocks by one that writes every
probability matrix out in full, splits it token by token, keeps the conditional half and adds it to one accumulator for
each (resolution, layer, head); at the end every accumulator is enlarged bicubically and all are averaged.
:class:`Original` does the same steps in our words.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer

from benchmarks.core import Figure, interleaved, ratio
from benchmarks.workloads import random_sd15
from sfumato import registry
from sfumato.explain.daam import DAAM
from sfumato.models import Model
from sfumato.sampling import generate

PROMPT = "a red cube and a blue ball on the grass"
STEPS, ROUNDS, GUIDANCE = 2, 3, 7.5
LATENT = 64


class Original:
    """Accumulates maps the way the original does; ``side`` is that of the latents."""

    def __init__(self, side: int):
        self.side = side
        self.sums: dict[tuple[int, int, int], Tensor] = {}

    def add(self, layer: int, probs: Tensor) -> None:
        """``probs`` (branches * k, n, t): splits tokens, keeps the second half (conditional), sums over steps."""
        side = int(probs.shape[1] ** 0.5)
        factor = self.side // side
        if factor == 8:
            return
        maps = torch.stack(
            [token.view(-1, side, side)[token.shape[0] // 2 :] for token in probs.permute(2, 0, 1).float()]
        )
        for head, each in enumerate(maps.transpose(0, 1).contiguous()):
            key = (factor, layer, head)
            self.sums[key] = each if key not in self.sums else self.sums[key] + each

    def heat(self) -> Tensor:
        """The global heat map (t, h, w)."""
        size = (self.side, self.side)
        large = [
            functional.interpolate(each[:, None], size, mode="bicubic").clamp(min=0) for each in self.sums.values()
        ]
        return torch.stack(large).mean(0)[:, 0]


class FullProcessor:
    """Cross-attention with explicit probabilities, all of them handed to ``original``."""

    def __init__(self, original: Original, layer: int):
        self.original, self.layer = original, layer

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        q = attn.head_to_batch_dim(attn.to_q(hidden_states))
        k = attn.head_to_batch_dim(attn.to_k(encoder_hidden_states))
        v = attn.head_to_batch_dim(attn.to_v(encoder_hidden_states))
        probs = attn.get_attention_scores(q, k, attention_mask)
        self.original.add(self.layer, probs)
        out = attn.batch_to_head_dim(torch.bmm(probs, v))
        return attn.to_out[1](attn.to_out[0](out))


@contextmanager
def traced_like_the_original(unet: UNet2DConditionModel, side: int = LATENT):
    """Within: the original's hooks on the cross-attention of up and down blocks."""
    before, original = dict(unet.attn_processors), Original(side)
    chosen = [
        name for block in ("up_blocks", "down_blocks") for name in before if name.startswith(block) and "attn2" in name
    ]
    unet.set_attn_processor(before | {name: FullProcessor(original, layer) for layer, name in enumerate(chosen)})
    try:
        yield original
    finally:
        unet.set_attn_processor(before)


def full_size(unet: UNet2DConditionModel | None = None, whole: bool = False) -> Model:
    """:func:`~benchmarks.workloads.random_sd15` around toy-sd's tokenizer, as long as SD1.5's."""
    tokenizer = AutoTokenizer.from_pretrained(registry.folder() / "toy-sd" / "tokenizer", model_max_length=77)
    return random_sd15(tokenizer, LATENT, unet, whole)


def run() -> list[Figure]:
    """Ratios of whole generations without decoding; the maps of every word are computed to the end."""
    model = full_size()

    def walk(*interventions, steps: int = STEPS):
        with torch.no_grad():
            generate(
                model, PROMPT, steps=steps, guidance=GUIDANCE, size=(8 * LATENT, 8 * LATENT), decode=False,
                interventions=interventions,
            )  # fmt: skip

    def ours():
        daam = DAAM()
        walk(daam)
        for span in daam.maps[0].reading.all():
            daam.maps[0].map(span, size=(LATENT, LATENT))

    def original():
        with traced_like_the_original(model.pipe.unet) as traced:
            walk()
        traced.heat()

    walk(steps=1)
    seconds = interleaved({"off": walk, "on": ours, "original": original}, ROUNDS, warmup=0)
    on, full = ratio(seconds, "on", "off"), ratio(seconds, "original", "off")
    detail = (
        f"{STEPS} steps of both branches at 64x64 latents, {ROUNDS} rounds, {sum(seconds['off']) / ROUNDS:.0f} s each"
    )
    return [
        Figure("DAAM on / off", on.text(), "1.10 or less", on.median <= 1.10, detail, {"seconds": seconds}),
        Figure("original's way on / off", full.text(), "for comparison", None, detail),
        Figure("DAAM / original's way", ratio(seconds, "on", "original").text(), "for comparison", None, detail),
    ]
