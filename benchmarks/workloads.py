"""What two trees of the repository are both asked to do, for :mod:`benchmarks.beside`; only names that both have.

python benchmarks/workloads.py serve            # a line of standard input is a job; answers with its CPU seconds
python benchmarks/workloads.py peak STEPS DAAM  # one generation; prints the peak of the resident set in MiB
"""

from __future__ import annotations

import functools
import json
import resource
import sys
import time
from typing import Any

from sfumato.explain.daam import DAAM
from sfumato.models import Model, load
from sfumato.sampling import Intervention, generate

PROMPTS = [
    "a red cube and a blue ball on the grass",
    "a small green striped cone",
]
STEPS, GUIDANCE = 10, 4.0
LATENT = 32  # side of the full-size U-Net's latents
SIDE = 64  # of the pictures whose memory is measured


class Idle(Intervention):
    """Takes part in everything and changes nothing."""

    def before_predict(self, step):
        self.mark(step)

    def after_predict(self, step):
        self.mark(step)

    def after_step(self, step):
        self.mark(step)


def random_sd15(tokenizer: Any, latent: int, unet: Any = None, whole: bool = False) -> Model:
    """SD1.5's U-Net (860 M parameters, random weights, latents of side ``latent``), or another one, with a small text
    encoder and autoencoder, or with ``whole`` those of SD1.5's own size."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=768, intermediate_size=768, num_hidden_layers=1, num_attention_heads=12,
        max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    if whole:
        from sfumato.models import architectures  # here: trees of before the rebuild run the others, and have none

        vae = AutoencoderKL.from_config(architectures.config_of("sd1", "vae"))
        text.num_hidden_layers, text.intermediate_size = 12, 3072
    else:
        vae = AutoencoderKL(block_out_channels=(32, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4,
                            up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4)  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet or UNet2DConditionModel(sample_size=latent, cross_attention_dim=768),
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.eval().requires_grad_(False)
    return Model(pipe, name="sd15-random")


@functools.cache
def model(name: str) -> Model:
    """A built-in model, or ``sd15``: :func:`random_sd15` around toy-sd's tokenizer."""
    return random_sd15(load("toy-sd").pipe.tokenizer, LATENT) if name == "sd15" else load(name)


def work(name: str, kind: str) -> None:
    """One generation: ``plain``, with five interventions that change nothing (``idle``), or with word maps (``daam``).

    Built-in models draw two pictures, text encoding and decoding included; ``sd15`` two steps of one, not decoded.
    """
    daam = DAAM()
    interventions = {"plain": [], "idle": [Idle() for _ in range(5)], "daam": [daam]}[kind]
    small = {"steps": STEPS, "guidance": GUIDANCE}
    large = {"steps": 2, "guidance": 7.5, "size": (8 * LATENT, 8 * LATENT), "decode": False}
    prompts, options = (PROMPTS[:1], large) if name == "sd15" else (PROMPTS, small)
    generate(model(name), prompts, seed=0, interventions=interventions, **options)
    if kind == "daam":
        for maps in daam.maps:
            for span in maps.reading.all():
                maps.map(span)


def serve() -> None:
    """Answers ``NAME KIND`` by the CPU seconds of the work, until the input ends."""
    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for line in sys.stdin:
        start = time.process_time()
        work(*line.split())
        print(json.dumps(time.process_time() - start), flush=True)


def peak(steps: str, daam: str) -> None:
    """Prints the peak of the resident set, in MiB, of one generation with or without word maps."""
    import torch

    torch.set_num_threads(1)
    interventions = [DAAM()] if daam == "on" else []
    with torch.no_grad():
        generate(
            load("toy-sd"), PROMPTS[0], steps=int(steps), size=(SIDE, SIDE), decode=False, interventions=interventions
        )
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


if __name__ == "__main__":
    {"serve": serve, "peak": peak}[sys.argv[1]](*sys.argv[2:])
