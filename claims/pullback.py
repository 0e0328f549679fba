"""Local geometry of latents (Park et al. 2023, https://arxiv.org/abs/2307.12868): is it computed rightly, are its
directions editing directions, and do the paper's three statements hold in a model of toys?"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from claims import common
from claims.bars import Bar
from claims.common import percent
from claims.core import Context, Experiment, Part, Row
from sfumato.edit.pullback import Pullback
from sfumato.explain.latent_geometry import Geometry, LatentGeometry
from sfumato.hspace import Basis, Encoder, Jacobian, layer_of, local_basis
from sfumato.metrics import stats
from sfumato.metrics.geometry import geodesic_distance, principal_angles
from sfumato.models import Model
from sfumato.models.precision import fast_bf16
from sfumato.models.readers import load_clip
from sfumato.sampling import Path, generate
from sfumato.toybox import Scene, Toy, caption, render
from sfumato.toybox.dataset import draw_scene

SOURCE = "Park, Kwon, Choi, Jo, Uh 2023"
STEPS = 20
REPORT = 8300
RANK = 6
POWER = {"rank": RANK, "iterations": 60, "tolerance": 1e-3}  # converged, as in the tests
EARLY, LATE = 0.1, 0.8


def drawn(model: Any, texts: Sequence[str], seed: int, systems: Any = (), **options: Any) -> Any:
    given = {"steps": STEPS, "scheduler": None if model.flow else "ddim", "seed": seed, **options}
    return generate(model, list(texts), interventions=systems, **given)


def looked(model: Any, texts: Sequence[str], seed: int, **params: Any) -> Geometry:
    """The geometry along plain sampling without guidance."""
    look = LatentGeometry(**POWER, samples=1, **params)
    drawn(model, texts, seed, look, guidance=1.0, decode=False)
    return look.maps[0]


# -- exactness --------------------------------------------------------------------------------------------------------


def exact(name: str, context: Context) -> list[Row]:
    """The power method against the singular value decomposition of the whole Jacobian."""
    model = common.load(context, name)
    side = model.size_multiple * 2
    n = context.count(6, 1)
    condition = model.encode_text(["a red cube"], None, False)
    values, angles = [], []
    for i in range(n):
        x = torch.randn(1, *model.latent_shape(side, side), generator=torch.Generator().manual_seed(REPORT + i))
        encoder = Encoder(model, layer_of(model, None), torch.tensor(100.0 + 150 * i), condition, chunk=64)
        with torch.no_grad():
            jacobian = Jacobian(encoder, x, encoder.chunk)
            full = jacobian.vjp(torch.eye(jacobian.width))
            u, s, _ = torch.linalg.svd(full, full_matrices=False)
            basis = local_basis(encoder, x, RANK, iterations=60, tolerance=1e-3)
        values.append(float(((basis.s - s[:RANK]) / s[:RANK]).abs().max()))
        gaps = [k for k in range(1, RANK + 1) if s[k - 1] > 1.02 * s[k]]  # where the space of the first k is defined
        angles.append(float(principal_angles(basis.u[: gaps[-1]], u.T[: gaps[-1]]).max()) if gaps else 0.0)
    return [
        Row(
            claim=(
                f"{name}: the {RANK} largest singular values are those of the full Jacobian within 1 %, their spaces "
                "within 0.05 radians"
            ),
            source="linear algebra",
            measured=f"at most {100 * max(values):.3f} %, {max(angles):.4f} radians",
            baseline=f"full Jacobian of {full.shape[0]} x {full.shape[1]}",
            bars=[
                Bar(common.exactly(max(values), n), 1.0, 0.0, at_most=0.01, what="relative error of singular values"),
                Bar(common.exactly(max(angles), n), np.pi / 2, 0.0, at_most=0.05, what="radians between spaces"),
            ],
            n=n,
            data={"values": values, "angles": angles},
        )
    ]


# -- the three statements ---------------------------------------------------------------------------------------------


def over_time(name: str, context: Context) -> list[Row]:
    """Frequencies of directions, and distances between samples, early and late."""
    model = common.load(context, name)
    n = context.count(40, 2)
    found = looked(model, [""] * n, REPORT, at=[EARLY, LATE])
    early, late = (found.centroids[i].tolist() for i in (0, 1))
    lower = stats.share([a < b for a, b in zip(early, late, strict=True)])
    apart = [np.zeros((n, n)), np.zeros((n, n))]
    for i in (0, 1):
        for (a, b), far in zip(combinations(range(n), 2), found.between_samples(i), strict=True):
            apart[i][a, b] = apart[i][b, a] = far
    # one figure per sample, its mean distance to all others
    own = [(each.sum(1) / (n - 1)).tolist() for each in apart]
    means, nearer = [stats.bootstrap(each) for each in own], stats.paired_difference(*own)
    picture = context.save(f"latent-geometry-{name}.png", found.plots())
    return [
        Row(
            claim=(
                f"{name}: early directions (progress {EARLY:g}) lie at lower frequencies than late ones ({LATE:g}) in "
                "90 % of samples"
            ),
            source=f"{SOURCE}, first statement",
            measured=f"{percent(lower)}; {stats.bootstrap(early).text(digits=2)} cycles early",
            baseline=f"{stats.bootstrap(late).text(digits=2)} cycles late",
            bars=[Bar(lower, 0.5, 1.0, at_least=0.9)],
            n=n,
            picture=picture,
            data={"early": early, "late": late},
        ),
        Row(
            claim=f"{name}: tangent spaces of different samples are closer early than late",
            source=f"{SOURCE}, section 4.3",
            measured=f"{means[0].text(digits=2)} radians early, difference {nearer.text(digits=2)}",
            baseline=f"{means[1].text(digits=2)} radians late; unrelated spaces are about {RANK**0.5 * np.pi / 2:.2f}",
            bars=[Bar(nearer, 0.0, -means[1].value, below=0.0)],
            n=n,
            picture=picture,
            data={"early": means[0].to_json(), "late": means[1].to_json()},
        ),
    ]


def between_prompts(name: str, context: Context) -> list[Row]:
    """Similar prompts, similar tangent spaces; and less of it late."""
    model = common.load(context, name)
    count, seeds = context.count(24, 3), context.count(2, 1)
    texts = [caption(draw_scene("test", REPORT, i, 1 + i % 2), None, "plain").text for i in range(count)]
    texts = list(dict.fromkeys(texts))
    similar = text_similarity(context, texts)
    pairs = list(combinations(range(len(texts)), 2))
    far = {EARLY: np.zeros(len(pairs)), LATE: np.zeros(len(pairs))}
    for seed in range(seeds):
        found = looked(model, texts[:1], REPORT + seed, prompts=texts, at=[EARLY, LATE])
        for i, at in enumerate(far):
            far[at] += np.array([each for _, each in found.between_prompts(i)]) / seeds
    alike = [float(similar[a, b]) for a, b in pairs]
    rho = {at: correlation(pairs, alike, each, len(texts)) for at, each in far.items()}
    own = [[float(np.mean([x for pair, x in zip(pairs, far[at], strict=True) if k in pair])) for k in range(len(texts))]
           for at in (LATE, EARLY)]  # fmt: skip
    fades = stats.paired_difference(*own)
    return [
        Row(
            claim=(
                f"{name}: the more alike two prompts, the closer their tangent spaces at the same latents (rank "
                f"correlation -0.3 or below at progress {EARLY:g})"
            ),
            source=f"{SOURCE}, third statement",
            measured=rho[EARLY].text(digits=2),
            baseline=f"no relation: 0; at {LATE:g}: {rho[LATE].text(digits=2)}",
            bars=[Bar(rho[EARLY], 0.0, -1.0, at_most=-0.3, below=0.0)],
            headline=True,
            n=len(texts),
            leans_on="toy-clip's text similarity",
            data={"alike": alike, "early": far[EARLY].tolist(), "late": far[LATE].tolist()},
        ),
        Row(
            claim=f"{name}: the prompt matters less late: tangent spaces of two prompts are closer at {LATE:g}",
            source=f"{SOURCE}, third statement",
            measured=f"{far[LATE].mean():.2f} radians, difference {fades.text(digits=2)}",
            baseline=f"{far[EARLY].mean():.2f} radians at {EARLY:g}",
            bars=[Bar(fades, 0.0, -float(far[EARLY].mean()), below=0.0)],
            n=len(texts),
        ),
    ]


def correlation(
    pairs: Sequence[tuple[int, int]], first: Sequence[float], second: Sequence[float], n: int, draws: int = 1000
) -> stats.Interval:
    """Spearman's rank correlation over pairs of ``n`` things, with an interval from drawing things (pairs share them
    and are not independent)."""
    one, two = np.zeros((n, n)), np.zeros((n, n))
    for (a, b), x, y in zip(pairs, first, second, strict=True):
        one[a, b] = one[b, a] = x
        two[a, b] = two[b, a] = y
    rng, found = np.random.default_rng(0), []
    for _ in range(draws):
        at = rng.integers(n, size=n)
        rows, columns = np.triu_indices(n, 1)
        rows, columns = at[rows], at[columns]
        other = rows != columns  # a thing drawn twice is no pair
        if len(set(at.tolist())) > 2:
            found.append(spearmanr(one[rows, columns][other], two[rows, columns][other]).statistic)
    low, high = np.nanquantile(found, [0.025, 0.975])
    value = float(spearmanr(first, second).statistic)
    return stats.Interval(value, min(float(low), value), max(float(high), value), n)


def text_similarity(context: Context, texts: Sequence[str]) -> Tensor:
    """toy-clip's cosines (q q) of texts."""
    read = load_clip(context.folder("toy-clip")).text(texts)
    return read @ read.T


