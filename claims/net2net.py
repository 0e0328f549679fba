"""Net2Net: captions followed, the rest as free as in the data, words exchanged; labels and small pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from claims import codes
from claims.core import Context, Experiment, Part, Row
from sfumato import sheets
from sfumato.edit.net2net import NetExpert, Translation, expert, fit_translation
from sfumato.toybox import COLORS
from sfumato.toybox.cues import CUE_SHAPES
from sfumato.training import Draw, Player, fit
from sfumato.translation.examples import LabelledVectors
from sfumato.translation.translator import FlowParams, fit_translator

SOURCE = "Rombach, Esser, Ommer 2020"
FLOW = {"blocks": 8, "hidden": 128, "depth": 1, "steps": 1200, "batch": 128, "lr": 2e-3}
SAID, UNSAID = ("shape", "color"), ("texture", "place", "ground", "sky")
EACH = 8


def caption(shape: str, color: str) -> str:
    return f"a {color} {shape}"


def captioned(examples: LabelledVectors) -> LabelledVectors:
    """The same pictures with captions that name shape and colour alone."""
    toys = [scene.toys[0] for scene in examples.scenes]
    return replace(examples, texts=[caption(toy.shape, toy.color) for toy in toys])


CAPTIONS = [(shape, color) for shape in CUE_SHAPES for color in COLORS]


def second(context: Context) -> NetExpert:
    """toy-ae as the expert that makes the pictures; its codes of the training pictures are read once."""
    network, pixels = codes.autoencoder(context), codes.train_set(context).pixels
    z, spread = codes.codes(context, "train")

    def encode(x: Tensor) -> Tensor:
        return z if x is pixels else network.vectors(x)[0]

    return NetExpert(
        "toy-ae", "picture", encode, network.pictures, lambda x: spread if x is pixels else None, network.side
    )


def translation(context: Context, first: str, seed: int, concept: str = "") -> Translation:
    def made() -> Translation:
        examples = captioned(codes.train_set(context))
        params = FlowParams(**FLOW | {"seed": seed, "steps": context.count(FLOW["steps"], 3)})
        name = str(context.folder(first)) if first == "toy-clip" else first
        found = fit_translation(expert(name, examples.names.get(concept, [])), second(context), examples, params)
        context.report(f"  fitted {first} {seed}")
        return found

    return context.once(f"net2net {first} {seed}", made)


Sampler = Callable[[list[str], int, int], Tensor]
"""Codes (b n 64) for texts, n each, from a seed."""


def ours(context: Context, seed: int) -> Sampler:
    tau = translation(context, "toy-clip", seed)
    return lambda texts, n, s: tau.translator.sample(tau.first.encode(texts), n, s)


def baselines(context: Context) -> dict[str, Sampler]:
    """A regressor (one code for a text), a conditional VAE on codes, and the draws of an unconditional flow that are
    nearest to the regressor's code."""

    def made() -> dict[str, Sampler]:
        tau = translation(context, "toy-clip", 0)
        z, c = codes.codes(context, "train")[0], tau.first.encode(captioned(codes.train_set(context)).texts)
        mean, std, centre, scale = z.mean(0), z.std(0), c.mean(0), c.std(0)
        y, x = (z - mean) / std, (c - centre) / scale
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            regressor = mlp(x.shape[1], 64)
            encoder, decoder = mlp(64 + x.shape[1], 64), mlp(32 + x.shape[1], 64)
        noise = nn.Parameter(torch.zeros(()))

        def regress(draw: Draw) -> Tensor:
            rows = draw.indices(len(y), 128)
            return F.mse_loss(regressor(x[rows]), y[rows])

        def evidence(draw: Draw) -> Tensor:
            rows = draw.indices(len(y), 128)
            mu, logvar = encoder(torch.cat([y[rows], x[rows]], 1)).chunk(2, 1)
            u = mu + (logvar / 2).exp() * torch.randn(mu.shape, generator=draw.generator("u"))
            error = (decoder(torch.cat([u, x[rows]], 1)) - y[rows]).square().sum(1)
            kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(1)
            return (0.5 * error * (-noise).exp() + 32 * noise + kl).mean()

        steps = context.count(FLOW["steps"], 3)
        fit(Player(regress, torch.optim.Adam(regressor.parameters(), lr=1e-3), regressor), steps)
        parts = {"encoder": encoder, "decoder": decoder}
        tensors = [*encoder.parameters(), *decoder.parameters(), noise]
        fit(Player(evidence, torch.optim.Adam(tensors, lr=1e-3), parts), steps)
        free = fit_translator(z, steps=steps, seed=5, **{k: FLOW[k] for k in ("blocks", "hidden", "depth")}).translator
        pool = free.sample(n=context.count(4000, 64), seed=77)

        def told(texts: list[str]) -> Tensor:
            return (tau.first.encode(texts) - centre) / scale

        @torch.no_grad()
        def by_regressor(texts: list[str], n: int, seed: int) -> Tensor:
            return (regressor(told(texts)) * std + mean)[:, None].repeat(1, n, 1)

        @torch.no_grad()
        def by_vae(texts: list[str], n: int, seed: int) -> Tensor:
            given = told(texts).repeat_interleave(n, 0)
            u = torch.randn(len(given), 32, generator=torch.Generator().manual_seed(seed))
            return (decoder(torch.cat([u, given], 1)) * std + mean).unflatten(0, (len(texts), n))

        @torch.no_grad()
        def by_neighbour(texts: list[str], n: int, seed: int) -> Tensor:
            wanted = regressor(told(texts)) * std + mean
            return pool[torch.cdist(wanted / std, pool / std).topk(n, largest=False).indices]

        return {"regressor": by_regressor, "conditional VAE": by_vae, "unconditional flow, nearest": by_neighbour}

    return context.once("net2net baselines", made)


