"""Conceptor: are the words of planted concepts found, do they draw the concept, and can a bias be turned down?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from claims import children, common
from claims.bars import Bar
from claims.common import percent
from claims.core import Context, Experiment, Part, Row
from sfumato.errors import NoMatch
from sfumato.explain.conceptor import Conceptor, Decomposition, balance, decompose, dictionary, explain_seed
from sfumato.judge.sad_pad import SadPad
from sfumato.metrics import stats
from sfumato.models.readers import Clip, load_clip
from sfumato.sampling import generate
from sfumato.sampling.pixels import as_pictures, as_pixels
from sfumato.toybox import COLORS, GROUNDS, PLANTED, SHAPES, PlantedWord, attributes_of
from sfumato.toybox.oracle.toy_judge import SceneReading

SOURCE = "Chefer et al. 2023"
MODEL = "toy-sd"
SLOT = "wood"  # the word that a decomposition stands in for when it draws
HELD_OUT = 6900
TOP = 5
SETTINGS: dict[str, Any] = {}  # the paper's loss, rate, N, pictures and checks: the defaults
DRAWING: dict[str, Any] = {"steps": 12}
ALONE = [word for word in PLANTED.values() if len(word.senses) == 1]
MIXED = [word for word in PLANTED.values() if len({attributes_of(sense)["shape"] for sense, _ in word.senses}) == 2]
[BIASED] = [word for word in PLANTED.values() if word not in (*ALONE, *MIXED)]


@dataclass(frozen=True)
class Concept:
    """A planted word and what it was decomposed into."""

    word: PlantedWord
    found: Decomposition

    def top(self) -> list[str]:
        """The words with the largest coefficients."""
        return [name for name, _ in self.found.shares(TOP)]

    def text(self) -> str:
        """What the word stands for, and the words with the largest coefficients."""
        senses = " or ".join(sense if share == 1 else f"{sense} {share:g}" for sense, share in self.word.senses)
        return f"{self.word.word} ({senses}): " + ", ".join(f"{n} {share:.2f}" for n, share in self.found.shares(TOP))


def model_of(context: Context) -> Any:
    """toy-sd after it has read the planted words."""
    return children.planted(context, MODEL)


def concept(context: Context, word: PlantedWord) -> Concept:
    """A planted word taken apart by the pictures that the model draws of it, once per run."""

    def parts() -> dict[str, Any]:
        context.report(f"  {word.word}: {' or '.join(sense for sense, _ in word.senses)}")
        few = {"iterations": 3, "images": 3, "checked": 2, "every": 2} if context.quick else {}
        found = decompose(model_of(context), word.word, **SETTINGS | few, **DRAWING)
        return {
            "concept": found.concept, "template": found.template, "model": found.model, "names": list(found.names),
            "alphas": found.alphas, "keep": found.keep, "pictures": as_pixels(found.pictures, None),
        }  # fmt: skip

    def made() -> Concept:
        known = context.kept((f"concept {word.word}",), parts)
        names, pictures = tuple(known["names"]), as_pictures(known["pictures"])
        return Concept(word, Decomposition(**known | {"names": names, "pictures": pictures}))

    return context.once(f"concept {word.word}", made)


def concepts(context: Context, words: Sequence[PlantedWord]) -> list[Concept]:
    return [concept(context, word) for word in words[: context.count(len(words), 2)]]


def by_name(context: Context, word: str, seeds: Sequence[int], systems: Sequence[Any] = ()) -> Tensor:
    """Pictures (n 3 h w) of "a <word>"."""
    prompts = [f"a {word}"] * len(seeds)
    made = generate(model_of(context), prompts, seed=list(seeds), interventions=systems, **DRAWING)
    return made.pixels.detach().clamp(-1, 1)


def by_words(context: Context, mixture: dict[str, float], seeds: Sequence[int]) -> Tensor:
    """Pictures (n 3 h w) of "a <mixture>"."""
    return by_name(context, SLOT, seeds, [Conceptor(word=SLOT, mixture=mixture)])


def clip_of(context: Context) -> Clip:
    """toy-clip, once per run."""
    return context.once("clip net", lambda: load_clip(str(context.folder("toy-clip"))))


def vocabulary(context: Context) -> list[str]:
    return [name for name in dictionary(model_of(context)).names if name != SLOT]


def nearest(context: Context, vector: Tensor, n: int = TOP) -> list[str]:
    """The words whose texts are nearest to a vector for CLIP: a decomposition without any learning."""
    names = vocabulary(context)
    texts = F.normalize(torch.from_numpy(clip_of(context).text_features([f"a {name}" for name in names])), dim=1)
    return [names[i] for i in (texts @ vector).argsort(descending=True)[:n].tolist()]


def near_pictures(context: Context, each: Concept, n: int = TOP) -> list[str]:
    """The words nearest to the mean of the concept's pictures: CLIP saw such pictures with their right captions."""
    seen = torch.from_numpy(clip_of(context).features(each.found.pictures))
    return nearest(context, F.normalize(seen, dim=1).mean(0), n)


