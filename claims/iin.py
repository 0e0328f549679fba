"""IIN: dimensions of concepts, swaps of one block, losslessness, sampling, and a concept from two drawings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from claims import codes
from claims.core import Context, Experiment, Part, Row
from sfumato import sheets
from sfumato.explain.iin import (
    Interpretation,
    concept_pairs,
    dimensions,
    fit_factors,
    floor_of,
    from_sketches,
)
from sfumato.explain.iin.report import linear_accuracy
from sfumato.explain.iin.sketches import drawn_in
from sfumato.metrics import stats
from sfumato.models.readers import load_net
from sfumato.toybox import Camera, Scene, Toy, render
from sfumato.translation.examples import agreeing
from sfumato.translation.networks import network_of
from sfumato.translation.translator import FlowParams, fit_translator

SOURCE = "Esser, Rombach, Ommer 2020"
CONCEPTS = ("shape", "color", "place", "scenery")
PAIRS = 4000
FLOW = {"blocks": 8, "hidden": 128, "depth": 1, "steps": 1200, "batch": 128, "lr": 2e-3}


def flow_of(context: Context, seed: int) -> FlowParams:
    return FlowParams(**FLOW | {"seed": seed, "steps": context.count(FLOW["steps"], 3)})


def rows_of(context: Context, seed: int) -> dict[str, Tensor]:
    labels = codes.train_set(context).labels
    return {c: agreeing(labels[c], PAIRS, 1000 * seed + i, c) for i, c in enumerate(CONCEPTS)}


def fitted(context: Context, seed: int) -> Interpretation:
    """The translator of toy-ae's codes, with blocks as large as estimated."""

    def made() -> Interpretation:
        z, spread = codes.codes(context, "train")
        rows = rows_of(context, seed)
        sizes = dimensions(z, rows).dimensions
        return fit_factors(z, concept_pairs(rows), sizes, flow_of(context, seed), spread=spread)

    return context.once(f"iin {seed}", made)


def estimated(context: Context) -> list[Row]:
    """Dimensions from pairs, against what linear readers find."""
    examples = codes.train_set(context)
    nets = {"toy-ae": codes.autoencoder(context)}
    nets["toy-cnn"] = network_of(load_net(context.folder("toy-cnn")), "resnet.encoder.stages.3", "toy-cnn")
    asked = ("shape", "color", "ground", "sky", "place")
    found, linear = {}, {}
    for name, network in nets.items():
        z = codes.codes(context, "train")[0] if name == "toy-ae" else network.vectors(examples.pixels)[0]
        each = [
            dimensions(z, {c: agreeing(examples.labels[c], PAIRS, 7 * s + i, c) for i, c in enumerate(asked)})
            for s in codes.SEEDS
        ]
        found[name] = each
        linear[name] = {}
        for c in asked:
            chance = float(torch.bincount(examples.labels[c]).max()) / len(examples)
            linear[name][c] = (linear_accuracy(z, examples.labels[c]) - chance) / (1 - chance)
    floor = floor_of(64, len(asked))

    def told(name: str) -> str:
        parts = []
        for c in asked:
            sizes = [table.dimensions[c] for table in found[name]]
            parts.append(f"{c} {np.mean(sizes):.0f} (score {found[name][0].scores[c].text(digits=2)})")
        return ", ".join(parts)

    def least(name: str, concept: str) -> int:
        return min(table.dimensions[concept] for table in found[name])

    cnn, ae, other = "toy-cnn", "toy-ae", ("ground", "sky", "color")
    colors = [table.dimensions["color"] for table in found[cnn]]
    orders = {
        name: stats_rank([found[name][0].scores[c].value for c in asked], [linear[name][c] for c in asked])
        for name in nets
    }
    linear_text = "; ".join(
        f"{name}: " + ", ".join(f"{c} {100 * v:.0f} %" for c, v in each.items()) for name, each in linear.items()
    )
    data = {"dimensions": {n: [t.dimensions for t in each] for n, each in found.items()}, "linear": linear}
    return [
        Row(
            claim="toy-cnn's last stage: shape gets more than 4 dimensions above the floor, colour within 2",
            source=f"{SOURCE}, section 3.3 and table 3 (classifier of ColorMNIST: digit 22, colour 11 of 64)",
            measured=told(cnn),
            baseline=f"floor {floor} of 64",
            holds=bool(least(cnn, "shape") > floor + 4 and max(abs(c - floor) for c in colors) <= 2),
            n=PAIRS,
            data=data,
        ),
        Row(
            claim="toy-ae keeps more of ground or sky, or colour, than of shape",
            source=f"{SOURCE}, table 3 (autoencoder: digit 13, colour 17 of 64)",
            measured=told(ae),
            baseline=f"floor {floor} of 64",
            holds=all(max(t.dimensions[c] for c in other) > t.dimensions["shape"] for t in found[ae]),
            n=PAIRS,
        ),
        Row(
            claim="scores rank the concepts as linear readers do (Spearman 0.8 or more in each net)",
            source="this repository",
            measured=", ".join(f"{name} {value:.2f}" for name, value in orders.items()),
            baseline=f"linear readers above chance: {linear_text}",
            holds=all(value >= 0.8 for value in orders.values()),
            n=len(examples),
        ),
    ]