def mlp(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inside, 256), nn.LeakyReLU(0.1), nn.Linear(256, 256), nn.LeakyReLU(0.1), nn.Linear(256, outside)
    )


def measured(context: Context, sampler: Sampler, seed: int = 0) -> dict[str, float]:
    """Share of samples with what the caption says, and total variation of what it does not say from the data's."""
    names, network = codes.train_set(context).names, codes.autoencoder(context)
    z = sampler([caption(*each) for each in CAPTIONS], EACH, 10_000 * seed + 3)
    read = codes.probe_of(context)
    said = read(network.pictures(z.flatten(0, 1)))
    out, right = {}, []
    for index, concept in enumerate(SAID):
        wanted = torch.tensor([names[concept].index(each[index]) for each in CAPTIONS]).repeat_interleave(EACH)
        out[concept] = codes.accuracy(said[concept], wanted)
        right.append(said[concept] == wanted)
    out["both"] = float(torch.stack(right).all(0).float().mean())
    data = context.once("data law", lambda: read(network.pictures(codes.codes(context, "train")[0])))
    for concept in UNSAID:
        k = len(names[concept])
        law, got = (torch.bincount(x[concept], minlength=k).float() for x in (data, said))
        out[f"tv {concept}"] = float(0.5 * (law / law.sum() - got / got.sum()).abs().sum())
    out["tv"] = float(np.mean([out[f"tv {c}"] for c in UNSAID]))
    # a sampler that gives one picture for each caption has no freedom left, whatever the pictures are over all captions
    apart = said["ground"].unflatten(0, (len(CAPTIONS), EACH))
    out["grounds of 8"] = float(np.mean([len(set(row.tolist())) for row in apart]))
    return out