def complexity(name: str, context: Context) -> list[Row]:
    """U-Nets of one architecture and training, on simple scenes and on all kinds, from several starts."""
    base = common.load(context, name)
    n, starts = context.count(6, 2), context.count(3, 2)
    means: dict[str, list[float]] = {"simple": [], "complex": []}
    for start in range(starts):
        for kind, kept in means.items():
            context.report(f"  training on {kind} scenes, start {start}")
            model = context.once(
                f"pullback {kind} {start}", lambda kind=kind, start=start: trained(context, base, kind, start)
            )
            found = looked(model, [""] * n, REPORT, at=[0.1, 0.3, 0.5, 0.7, 0.9])
            between = combinations(range(len(found.points)), 2)
            each = [geodesic_distance(found.u[i, k], found.u[j, k]) for i, j in between for k in range(n)]
            kept.append(float(np.mean(each)))
    gap = stats.welch(means["simple"], means["complex"])
    return [
        Row(
            claim="simpler data, more consistent tangent spaces across time: closer than those of complex data",
            source=f"{SOURCE}, second statement",
            measured=f"{np.mean(means['simple']):.2f} radians, difference {gap.text(digits=2)}",
            baseline=f"all kinds of scenes {np.mean(means['complex']):.2f}; samples are trainings",
            bars=[Bar(gap, 0.0, -float(np.mean(means["complex"])), below=0.0)],
            n=starts,
            data=means,
        )
    ]