def near_name(context: Context, each: Concept, n: int = TOP) -> list[str]:
    """The words nearest to the name."""
    return nearest(context, torch.from_numpy(clip_of(context).text_features([f"a {each.word.word}"]))[0], n)


def chance(wanted: int, of: int, total: int, top: int = TOP) -> float:
    """Of drawing ``wanted`` or more of ``of`` words among ``top`` of ``total``."""
    ways = sum(math.comb(of, k) * math.comb(total - of, top - k) for k in range(wanted, of + 1))
    return ways / math.comb(total, top)


def planted(context: Context) -> list[Row]:
    """The words of concepts of one kind among the largest coefficients."""
    found = concepts(context, ALONE)
    true = [set(each.word.senses[0][0].split()) for each in found]
    arms = {
        "ours": [each.top() for each in found],
        "nearest to the pictures": [near_pictures(context, each) for each in found],
        "nearest to the name": [near_name(context, each) for each in found],
    }
    hits = {arm: [len(words & set(said)) >= 2 for words, said in zip(true, all_said, strict=True)]
            for arm, all_said in arms.items()}  # fmt: skip
    luck = chance(2, 3, len(vocabulary(context)))
    good, more = stats.share(hits["ours"]), stats.mcnemar(hits["ours"], hits["nearest to the name"])
    level = {arm: stats.share(each) for arm, each in hits.items()}
    return [
        Row(
            claim="of a new word that captions used for one kind of toy, two of the kind's three words are among the "
            f"{TOP} largest coefficients in 80 % of the cases, more often than among the words nearest to the name",
            source=f"{SOURCE}, section 4; bar: digest",
            measured=f"{percent(good)}, {percent(more)} more",
            baseline=f"nearest to the name {percent(level['nearest to the name'])}, nearest to the pictures for a CLIP "
            f"that saw such captions {percent(level['nearest to the pictures'])}, chance {100 * luck:.1f} %",
            bars=[
                Bar(good, luck, 1.0, at_least=0.8, what="found"),
                Bar(
                    more,
                    0.0,
                    1 - level["nearest to the name"].value,
                    above=0.0,
                    what="over the words nearest to the name",
                ),
            ],
            headline=True,
            n=len(found),
            data={"said": arms, "words": "; ".join(each.text() for each in found)},
        )
    ]


def two_kinds(context: Context) -> list[Row]:
    """Concepts of two kinds: both are found, the commoner one first."""
    found, both, order = concepts(context, MIXED), [], []
    for each in found:
        kinds = [set(sense.split()) for sense, _ in each.word.senses]
        both.append(all(words & set(each.top()) for words in kinds))
        order.append(strength(each.found, kinds[0]) > strength(each.found, kinds[1]))
    total = len(vocabulary(context))
    luck = 1 - 2 * (1 - chance(1, 2, total)) + (1 - chance(1, 4, total))
    return [
        Row(
            claim=f"of a new word for two kinds of toys both have a word among the {TOP} largest coefficients, and the "
            "words of the commoner one together the larger share, each in 80 % of the cases",
            source=f"{SOURCE}, section 4 (double meanings); bars: digest",
            measured=f"both {percent(stats.share(both))}, commoner first {percent(stats.share(order))}",
            baseline=f"chance {100 * luck:.0f} %, 50 %",
            bars=[
                Bar(stats.share(both), luck, 1.0, at_least=0.8, what="both kinds"),
                Bar(stats.share(order), 0.5, 1.0, at_least=0.8, what="commoner first"),
            ],
            n=len(found),
            data={"both": both, "order": order, "words": "; ".join(each.text() for each in found)},
        )
    ]


