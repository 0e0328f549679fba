"""IIN: dimensions of concepts, swaps of one block, losslessness, sampling, and a concept from two drawings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from claims import codes
from claims.bars import Bar
from claims.changed import exact_codes
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
from sfumato.explain.shape_texture.dimensions import dimensions_of
from sfumato.metrics import stats
from sfumato.metrics.stats import Interval
from sfumato.models.readers import load_net
from sfumato.toybox import Camera, Scene, Toy, render
from sfumato.toybox.cues import agreeing as agreeing_scene
from sfumato.translation.examples import agreeing
from sfumato.translation.networks import network_of
from sfumato.translation.translator import FlowParams, fit_translator

SOURCE = "Esser, Rombach, Ommer 2020"
CONCEPTS = ("shape", "color", "place", "scenery")
PAIRS = 16_000
FLOW = {"blocks": 8, "hidden": 256, "depth": 1, "steps": 2500, "batch": 192, "lr": 2e-3, "noise": 0.1}


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
    found, linear, exact = {}, {}, {}
    for name, network in nets.items():
        z = codes.codes(context, "train")[0] if name == "toy-ae" else network.vectors(examples.pixels)[0]
        each = [
            dimensions(z, {c: agreeing(examples.labels[c], PAIRS, 7 * s + i, c) for i, c in enumerate(asked)})
            for s in codes.SEEDS
        ]
        found[name] = each
        exact[name] = {c: explained(z, examples.labels[c]) for c in asked}
        linear[name] = {}
        for c in asked:
            chance = float(torch.bincount(examples.labels[c]).max()) / len(examples)
            linear[name][c] = (linear_accuracy(z, examples.labels[c]) - chance) / (1 - chance)
    floor = floor_of(64, len(asked))

    def in_words(name: str) -> str:
        parts = []
        for c in asked:
            sizes = [table.dimensions[c] for table in found[name]]
            parts.append(f"{c} {np.mean(sizes):.0f} (score {found[name][0].scores[c].text(digits=2)})")
        return ", ".join(parts)

    cnn, ae, other = "toy-cnn", "toy-ae", ("ground", "sky", "color")

    def mean(name: str, value: Callable[[dict[str, int]], float]) -> Interval:
        return stats.mean([value(table.dimensions) for table in found[name]])

    alone = dimensions_of(64, {c: float(c == "shape") for c in asked})  # of a layer that holds shape and nothing else
    read = dimensions_of(64, linear[ae])
    margin = mean(ae, lambda d: max(d[c] for c in other) - d["shape"])
    orders = {
        name: stats.mean(
            [stats_rank([t.scores[c].value for c in asked], [linear[name][c] for c in asked]) for t in found[name]]
        )
        for name in nets
    }
    off = {
        name: stats.mean([max(abs(t.scores[c].value - exact[name][c]) for c in asked) for t in found[name]])
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
            measured=in_words(cnn),
            baseline=f"floor {floor} of 64",
            bars=[
                Bar(mean(cnn, lambda d: d["shape"]), floor, alone["shape"], at_least=floor + 5, what="shape"),
                Bar(
                    mean(cnn, lambda d: abs(d["color"] - floor)),
                    alone["shape"] - floor,
                    0.0,
                    at_most=2,
                    what="colour from the floor",
                ),
            ],
            headline=True,
            n=PAIRS,
            data=data,
        ),
        Row(
            claim="toy-ae keeps more of ground or sky, or colour, than of shape",
            source=f"{SOURCE}, table 3 (autoencoder: digit 13, colour 17 of 64)",
            measured=in_words(ae),
            baseline=f"floor {floor} of 64",
            bars=[Bar(margin, 0.0, max(read[c] for c in other) - read["shape"], at_least=1, what="more than of shape")],
            n=PAIRS,
        ),
        Row(
            claim="scores are the shares of variance that the concepts explain, from all labels, within 0.02",
            source=f"{SOURCE}, section 3.3 (pairs stand for labels)",
            measured="largest difference "
            + ", ".join(f"{name} {each.text()}" for name, each in off.items())
            + "; exact: "
            + "; ".join(f"{n}: " + ", ".join(f"{c} {v:.3f}" for c, v in e.items()) for n, e in exact.items()),
            baseline="scores of 0 for everything would be off by "
            + ", ".join(f"{name} {max(each.values()):.2f}" for name, each in exact.items()),
            bars=[Bar(each, max(exact[name].values()), 0.0, at_most=0.02, what=name) for name, each in off.items()],
            n=len(codes.SEEDS),
            data={"exact": exact},
        ),
        Row(
            claim="scores rank the concepts as linear readers do (Spearman 0.8 or more in each net): what can be"
            " read is another thing than how much of the variance it is",
            source="this repository",
            measured=", ".join(f"{name} {each.text(digits=2)}" for name, each in orders.items()),
            baseline=f"linear readers above chance: {linear_text}",
            bars=[Bar(each, 0.0, 1.0, at_least=0.8, what=name) for name, each in orders.items()],
            n=len(codes.SEEDS),
        ),
    ]


def explained(z: Tensor, labels: Tensor) -> float:
    """The share of the variance of vectors z (m n) that lies between the means of their labels (m): what the covariance
    of pairs that agree in the label estimates."""
    means = torch.stack([z[labels == k].mean(0) for k in range(int(labels.max()) + 1)])
    return float((means[labels] - z.mean(0)).square().sum() / (z - z.mean(0)).square().sum())


def stats_rank(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation."""
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic)


