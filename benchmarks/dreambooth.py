"""A LoRA step of DreamBooth on a full-size SD1.5 U-Net: time and peak memory against the loop of diffusers' script."""

from __future__ import annotations

import statistics

from benchmarks.core import Figure, in_process

LATENT, STEPS, ROUNDS = 32, 3, 2
CODE = """
import json, resource, sys, tempfile, time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.daam import full_size

mode, side, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = full_size()
pipe, pixels = model.pipe, side * model.family.scale
folder = Path(tempfile.mkdtemp())
for i in range(3):
    noise = np.random.default_rng(i).integers(0, 255, (pixels, pixels, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / f"{i}.png")
before, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
if mode == "ours":
    from sfumato.protocol import Work
    from sfumato.teach.dreambooth import DreamBooth

    told = lambda step, steps, log: times.append(time.perf_counter())
    DreamBooth(class_noun="ball", name="sks", prior=0, steps=steps + 1, size=pixels).teach(
        model, folder, work=Work(on_progress=told)
    )
else:
    from diffusers import DDPMScheduler
    from peft import LoraConfig

    pipe.unet.requires_grad_(False)
    pipe.vae.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    targets = ["to_k", "to_q", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets))
    learning = [p for p in pipe.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4, weight_decay=1e-2)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    pictures = [torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1).float() / 127.5 - 1
                for p in sorted(folder.iterdir())]
    pipe.unet.train()
    for step in range(steps + 1):
        picture = pictures[step % 3][None]
        latents = pipe.vae.encode(picture).latent_dist.sample() * pipe.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        t = torch.randint(0, 1000, (1,))
        ids = pipe.tokenizer("a sks ball", padding="max_length", max_length=77, return_tensors="pt").input_ids
        hidden = pipe.text_encoder(ids)[0]
        predicted = pipe.unet(scheduler.add_noise(latents, noise, t), t, hidden, return_dict=False)[0]
        F.mse_loss(predicted.float(), noise.float(), reduction="mean").backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"before": before / 1024, "peak": peak / 1024, "steps": np.diff(times).tolist()}))
"""


def run() -> list[Figure]:
    """Ratios of the median step and of the peak resident set above the loaded model, in fresh processes."""
    found: dict[str, list[dict]] = {"ours": [], "script": []}
    for _ in range(ROUNDS):
        for mode, each in found.items():
            each.append(in_process(CODE, mode, str(LATENT), str(STEPS)))
    step = {mode: statistics.median(t for got in each for t in got["steps"]) for mode, each in found.items()}
    peak = {mode: statistics.median(got["peak"] - got["before"] for got in each) for mode, each in found.items()}
    shared = f"{LATENT}x{LATENT} latents, batch 1, rank 4, no prior, {ROUNDS} processes of {STEPS} steps each"
    return [
        Figure(
            "LoRA step / diffusers' script, time", f"{step['ours'] / step['script']:.2f}", "1.00 or less",
            step["ours"] <= step["script"], f"{step['ours']:.1f} s and {step['script']:.1f} s; {shared}",
            {mode: [got["steps"] for got in each] for mode, each in found.items()},
        ),
        Figure(
            "LoRA step / diffusers' script, memory above the model", f"{peak['ours'] / peak['script']:.2f}",
            "1.00 or less", peak["ours"] <= peak["script"],
            f"{peak['ours']:.0f} MiB and {peak['script']:.0f} MiB; {shared}",
            {mode: [got["peak"] for got in each] for mode, each in found.items()},
        ),
    ]  # fmt: skip