def stats_rank(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation."""
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)


Swap = Callable[[Tensor, Tensor, str], Tensor]


def leakage(context: Context, swap: Swap) -> tuple[dict[str, float], dict[str, float], list[bool]]:
    """Over hosts and donors of unseen scenes that differ in the concept: how often it becomes the donor's, and how
    often the other concepts stay as they are read from the host's reconstruction; then every hit of both kinds."""
    z, examples = codes.codes(context, "test")[0], codes.test_set(context)
    read, network = codes.probe_of(context), codes.autoencoder(context)
    half = len(z) // 2
    before = read(network.pictures(z))
    follows, keeps, hits = {}, {}, []
    for concept in ("shape", "color", "place", "scenery"):
        parts = ("ground", "sky") if concept == "scenery" else (concept,)
        label = examples.labels[concept]
        differ = (label[:half] != label[half : 2 * half]).nonzero().flatten()
        after = read(network.pictures(swap(z[differ], z[half + differ], concept)))
        as_donor = torch.stack([after[p] == before[p][half + differ] for p in parts]).float().mean(0)
        others = [c for c in ("shape", "color", "place", "ground", "sky") if c not in parts]
        as_host = torch.stack([after[c] == before[c][differ] for c in others]).float().mean(0)
        follows[concept], keeps[concept] = float(as_donor.mean()), float(as_host.mean())
        hits += (as_donor > 0.99).tolist()
    return follows, keeps, hits


def linear_swaps(context: Context) -> dict[str, Swap]:
    """Baselines: linear subspaces of z that are exchanged. LDA: the span of class means in whitened z (one dimension
    less than classes); PCA: the principal axes that correlate most in pairs, as many as the block has."""
    z, _ = codes.codes(context, "train")
    labels, rows = codes.train_set(context).labels, rows_of(context, 0)
    mean = z.mean(0)
    values, axes = torch.linalg.eigh(torch.cov(z.T))
    white, color = axes / values.clamp_min(1e-8).sqrt(), axes * values.clamp_min(1e-8).sqrt()
    sizes = fitted(context, 0).sizes
    lda, pca = {}, {}
    for concept in CONCEPTS:
        w = (z - mean) @ white
        means = torch.stack([w[labels[concept] == k].mean(0) for k in labels[concept].unique()])
        basis = torch.linalg.svd(means - means.mean(0), full_matrices=False).Vh
        lda[concept] = basis[: min(len(means) - 1, sizes[concept])]
        a, b = w[rows[concept][:, 0]], w[rows[concept][:, 1]]
        pca[concept] = torch.eye(64)[((a * b).mean(0)).argsort(descending=True)[: sizes[concept]]]

    def swapping(bases: dict[str, Tensor]) -> Swap:
        def swap(host: Tensor, donor: Tensor, concept: str) -> Tensor:
            a, b = (host - mean) @ white, (donor - mean) @ white
            onto = bases[concept].T @ bases[concept]
            return (a + (b - a) @ onto) @ color.T + mean

        return swap

    return {"LDA blocks": swapping(lda), "PCA blocks": swapping(pca)}


def linear_translator(context: Context, seed: int) -> Swap:
    """Baseline: the same pairs and a linear bijection: generalised eigenvectors of the covariance between the
    members of pairs against that of all vectors; each concept takes the directions in which its pairs agree most."""
    from scipy.linalg import eigh

    z, _ = codes.codes(context, "train")
    rows, sizes, mean = rows_of(context, seed), fitted(context, seed).sizes, z.mean(0)
    total = torch.cov(z.T).double() + 1e-6 * torch.eye(64)
    bases = {}
    for concept in CONCEPTS:
        a, b = z[rows[concept][:, 0]] - mean, z[rows[concept][:, 1]] - mean
        between = ((a.T @ b + b.T @ a) / (2 * len(a))).double()
        _, vectors = eigh(between.numpy(), total.numpy())  # columns are orthonormal in total's metric
        bases[concept] = torch.from_numpy(vectors[:, ::-1][:, : sizes[concept]].copy())

    def swap(host: Tensor, donor: Tensor, concept: str) -> Tensor:
        v = bases[concept]
        return (host.double() + ((donor - host).double() @ v) @ (v.T @ total)).float()

    return swap


def swaps(context: Context) -> list[Row]:
    """One block exchanged, decoded, and read by the probe."""
    found = [leakage(context, fitted(context, seed).swap) for seed in codes.SEEDS]
    others = {name: leakage(context, swap) for name, swap in linear_swaps(context).items()}
    others["linear translator (CCA)"] = leakage(context, linear_translator(context, 0))

    def product(each: tuple[dict[str, float], dict[str, float], list[bool]]) -> float:
        return float(np.mean([each[0][c] * each[1][c] for c in CONCEPTS]))

    follows = {c: [each[0][c] for each in found] for c in CONCEPTS}
    keeps = {c: [each[1][c] for each in found] for c in CONCEPTS}
    mean_follow = np.mean([np.mean(v) for v in follows.values()])
    mean_keep = np.mean([np.mean(v) for v in keeps.values()])
    ours = [product(each) for each in found]
    best = max(product(each) for each in others.values())
    told = "; ".join(
        f"{c}: follows {100 * np.mean(follows[c]):.0f} %, others kept {100 * np.mean(keeps[c]):.0f} %" for c in CONCEPTS
    )
    base = "; ".join(
        f"{name}: {100 * np.mean(list(each[0].values())):.0f} % and {100 * np.mean(list(each[1].values())):.0f} %,"
        f" product {product(each):.2f}"
        for name, each in others.items()
    )
    n = len(found[0][2])
    share = stats.share(np.array(found[0][2]))
    data = {"follows": follows, "keeps": keeps, "products": ours, "baselines": {k: v[:2] for k, v in others.items()}}
    return [
        Row(
            claim="a swapped block makes its concept the donor's in 85 % and keeps the others in 85 %, on average",
            source=f"{SOURCE}, section 4.2 and figure 6 (shown, not counted)",
            measured=f"{100 * mean_follow:.0f} % and {100 * mean_keep:.0f} % over {len(codes.SEEDS)} seeds (seed 0,"
            f" follows: {share.text(percent=True)}); {told}",
            baseline=base,
            holds=bool(mean_follow >= 0.85 and mean_keep >= 0.85),
            n=n,
            leans_on=codes.ceiling(context).text("shape", "color", "place", "ground", "sky"),
            picture=context.save("iin-swaps.png", swap_sheet(context)),
            data=data,
        ),
        Row(
            claim="the product of the two is 15 points above exchanging linear blocks of z (LDA, PCA, CCA)",
            source=SOURCE,
            measured=codes.over_seeds(ours),
            baseline=base,
            holds=bool(min(ours) >= best + 0.15),
            n=n,
            leans_on=codes.ceiling(context).text("shape", "color"),
        ),
    ]


def swap_sheet(context: Context, n: int = 6):
    """Hosts, donors, and each concept of the donor in the host."""
    found, network = fitted(context, 0), codes.autoencoder(context)
    z = codes.codes(context, "test")[0]
    n = min(n, len(z) // 2)
    host, donor = z[:n], z[n : 2 * n]
    rows = {"host": host, "donor": donor}
    rows |= {f"donor's {c}": found.swap(host, donor, c) for c in CONCEPTS}
    cells = [cell for row in rows.values() for cell in network.pictures(row)]
    return sheets.sheet(
        cells, n, rows=list(rows), scale=2,
        title="toy-ae through IIN: one concept of each host replaced by its donor's (columns)",
    )  # fmt: skip


def lossless(context: Context) -> list[Row]:
    """There and back."""
    z, network = codes.codes(context, "test")[0], codes.autoencoder(context)
    errors, pixels = [], []
    for seed in codes.SEEDS:
        found = fitted(context, seed)
        back = found.vectors(found.codes(z))
        errors.append(float((back - z).abs().max()))
        pixels.append(float((network.pictures(back) - network.pictures(z)).abs().max() * 127.5))
    return [
        Row(
            claim="vectors come back within 1e-4 and pictures within one grey level",
            source=f"{SOURCE}, section 3 (lossless by construction)",
            measured=f"largest error {max(errors):.1e}; {max(pixels):.3f} of 255",
            baseline=f"deviation of the vectors {float(z.std()):.2f}",
            holds=bool(max(errors) < 1e-4 and max(pixels) < 1),
            n=len(z),
        )
    ]


def sampling(context: Context) -> list[Row]:
    """The unsupervised flow as a sampler."""
    z, spread = codes.codes(context, "train")
    network, real = codes.autoencoder(context), codes.test_set(context).pixels
    n = len(real)
    ours, pictures = [], None
    for seed in codes.SEEDS[: context.count(3, 1)]:
        translator = fit_translator(z, params=flow_of(context, seed), spread=spread).translator
        drawn = network.pictures(translator.sample(n=n, seed=10_000 * seed + 5))
        pictures = drawn if pictures is None else pictures
        ours.append(codes.toy_distance(context, drawn, real))
    noise = torch.randn(n, 64, generator=torch.Generator().manual_seed(9))
    prior = network.pictures(noise)
    mean, factor = z.mean(0), torch.linalg.cholesky(torch.cov(z.T) + 1e-5 * torch.eye(64))
    normal = network.pictures(noise @ factor.T + mean)
    through = network.pictures(codes.codes(context, "test")[0])
    marks = {
        name: codes.toy_distance(context, x, real)
        for name, x in (("N(0, I)", prior), ("normal", normal), ("ae", through))
    }
    assert pictures is not None
    sheet = sheets.sheet(
        [*pictures[:8], *normal[:8], *prior[:8]], 8, rows=["through the flow", "fitted normal", "N(0, I)"], scale=2,
        title="toy-ae decodes draws of three priors",
    )  # fmt: skip
    return [
        Row(
            claim="samples through the unsupervised flow are at most half as far from renders as decoded N(0, I) draws",
            source=f"{SOURCE}, table 2 (FID of the autoencoder with and without)",
            measured=codes.over_seeds(ours, 1),
            baseline=f"N(0, I) {marks['N(0, I)']:.1f}, a normal with the codes' covariance {marks['normal']:.1f},"
            f" reconstructions {marks['ae']:.1f}",
            holds=bool(max(ours) <= 0.5 * marks["N(0, I)"]),
            n=n,
            leans_on="Frechet distance by the probe's last hidden layer",
            picture=context.save("iin-samples.png", sheet),
            data={"ours": ours, "baselines": marks},
        )
    ]


def drawings(context: Context) -> list[Row]:
    """A block learnt from two outline drawings, read on natural renders."""
    examples, network = codes.train_set(context), codes.autoencoder(context)
    camera = Camera(0, 10, 1.5)
    outlines = []
    for shape in ("cube", "ball"):
        scene = Scene((Toy(shape, "white", x=0.0, yaw=20.0),), "snow", "fog", camera)
        frames = render([scene], codes.SIDE)
        outline = torch.ones(1, 3, codes.SIDE, codes.SIDE)
        edge = edges(frames.mask[0] == 0)
        outlines.append(torch.where(edge, -outline, outline)[0])
    colourings = examples.pixels[: context.count(200, 20)]
    labels, z = examples.labels["shape"], codes.codes(context, "train")[0]
    names = examples.names["shape"]
    asked = (labels == names.index("cube")) | (labels == names.index("ball"))
    got, rest = [], []
    for seed in codes.SEEDS:
        found = from_sketches(network, outlines[0], outlines[1], colourings, flow_of(context, seed))
        drawn_z = network.vectors(torch.cat([drawn_in(each, colourings) for each in outlines]))[0]
        taught = torch.arange(2).repeat_interleave(len(colourings))
        block = found.block("drawn")
        means = torch.stack([found.codes(drawn_z)[taught == k, block].mean(0) for k in range(2)])
        said = torch.cdist(found.codes(z[asked])[:, block], means).argmin(1)
        truth = (labels[asked] == names.index("ball")).long()
        got.append(codes.accuracy(said, truth))
        rest.append(
            codes.accuracy(
                torch.cdist(z[asked], torch.stack([drawn_z[taught == k].mean(0) for k in range(2)])).argmin(1), truth
            )
        )
    shown = torch.stack([x for outline in outlines for x in (outline, *drawn_in(outline, colourings[:6]))])
    return [
        Row(
            claim="a block learnt from drawings of a cube and a ball in 200 colourings tells renders of cubes and balls"
            " apart in 80 %",
            source=f"{SOURCE}, section 3.4",
            measured=codes.over_seeds(got),
            baseline=f"nearest class mean of the drawings in z {np.mean(rest):.2f}; chance 0.50",
            holds=bool(min(got) >= 0.8),
            n=int(asked.sum()),
            picture=context.save(
                "iin-drawings.png",
                sheets.sheet(
                    list(shown),
                    len(shown) // 2,
                    scale=2,
                    rows=["cube", "ball"],
                    title="drawings, and six colourings of each",
                ),
            ),
            data={"accuracy": got, "baseline": rest},
        )
    ]


def edges(mask: Tensor) -> Tensor:
    """The outline (h w) bool of a mask, two pixels wide."""
    m = mask.float()[None, None]
    grown = torch.nn.functional.max_pool2d(m, 5, 1, 2)[0, 0] > 0
    return grown & ~mask


EXPERIMENT = Experiment(
    key="iin",
    title="a lossless translator whose blocks are concepts",
    intro=(
        "toy-ae puts one toy seen from near into 64 numbers. Flows of 8 blocks and 128 hidden units learn from the"
        " codes of toy-ae's own training pictures in 1200 steps; all is measured on scenes that nothing was trained on."
        " The labels of pairs (which concepts two pictures agree in) are the toybox's; real pictures need them from"
        " people. Three seeds of pairs, weights and noise."
    ),
    file=__file__,
    parts=(
        Part("dimensions", ("toy-ae", "toy-cnn"), estimated),
        Part("swaps", ("toy-ae",), swaps),
        Part("lossless", ("toy-ae",), lossless),
        Part("sampling", ("toy-ae",), sampling),
        Part("drawings", ("toy-ae",), drawings),
    ),
)