def strength(found: Decomposition, words: set[str]) -> float:
    """The coefficients of some words together."""
    return float(sum(found.alphas[found.names.index(word)] for word in words if word in found.names))


def shows(reading: SceneReading, sense: str) -> bool:
    """Whether the most certain toy is of a kind."""
    return bool(reading.objects) and reading.objects[0].has(**attributes_of(sense))


def faithful(context: Context) -> list[Row]:
    """Pictures by the decomposition against those by the name itself, from the same seeds."""
    reader, n, found = common.judge_of(context), context.count(16, 2), concepts(context, ALONE)
    kept: dict[str, list[float]] = {}
    rows: list[list[Tensor]] = []
    for i, each in enumerate(found):
        seeds, [(sense, _)] = range(HELD_OUT + 50 * i, HELD_OUT + 50 * i + n), each.word.senses
        near, rng = near_name(context, each, 3), np.random.default_rng(i)
        arms = {
            "10 words": dict(each.found.shares(10)),
            "3 words": dict(each.found.shares(3)),
            "first word": dict(each.found.shares(1)),
            "3 words nearest to the name": dict.fromkeys(near, 1.0),
            "3 random words": dict.fromkeys((str(word) for word in rng.permutation(each.found.names)[:3]), 1.0),
        }
        made = {"name": by_name(context, each.word.word, seeds)}
        made |= {arm: by_words(context, mixture, seeds) for arm, mixture in arms.items()}
        for arm, pictures in made.items():
            kept.setdefault(arm, []).append(float(np.mean([shows(each, sense) for each in reader.read(pictures)])))
        rows += [[*made["name"][:6], *made["10 words"][:6]]] if i < 4 else []
    level = {arm: stats.bootstrap(shares) for arm, shares in kept.items()}
    best = max(("first word", "3 words nearest to the name", "3 random words"), key=lambda arm: level[arm].value)
    share = stats.ratio(kept["10 words"], kept["name"]) if sum(kept["name"]) else stats.Interval(0.0, 0.0, 1.0, 0)
    more = stats.paired_difference(kept["10 words"], kept[best])
    random = level["3 random words"].value
    table = ", ".join(f"{arm} {100 * each.value:.0f} %" for arm, each in level.items() if arm != "10 words")
    return [
        Row(
            claim="what a decomposition draws is the kind of toy (shape, colour, pattern) 0.8 times as often as what "
            "the new word itself draws from the same seeds, and more often than by the best of its baselines",
            source=f"{SOURCE}, section 4; bar: digest",
            measured=f"{percent(level['10 words'])}, {share.text()} of the name's; "
            f"{percent(more)} more than the best baseline",
            baseline=table,
            bars=[
                Bar(share, random / max(level["name"].value, 1e-9), 1.0, at_least=0.8, what="share"),
                Bar(more, 0.0, 1 - level[best].value, above=0.0, what=f"over {best}"),
            ],
            void=common.void(level["name"], "the new word itself"),
            n=len(found),
            leans_on=common.trust_text(context, "shape", "color", "pattern"),
            picture=context.save(
                "conceptor-faithful.png",
                common.sheet(rows, names=[f"{each.word.word}: {each.word.senses[0][0]}" for each in found[:4]],
                             title="six by the new word, six by the ten words it is made of"),
            ),
            data={"shares": kept},
        )
    ]  # fmt: skip