Swap = Callable[[Tensor, Tensor, str], Tensor]
"""Codes (k 64) of hosts and of donors, and a concept, to codes of the hosts with the donors' concept."""
FACTORS = {"shape": "shape", "color": "color", "place": "pose", "scenery": "scenery"}  # what the renderer exchanges


@dataclass(frozen=True)
class Swapped:
    """Of hosts and donors of unseen scenes that differ in a concept: ``at``, concept -> which hosts (k); ``follows``,
    whether it becomes the donor's (k); ``keeps``, the share of the other concepts that stay (k)."""

    at: dict[str, Tensor]
    follows: dict[str, Tensor]
    keeps: dict[str, Tensor]

    def by_host(self, hosts: int, of: Callable[[Tensor, Tensor], Tensor]) -> np.ndarray:
        """``of(follows, keeps)``, averaged over the concepts in which a host was changed; hosts are what is drawn."""
        total, count = torch.zeros(hosts), torch.zeros(hosts)
        for concept, rows in self.at.items():
            total.index_add_(0, rows, of(self.follows[concept], self.keeps[concept]))
            count.index_add_(0, rows, torch.ones(len(rows)))
        return (total / count.clamp_min(1)).numpy()[(count > 0).numpy()]

    def means(self) -> tuple[dict[str, float], dict[str, float]]:
        return tuple({c: float(v.mean()) for c, v in each.items()} for each in (self.follows, self.keeps))  # type: ignore[return-value]