def trained(context: Context, base: Any, kind: str, start: int) -> Model:
    """A small unconditional U-Net, trained on latents of rendered scenes: one plain ball on grass by day, or any."""
    pictures = context.count(512, 16)
    if kind == "simple":
        rng = np.random.default_rng(REPORT)
        scenes = [
            Scene((Toy("ball", "red", x=float(rng.uniform(-1, 1)), z=float(rng.uniform(-0.5, 0.5))),))
            for _ in range(pictures)
        ]
    else:
        scenes = [draw_scene("train", REPORT, i) for i in range(pictures)]
    with torch.no_grad():
        side = base.default_size[0]
        frames = [render(scenes[i : i + 32], side).image for i in range(0, pictures, 32)]
        clean = torch.cat([base.encode_image(part) for part in frames])
        nothing = base.encode_text([""], None, False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(REPORT + start)
        pipe = copy.copy(base.pipe)
        pipe.unet = type(base.denoiser).from_config(base.denoiser.config)
    model = Model(pipe, name=f"toy-{kind}", card=base.card)
    scheduler = model.make_scheduler("ddim")
    model.timesteps(scheduler, STEPS)
    path, steps = Path(scheduler), context.count(500, 2)
    generator = torch.Generator().manual_seed(REPORT + start)
    optimizer = torch.optim.AdamW(model.denoiser.parameters(), lr=1e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    condition = nothing.rows([0] * 16)
    model.denoiser.train()
    for _ in range(steps):
        x0 = clean[torch.randint(pictures, (16,), generator=generator)]
        eps = torch.randn(x0.shape, generator=generator)
        t = torch.randint(1000, (16,), generator=generator)
        alpha, sigma = path.alpha_sigma(t)
        target = eps if path.kind == "epsilon" else alpha * eps - sigma * x0
        with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=fast_bf16("cpu")):
            loss = (model.predict(alpha * x0 + sigma * eps, t, condition, "cond").float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.denoiser.parameters(), 1.0)
        optimizer.step()
        decay.step()
    context.report(f"  {kind}: loss {float(loss):.3f}")
    model.denoiser.eval().requires_grad_(False)
    return model


# -- edits ------------------------------------------------------------------------------------------------------------


class Random(Pullback):
    """The same moves along random unit directions: the control."""

    def _basis(self, step: Any, row: int, condition: Any, x: Tensor, begin: Basis | None = None) -> Basis:
        generator = torch.Generator().manual_seed(step.run.seeds[row] + 77)
        n = self.params.direction
        v = torch.linalg.qr(torch.randn(x.numel(), n, generator=generator)).Q.T
        return Basis(v.view(n, *x.shape[1:]), torch.eye(n), torch.ones(n), 0, True, 0.0)


def edits(name: str, context: Context) -> list[Row]:
    """Moves along the first directions against random ones, and early against late."""
    model = common.load(context, name)
    texts = [prompt.text for prompt in common.prompts("test", REPORT + 40, context.count(80, 2), 1, "plain")]
    power = {**POWER, "rank": 3}
    made: dict[str, Tensor] = {"plain": drawn(model, texts, REPORT).pixels.clamp(-1, 1)}
    for k in (1, 2, 3):
        made[f"v{k}"] = drawn(model, texts, REPORT, Pullback(direction=k, at=0.2, **power)).pixels.clamp(-1, 1)
        made[f"random {k}"] = drawn(model, texts, REPORT, Random(direction=k, at=0.2)).pixels.clamp(-1, 1)
    made["late"] = drawn(model, texts, REPORT, Pullback(at=0.6, **power)).pixels.clamp(-1, 1)
    read = {arm: common.judge_of(context).read(pictures) for arm, pictures in made.items()}

    def changed(arm: str) -> list[bool]:
        return [seen(a) != seen(b) for a, b in zip(read[arm], read["plain"], strict=True)]

    def moved(arm: str) -> list[float]:
        return (made[arm] - made["plain"]).square().mean((1, 2, 3)).sqrt().tolist()

    # three directions of one prompt are no independent samples
    ours, other = (np.mean([changed(f"{arm}{k}") for k in (1, 2, 3)], 0).tolist() for arm in ("v", "random "))
    sizes, chance = (np.mean([moved(f"{arm}{k}") for k in (1, 2, 3)], 0).tolist() for arm in ("v", "random "))
    gain, ratio = stats.paired_difference(ours, other), stats.ratio(sizes, chance)
    early, late = ([fine(made[arm][i] - made["plain"][i]) for i in range(len(texts))] for arm in ("v1", "late"))
    coarse = stats.paired_difference(early, late)
    arms = ("plain", "v1", "v2", "v3", "random 1", "late")
    picture = context.save(f"pullback-{name}.png", common.sheet([list(made[arm][:10]) for arm in arms], names=arms))
    return [
        Row(
            claim=(
                f"{name}: moves along the first three directions change what the judge reads (shape, colour, ground, "
                "sky) 20 points more often than random directions of the same length"
            ),
            source=SOURCE,
            measured=f"{percent(stats.bootstrap(ours))}, difference {percent(gain)}; change of pixels "
            f"{ratio.text(digits=1)} times as large",
            baseline=f"random {percent(stats.bootstrap(other))}",
            bars=[Bar(gain, 0.0, 1 - float(np.mean(other)), at_least=0.2, above=0.0)],
            n=len(ours),
            leans_on=common.trust_text(context, "shape", "color"),
            picture=picture,
            data={"ours": ours, "random": other, "ratio": ratio.to_json()},
        ),
        Row(
            claim=f"{name}: early moves (progress 0.2) change what is coarse, late ones (0.6) what is fine",
            source=SOURCE,
            measured=f"share of the change above 4 cycles {percent(stats.bootstrap(early))}, "
            f"difference {percent(coarse)}",
            baseline=f"late {percent(stats.bootstrap(late))}",
            bars=[Bar(coarse, 0.0, -float(np.mean(late)), below=0.0)],
            n=len(texts),
            picture=picture,
            data={"early": early, "late": late},
        ),
    ]


def seen(reading: Any) -> tuple[str, ...]:
    """What the judge reads of a picture's clearest toy and its scenery."""
    toy = reading.objects[0] if reading.objects else None
    return (reading.ground, reading.sky) + (() if toy is None else (toy.shape, toy.color))


def fine(change: Tensor) -> float:
    """Share of the power of a change (3 h w) at more than 4 cycles across the picture."""
    power = torch.fft.fft2(change.double()).abs().square().sum(0)
    h, w = power.shape
    y, x = torch.fft.fftfreq(h)[:, None] * h, torch.fft.fftfreq(w)[None] * w
    return float(power[(y.square() + x.square()).sqrt() > 4].sum() / power.sum().clamp_min(1e-12))


def parts(name: str) -> tuple[Part, ...]:
    """The parts of one model."""
    return (
        Part(f"{name}: exactness", (name,), lambda context: exact(name, context)),
        Part(f"{name}: over time", (name,), lambda context: over_time(name, context)),
        Part(f"{name}: complexity", (name,), lambda context: complexity(name, context)),
        Part(f"{name}: prompts", (name, "toy-clip"), lambda context: between_prompts(name, context)),
        Part(f"{name}: edits", (name, "toy-judge"), lambda context: edits(name, context)),
    )


EXPERIMENT = Experiment(
    key="pullback",
    title="Pullback and latent geometry: directions without labels, and how the latent space bends",
    intro=(
        f"Local bases of {RANK} directions (50 in the paper) at toy-sd's bottleneck, along sampling without guidance "
        "and without text where prompts are not the point. Complexity: two small U-Nets of one architecture, start and "
        "training, one on a red ball on grass and one on all scenes; one training of each. Random directions: the same "
        "moves along random unit vectors."
    ),
    file=__file__,
    parts=parts("toy-sd"),
)