def follows(context: Context) -> list[Row]:
    """Faithful to the caption, free in the rest."""
    found = [measured(context, ours(context, seed), seed) for seed in codes.SEEDS]
    others = {name: measured(context, sampler) for name, sampler in baselines(context).items()}
    ceiling = codes.ceiling(context).reconstructions
    mean = {key: float(np.mean([each[key] for each in found])) for key in found[0]}
    limit = {c: ceiling[c] for c in SAID}
    told = f"shape {100 * mean['shape']:.0f} %, colour {100 * mean['color']:.0f} %, both {100 * mean['both']:.0f} %"
    rest = ", ".join(f"{c} {mean[f'tv {c}']:.2f}" for c in UNSAID)
    beside = "; ".join(
        f"{name}: shape {100 * each['shape']:.0f} %, colour {100 * each['color']:.0f} %"
        for name, each in others.items()
    )
    spread = "; ".join(_spread(name, each) for name, each in others.items())
    worst = max(max(each[f"tv {c}"] for c in UNSAID) for each in found)
    return [
        Row(
            claim="samples for a caption show the shape and the colour it names, 0.93 of what the probe reads from"
            " reconstructions",
            source=f"{SOURCE}, section 4.1 (text to image)",
            measured=f"{told}; shape over seeds {codes.over_seeds([each['shape'] for each in found])}",
            baseline=beside,
            holds=all(mean[c] >= 0.93 * limit[c] for c in SAID),
            n=len(CAPTIONS) * EACH * len(found),
            leans_on=codes.ceiling(context).text("shape", "color"),
            picture=context.save("net2net-text.png", text_sheet(context)),
            data={"ours": found, "baselines": others},
        ),
        Row(
            claim="what a caption does not say is as free as in the data: total variation 0.15 or less for each"
            " concept, a"
            " third of the regressor's",
            source=f"{SOURCE}, equation 7 (the residual is independent of the condition)",
            measured=f"{rest}; different grounds among 8 samples {mean['grounds of 8']:.1f}",
            baseline=spread,
            holds=bool(worst <= 0.15 and mean["tv"] <= others["regressor"]["tv"] / 3),
            n=len(CAPTIONS) * EACH * len(found),
            leans_on=codes.ceiling(context).text(*UNSAID),
        ),
    ]


def _spread(name: str, each: dict[str, float]) -> str:
    told = ", ".join(f"{c} {each['tv ' + c]:.2f}" for c in UNSAID)
    return f"{name}: {told}, different grounds {each['grounds of 8']:.1f}"


def exchanged(context: Context) -> list[Row]:
    """One word of the caption changed, the residual kept."""
    examples, read, network = codes.test_set(context), codes.probe_of(context), codes.autoencoder(context)
    names = examples.names
    before = read(network.pictures(codes.codes(context, "test")[0]))
    toys = [scene.toys[0] for scene in examples.scenes]
    rng = np.random.default_rng(4)
    shapes = [str(rng.choice([s for s in CUE_SHAPES if s != toy.shape])) for toy in toys]
    colors = [str(rng.choice([c for c in COLORS if c != toy.color])) for toy in toys]
    shown = [caption(toy.shape, toy.color) for toy in toys]
    asked = {
        "shape": [caption(s, toy.color) for s, toy in zip(shapes, toys, strict=True)],
        "color": [caption(toy.shape, c) for c, toy in zip(colors, toys, strict=True)],
    }
    wanted = {
        "shape": torch.tensor([names["shape"].index(s) for s in shapes]),
        "color": torch.tensor([names["color"].index(c) for c in colors]),
    }

    def score(after: dict[str, Tensor], word: str) -> tuple[float, float]:
        other = "color" if word == "shape" else "shape"
        kept = [codes.accuracy(after[c], before[c]) for c in (*UNSAID, other)]
        return codes.accuracy(after[word], wanted[word]), float(np.mean(kept))

    found: dict[str, list[tuple[float, float]]] = {"shape": [], "color": []}
    for seed in codes.SEEDS:
        tau = translation(context, "toy-clip", seed)
        for word in found:
            found[word].append(score(read(tau.exchange(examples.pixels, shown, asked[word])), word))
    mean = {word: tuple(np.mean(each, 0)) for word, each in found.items()}
    fresh = {}
    for word in found:
        z = ours(context, 0)(asked[word], 1, 91)[:, 0]
        fresh[word] = score(read(network.pictures(z)), word)
    return [
        Row(
            claim="with one word of the caption changed and the residual kept, the word is followed in 85 % and"
            " the rest"
            " stays in 80 %",
            source=f"{SOURCE}, section 4.2 (exchange)",
            measured="; ".join(
                f"{word}: followed {100 * a:.0f} %, rest kept {100 * b:.0f} %" for word, (a, b) in mean.items()
            ),
            baseline="a new residual: "
            + "; ".join(
                f"{word}: followed {100 * a:.0f} %, rest kept {100 * b:.0f} %" for word, (a, b) in fresh.items()
            ),
            holds=all(a >= 0.85 and b >= 0.8 for a, b in mean.values()),
            n=len(examples) * 2,
            leans_on=codes.ceiling(context).text(*SAID, *UNSAID),
            data={"seeds": found, "fresh": fresh},
        )
    ]


