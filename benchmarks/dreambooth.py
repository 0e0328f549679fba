"""A LoRA step of DreamBooth on SD1.5, all parts of full size: time and peak memory against the loop of diffusers'
script, which encodes picture and text in every step.

Each contestant is a process of its own on one thread, and they take turns. Time on the processor stands beside time on
the clock: it says the same on a machine that has other work.
"""

from __future__ import annotations

import statistics

from benchmarks.core import Figure, Spread, in_process

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
model = full_size(whole=True)
pipe, pixels = model.pipe, side * model.family.scale
folder = Path(tempfile.mkdtemp())
for i in range(3):
    noise = np.random.default_rng(i).integers(0, 255, (pixels, pixels, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / f"{i}.png")
before, times = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []


def told(*_):
    times.append((time.perf_counter(), time.process_time()))


if mode == "ours":
    from sfumato.protocol import Work
    from sfumato.teach.dreambooth import DreamBooth

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
        told()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
wall, cpu = np.diff(times, axis=0).T.tolist()
print(json.dumps({"before": before / 1024, "peak": peak / 1024, "wall": wall, "cpu": cpu}))
"""


def run() -> list[Figure]:
    """Ratios, round by round, of the median step and of the peak resident set above the loaded model."""
    found: dict[str, list[dict]] = {"ours": [], "script": []}
    for turn in range(ROUNDS):
        for mode in ("ours", "script") if turn % 2 == 0 else ("script", "ours"):
            found[mode].append(in_process(CODE, mode, str(LATENT), str(STEPS), threads=1))
    measured = {
        "time on the processor": ("s", lambda got: statistics.median(got["cpu"])),
        "time on the clock": ("s", lambda got: statistics.median(got["wall"])),
        "memory above the model": ("MiB", lambda got: got["peak"] - got["before"]),
    }
    shared = f"{LATENT}x{LATENT} latents, batch 1, rank 4, no prior, {ROUNDS} processes of {STEPS} steps each"
    figures = []
    for name, (unit, take) in measured.items():
        each = {mode: [take(got) for got in several] for mode, several in found.items()}
        ratio = Spread.of(a / b for a, b in zip(each["ours"], each["script"], strict=True))
        ours, script = (statistics.median(values) for values in each.values())
        digits, busy = 1 if unit == "s" else 0, name == "time on the clock"  # which is others' too: only reported
        figures.append(
            Figure(
                f"LoRA step / diffusers' script, {name}", ratio.text(), "" if busy else "1.00 or less",
                None if busy else ratio.median <= 1,
                f"{ours:.{digits}f} {unit} and {script:.{digits}f} {unit}; {shared}", each,
            )
        )  # fmt: skip
    return figures