def leakage(context: Context, swap: Swap | None) -> Swapped:
    """How often a swapped concept becomes the donor's, and how often the others stay as they are read from the host's
    reconstruction; without a swap, of the host's scene rendered with the donor's concept."""
    z, examples = codes.codes(context, "test")[0], codes.test_set(context)
    read, network = codes.probe_of(context), codes.autoencoder(context)
    half = len(z) // 2
    before = read(network.pictures(z))
    found = Swapped({}, {}, {})
    for concept in CONCEPTS:
        parts = ("ground", "sky") if concept == "scenery" else (concept,)
        label = examples.labels[concept]
        differ = (label[:half] != label[half : 2 * half]).nonzero().flatten()
        if swap is None:
            pairs = [(examples.scenes[i], examples.scenes[half + i]) for i in differ.tolist()]
            made = exact_codes(context, [agreeing_scene(host, donor, FACTORS[concept]) for host, donor in pairs])
        else:
            made = swap(z[differ], z[half + differ], concept)
        after = read(network.pictures(made))
        others = [c for c in ("shape", "color", "place", "ground", "sky") if c not in parts]
        found.at[concept] = differ
        found.follows[concept] = torch.stack([after[p] == before[p][half + differ] for p in parts]).float().mean(0)
        found.keeps[concept] = torch.stack([after[c] == before[c][differ] for c in others]).float().mean(0)
    return found


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
    half = len(codes.test_set(context)) // 2
    found = [leakage(context, fitted(context, seed).swap) for seed in codes.SEEDS]
    others = {name: leakage(context, swap) for name, swap in linear_swaps(context).items()}
    others["linear translator (CCA)"] = leakage(context, linear_translator(context, 0))
    whole = leakage(context, lambda host, donor, concept: donor)  # everything exchanged: what agrees by chance
    exact = context.once("exact swaps", lambda: leakage(context, None))

    def of_hosts(each: Sequence[Swapped], of: Callable[[Tensor, Tensor], Tensor]) -> np.ndarray:
        return np.mean([one.by_host(half, of) for one in each], 0)

    follow, keep = stats.mean(of_hosts(found, lambda a, _: a)), stats.mean(of_hosts(found, lambda _, b: b))
    chance = float(of_hosts([whole], lambda _, b: b).mean())
    top_follow, top_keep = (float(of_hosts([exact], of).mean()) for of in (lambda a, _: a, lambda _, b: b))
    top = float(of_hosts([exact], torch.mul).mean())
    product = of_hosts(found, torch.mul)
    rest = {name: of_hosts([each], torch.mul) for name, each in others.items()}
    best = max(rest, key=lambda name: rest[name].mean())
    more = stats.mean(product - rest[best])
    means = [each.means() for each in found]
    summary = "; ".join(
        f"{c}: follows {100 * np.mean([f[c] for f, _ in means]):.0f} %, others kept"
        f" {100 * np.mean([k[c] for _, k in means]):.0f} %"
        for c in CONCEPTS
    )
    base = "; ".join(
        f"{name}: {100 * of_hosts([each], lambda a, _: a).mean():.0f} % and"
        f" {100 * of_hosts([each], lambda _, b: b).mean():.0f} %, product {rest[name].mean():.2f}"
        for name, each in others.items()
    )
    data = {
        "follows": [f for f, _ in means], "keeps": [k for _, k in means],
        "baselines": {name: each.means() for name, each in others.items()},
    }  # fmt: skip
    return [
        Row(
            claim="a swapped block makes its concept the donor's in 85 % and keeps the others in 85 %, on average",
            source=f"{SOURCE}, section 4.2 and figure 6 (shown, not counted)",
            measured=f"{follow.text(percent=True)} and {keep.text(percent=True)} over {len(codes.SEEDS)} seeds; "
            f"{summary}",
            baseline=f"{base}; everything exchanged: others kept by chance {100 * chance:.0f} %; the scene rendered"
            f" with the donor's concept (the most there is): {100 * top_follow:.0f} % and {100 * top_keep:.0f} %,"
            f" product {top:.2f}",
            bars=[
                Bar(follow, 0.0, top_follow, at_least=0.85, what="follows"),
                Bar(keep, chance, top_keep, at_least=0.85, what="others kept"),
            ],
            n=len(product),
            leans_on=codes.ceiling(context).text("shape", "color", "place", "ground", "sky"),
            picture=context.save("iin-swaps.png", swap_sheet(context)),
            data=data,
        ),
        Row(
            claim="the product of the two is 15 points above exchanging linear blocks of z (the best of LDA, PCA, CCA)",
            source=SOURCE,
            measured=f"{product.mean():.2f}, {more.text(percent=True)} more than {best}",
            baseline=base,
            bars=[Bar(more, 0.0, top - float(rest[best].mean()), at_least=0.15, above=0.0, what=f"more than {best}")],
            n=len(product),
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
            bars=[
                Bar(exactly(max(errors), len(z)), float(z.std()), 0.0, at_most=1e-4, what="vectors"),
                Bar(exactly(max(pixels), len(z)), 127.5, 0.0, at_most=1.0, what="pictures"),
            ],
            n=len(z),
        )
    ]


def exactly(value: float, n: int) -> Interval:
    """A largest value, which has no interval."""
    return Interval(value, value, value, n)


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
            bars=[
                Bar(
                    stats.mean([each / marks["N(0, I)"] for each in ours]),
                    1.0,
                    marks["ae"] / marks["N(0, I)"],
                    at_most=0.5,
                    what="of N(0, I)'s",
                )
            ],
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
        got.append((said == truth).float())
        rest.append(
            codes.accuracy(
                torch.cdist(z[asked], torch.stack([drawn_z[taught == k].mean(0) for k in range(2)])).argmin(1), truth
            )
        )
    share = stats.mean(torch.stack(got).mean(0).numpy())
    shown = torch.stack([x for outline in outlines for x in (outline, *drawn_in(outline, colourings[:6]))])
    return [
        Row(
            claim="a block learnt from drawings of a cube and a ball in 200 colourings tells renders of cubes and balls"
            " apart in 80 %",
            source=f"{SOURCE}, section 3.4",
            measured=share.text(percent=True),
            baseline=f"nearest class mean of the drawings in z {np.mean(rest):.2f}; chance 0.50",
            bars=[Bar(share, 0.5, 1.0, at_least=0.8, what="told apart")],
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
            data={"accuracy": [float(each.mean()) for each in got], "baseline": rest},
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
        "toy-ae puts one toy seen from near into 64 numbers. Flows of 8 blocks and 256 hidden units learn from the"
        " codes of 16,000 pictures, a quarter of them toy-ae's own, in 2500 steps; all is measured on scenes that"
        " nothing was trained on."
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