def text_sheet(context: Context, n: int = 7) -> Any:
    """Samples for four captions, and pictures whose colour and shape are changed by a word."""
    tau = translation(context, "toy-clip", 0)
    told = [("ball", "red"), ("cube", "blue"), ("cone", "yellow"), ("ring", "purple")]
    rows = [(caption(*each), list(tau.translate([caption(*each)], n, seed=11)[0])) for each in told]
    test = codes.test_set(context)
    pixels, toys = test.pixels[:n], [scene.toys[0] for scene in test.scenes[:n]]
    shown = [caption(toy.shape, toy.color) for toy in toys]
    n = len(pixels)
    rows = [(label, cells[:n]) for label, cells in rows]
    rows.append(("pictures", list(pixels)))
    rows.append(("... a green one", list(tau.exchange(pixels, shown, [caption(toy.shape, "green") for toy in toys]))))
    rows.append(("... a ball", list(tau.exchange(pixels, shown, [caption("ball", toy.color) for toy in toys]))))
    title = "toy-clip's texts translated into toy-ae's codes: samples, and pictures with one word changed"
    return sheets.sheet([x for _, row in rows for x in row], n, rows=[r for r, _ in rows], title=title, scale=2)


def independence(context: Context) -> list[Row]:
    """What can be read of the condition from the residual, in nats."""
    train, test = captioned(codes.train_set(context)), captioned(codes.test_set(context))
    z, held = codes.codes(context, "train")[0], codes.codes(context, "test")[0]
    got: dict[str, list[float]] = {c: [] for c in SAID}
    for seed in codes.SEEDS:
        tau = translation(context, "toy-clip", seed)
        v = tau.translator.residual(z, tau.first.encode(train.texts))
        u = tau.translator.residual(held, tau.first.encode(test.texts))
        for c in SAID:
            got[c].append(shared_nats(context, v, train.labels[c], u, test.labels[c]))
    raw = {c: shared_nats(context, z, train.labels[c], held, test.labels[c]) for c in SAID}
    return [
        Row(
            claim="the residual says nothing of the condition: 0.05 nats or less of shape and of colour",
            source=f"{SOURCE}, equation 7",
            measured=", ".join(f"{c} {np.mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for c, v in got.items()),
            baseline="the codes themselves: " + ", ".join(f"{c} {v:.2f}" for c, v in raw.items()) + " nats",
            holds=bool(max(max(v) for v in got.values()) <= 0.05 < min(raw.values())),
            n=len(test),
            leans_on="a classifier of two hidden layers; entropy less its cross-entropy on unseen scenes, at"
            " its best step",
            data={"ours": got, "raw": raw},
        )
    ]


def shared_nats(context: Context, x: Tensor, labels: Tensor, y: Tensor, truth: Tensor) -> float:
    """A lower bound of the information (nats) that vectors hold of a label: the label's entropy less the best
    cross-entropy that a classifier reaches on unseen rows; 0 if it never beats the frequencies."""
    counts = torch.bincount(labels).float() / len(labels)
    entropy = float(-(counts * counts.clamp_min(1e-9).log()).sum())
    mean, std = x.mean(0), x.std(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        net = mlp(x.shape[1], len(counts))
    best = entropy

    def loss(draw: Draw) -> Tensor:
        rows = draw.indices(len(x), 128)
        return F.cross_entropy(net((x[rows] - mean) / std), labels[rows])

    def look(_: Any) -> None:
        nonlocal best
        with torch.no_grad():
            best = min(best, float(F.cross_entropy(net((y - mean) / std), truth)))

    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.05)
    fit(Player(loss, optimizer, net), context.count(400, 3), log_every=20, on_progress=look)
    return entropy - best


def others(context: Context) -> list[Row]:
    """Labels and small pictures as the first expert."""
    names, read, network = codes.train_set(context).names, codes.probe_of(context), codes.autoencoder(context)
    tau = translation(context, "label:scenery", 0, "scenery")
    said = read(tau.translate(names["scenery"], EACH, seed=5).flatten(0, 1))
    split = [name.split(", ") for name in names["scenery"]]
    hits = {
        c: codes.accuracy(said[c], torch.tensor([names[c].index(each[i]) for each in split]).repeat_interleave(EACH))
        for i, c in enumerate(("ground", "sky"))
    }
    small = translation(context, "pixels:16", 0)
    pixels = codes.test_set(context).pixels[: context.count(150, 6)]
    drawn = small.translate(pixels, 4, seed=5)
    shrink = small.first.encode
    error = (shrink(drawn.flatten(0, 1)) - shrink(pixels).repeat_interleave(4, 0)).square().mean((1, 2, 3))
    psnr = float((-10 * torch.log10(error / 4)).mean())
    through = network.pictures(network.vectors(pixels)[0])

    def decibels(a: Tensor) -> float:
        return float((-10 * torch.log10((shrink(a) - shrink(pixels)).square().mean((1, 2, 3)) / 4)).mean())

    limit, chance, apart = decibels(through), decibels(through.roll(1, 0)), float(drawn.std(1).mean())
    rows = [("16 px", F.interpolate(shrink(pixels[:7]), pixels.shape[-2:]))]
    rows += [(f"sample {k + 1}", drawn[:7, k]) for k in range(3)]
    rows.append(("64 px", pixels[:7]))
    picture = sheets.sheet(
        [x for _, row in rows for x in row], len(rows[0][1]), rows=[r for r, _ in rows], scale=2, title="16 px to 64 px"
    )  # fmt: skip
    return [
        Row(
            claim="25 labels of ground and sky translated into toy-ae's codes: both are right in 90 % of the samples",
            source=f"{SOURCE}, section 4 (labels to images)",
            measured=", ".join(f"{c} {100 * v:.0f} %" for c, v in hits.items()),
            baseline="chance 20 %",
            holds=all(v >= 0.9 for v in hits.values()),
            n=len(split) * EACH,
            leans_on=codes.ceiling(context).text("ground", "sky"),
        ),
        Row(
            claim="16 px pictures translated to 64 px: shrunk again, samples match at 25 dB while they differ"
            " from one another",
            source=f"{SOURCE}, section 4.3 (stochastic super-resolution; the 16 px pictures themselves are the"
            f" condition)",
            measured=f"{psnr:.1f} dB; deviation among samples {apart:.3f} of [-1, 1]",
            baseline=f"toy-ae's reconstructions {limit:.1f} dB (the most there is), those of other pictures"
            f" {chance:.1f} dB",
            holds=bool(psnr >= 25 and apart > 0.01),
            n=len(pixels) * 4,
            picture=context.save("net2net-small.png", picture),
        ),
    ]


EXPERIMENT = Experiment(
    key="net2net",
    title="one frozen network translated into another",
    intro=(
        "First expert: toy-clip's text tower, captions that name shape and colour alone (a red ball). Second: toy-ae."
        " Flows of 8 blocks and 128 hidden units, 1200 steps, on the pictures that toy-ae learnt from; three seeds for"
        " texts. All 32 captions occur in training, the scenes that are edited do not."
    ),
    file=__file__,
    parts=(
        Part("text", ("toy-ae", "toy-clip"), follows),
        Part("exchange", ("toy-ae", "toy-clip"), exchanged),
        Part("independence", ("toy-ae", "toy-clip"), independence),
        Part("labels and small pictures", ("toy-ae",), others),
    ),
)