def removal(context: Context) -> list[Row]:
    """The colour's word taken out of the decomposition."""
    reader, n, found = common.judge_of(context), context.count(16, 2), concepts(context, ALONE)
    read: dict[str, list[float]] = {key: [] for key in ("color", "color without", "shape", "shape without")}
    for i, each in enumerate(found):
        seeds, known = (
            range(HELD_OUT + 1000 + 50 * i, HELD_OUT + 1000 + 50 * i + n),
            attributes_of(each.word.senses[0][0]),
        )
        less = each.found.changed(**{known["color"]: 0.0})
        for suffix, drawing in (("", each.found), (" without", less)):
            seen = reader.read(drawing.draw(model_of(context), list(seeds), **DRAWING).clamp(-1, 1))
            for name in ("color", "shape"):
                right = [bool(r.objects) and r.objects[0].has(**{name: known[name]}) for r in seen]
                read[name + suffix].append(float(np.mean(right)))
    level = {key: stats.bootstrap(values) for key, values in read.items()}
    left = stats.ratio(read["color without"], read["color"]) if sum(read["color"]) else stats.Interval(1.0, 0.0, 1.0, 0)
    moved = stats.paired_difference(read["shape without"], read["shape"])
    return [
        Row(
            claim="with the colour's word taken out of a decomposition its colour is drawn half as often or less, its "
            "shape at most 10 points less often",
            source=f"{SOURCE}, section 4.3 (manipulation); bars: digest",
            measured=f"colour {percent(level['color without'])}, {left.text()} of before; shape {percent(moved)} more",
            baseline=f"before: colour {percent(level['color'])}, shape {percent(level['shape'])}",
            bars=[
                Bar(left, 1.0, 0.0, at_most=0.5, what="of the colour"),
                Bar(moved, -level["shape"].value, 0.0, at_least=-0.1, what="shape"),
            ],
            void=common.void(level["color"], "the whole decomposition"),
            n=len(found),
            leans_on=common.trust_text(context, "shape", "color"),
            data=read,
        )
    ]


def single(context: Context) -> list[Row]:
    """One picture of a concept of two kinds: the words of the kind that it shows survive."""
    model, reader = model_of(context), common.judge_of(context)
    right, words, where, seen = [], [], [], 0
    for i, each in enumerate(concepts(context, MIXED)):
        for seed in range(HELD_OUT + 4000 + 50 * i, HELD_OUT + 4000 + 50 * i + context.count(6, 1)):
            seen += 1
            pictured = reader.read(each.found.draw(model, [seed], **DRAWING).clamp(-1, 1))[0]
            drawn = [sense for sense, _ in each.word.senses if shows(pictured, sense)]
            if len(drawn) != 1:  # neither kind: nothing to be named
                continue
            one = explain_seed(model, each.found, seed, keep=10, **DRAWING)
            other = next(sense for sense, _ in each.word.senses if sense != drawn[0])
            words.append(len(one.shares()))
            right.append(strength(one, set(drawn[0].split())) > strength(one, set(other.split())))
            where.append(each.word.word)
    few = stats.mean(words) if words else stats.Interval(10.0, 0.0, 10.0, 0)
    share = stats.bootstrap(common.by_cluster(right, where)) if right else stats.Interval(0.0, 0.0, 1.0, 0)
    return [
        Row(
            claim="one picture needs fewer words than the concept, and those of the kind that it shows outweigh the "
            "other's in 80 % of the cases",
            source=f"{SOURCE}, section 4.2; bar: digest",
            measured=f"{few.text()} of 10 words remain; kind named {percent(share)}; {len(words)} of {seen} pictures "
            "show one kind",
            baseline="10 words; 50 %",
            bars=[Bar(few, 10.0, 1.0, below=10.0, what="words"), Bar(share, 0.5, 1.0, at_least=0.8, what="kind named")],
            void="" if right else "no decomposition drew either kind",
            n=seen,
            leans_on=common.trust_text(context, "shape", "color"),
            data={"words": words, "right": right, "where": where},
        )
    ]


def red_share(context: Context, pictures: Tensor) -> tuple[stats.Interval, list[bool]]:
    """(share of red among red and blue toys, whether each picture shows a cube), as the judge reads them."""
    found = [reading.objects[:1] for reading in common.judge_of(context).read(pictures.clamp(-1, 1))]
    colored = [toy.color == "red" for toys in found for toy in toys if toy.color in ("red", "blue")]
    red = stats.share(colored) if colored else stats.Interval(0.0, 0.0, 1.0, 0)
    return red, [any(toy.shape == "cube" for toy in toys) for toys in found]


def bias(context: Context) -> list[Row]:
    """A word for cubes that are red four times of five: the bias is read off, turned down, and the rest stays."""
    model, n, found = model_of(context), context.count(250, 20), concept(context, BIASED).found
    seeds = range(HELD_OUT + 6000, HELD_OUT + 6000 + context.count(60, 4))

    def measured(pixels: Tensor) -> float:
        return red_share(context, pixels)[0].value

    try:
        result = balance(model, found, ["red"], measured, seeds=list(seeds), rounds=context.count(6, 1), **DRAWING)
        changed, factor, tried = result.decomposition, result.factor, list(result.tried)
    except NoMatch:  # even without the word the share is too large: reported as it is
        changed, factor, tried = found.changed(red=0.0), 0.0, []
    report = range(HELD_OUT + 7000, HELD_OUT + 7000 + n)
    before, after = (each.draw(model, list(report), **DRAWING).clamp(-1, 1) for each in (found, changed))
    shares = [red_share(context, each) for each in (before, after)]
    names = [*COLORS, *SHAPES, *GROUNDS]
    system = SadPad(template="a {}", pairs=True, draws=context.count(100, 10))
    seen = [clip_of(context).features(as_pictures(each)) for each in (before, after)]
    moved = system.compare(names, *system.scores(clip_of(context), names, *seen))
    first = [each.name for each in moved.attributes[:2]]
    ahead = found.rank("blue") - found.rank("red")
    (was, cubes), (now, kept) = shares
    off = stats.Interval(abs(now.value - 0.5), 0.0, max(now.high - 0.5, 0.5 - now.low), now.n)
    rarer = stats.mcnemar(kept, cubes)
    named, _ = red_share(context, by_name(context, BIASED.word, list(report)[: context.count(120, 4)]))
    return [
        Row(
            claim="a new word for cubes, red in 80 % of the captions: red is ahead of blue among its words; with red's "
            "coefficient turned down the share of red on new seeds is 50 +- 7 %, cubes are at most 5 points rarer, and "
            "SaD names red or blue first among what moved",
            source=f"{SOURCE}, section 5; bars: digest",
            measured=f"red is word {found.rank('red')}, blue {found.rank('blue')}; factor {factor:.2f}: red "
            f"{percent(was)} before, {percent(now)} after; cubes {percent(rarer)} more; SaD first: {', '.join(first)}",
            baseline=f"red by the new word itself {percent(named)}",
            bars=[
                Bar(common.exactly(ahead, 1), 0.0, 1.0, at_least=1.0, what="ranks between red and blue"),
                Bar(off, 0.3, 0.0, at_most=0.07, what="share of red from one half"),
                Bar(rarer, -1.0, 0.0, at_least=-0.05, what="cubes"),
                Bar(common.exactly(len({"red", "blue"} & set(first)), 1), 0.0, 1.0, at_least=1.0, what="named by SaD"),
            ],
            n=n,
            leans_on=common.trust_text(context, "shape", "color"),
            picture=context.save(
                "conceptor-bias.png",
                common.sheet(
                    [list(before[:10]), list(after[:10])], names=("before", "red turned down"), title="a hesk"
                ),
            ),
            data={"tried": tried, "moved": moved.to_json(), "told": [red.to_json() for red, _ in shares]},
        )
    ]


NEEDED = (MODEL, "toy-clip", "toy-judge")
EXPERIMENT = Experiment(
    key="conceptor",
    title="Conceptor: what a concept is made of",
    intro=(
        "toy-sd goes on learning from captions in which twenty new words stand for toys: ten for one kind by colour,"
        " pattern and shape, nine for two kinds (70 and 30 %), one for cubes that are red in 80 %. A word is decomposed"
        " by the pictures that this model draws of it, into all words of its vocabulary. The judge reads the pictures;"
        " toy-clip chooses the best check, as in the paper, and finds the nearest words."
    ),
    file=__file__,
    parts=(
        Part("planted", NEEDED, planted),
        Part("two kinds", NEEDED, two_kinds),
        Part("faithful", NEEDED, faithful),
        Part("removal", NEEDED, removal),
        Part("one picture", NEEDED, single),
        Part("bias", NEEDED, bias),
    ),
)
