"""What the built-in models are said to reach: codec, judge, text-image model, generators."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from claims import common
from claims.bars import Bar
from claims.common import percent
from claims.core import Context, Experiment, Part, Row
from sfumato.metrics import stats
from sfumato.models.readers import load_clip
from sfumato.toybox import COLORS, GROUNDS, PATTERNS, SHAPES, SIZES, SKIES, Scene, ToyboxDataset, caption, oracle
from sfumato.toybox.oracle.accuracy import MIN_PIXELS
from sfumato.zoo.objectives.vital_signs import swapped_colors

SOURCE = "this zoo"
CODECS, GENERATORS = ("toy-vae", "toy-vae-128"), ("toy-sd", "toy-sd3")
GUIDANCES = (1.5, 2.5, 3.5, 5.0, 7.0)
REPORT, TUNE = 1000, 2000  # seeds of scenes and noise: never the same for choosing and for reporting


def psnr(first: Tensor, second: Tensor) -> list[float]:
    """Peak signal-to-noise ratio of pictures (b, 3, h, w) in [-1, 1], in dB."""
    error = (first - second).square().mean((1, 2, 3)).clamp_min(1e-12)
    return (10 * torch.log10(4 / error)).tolist()


def round_trips(context: Context, name: str, n: int) -> tuple[ToyboxDataset, Tensor, Tensor]:
    """(scenes, pictures, pictures after the codec) of held-out scenes, once per run."""

    def travelled() -> tuple[ToyboxDataset, Tensor, Tensor]:
        from diffusers import AutoencoderKL

        dataset = ToyboxDataset("test", 1000, common.side(context, name))
        pictures = common.pictures_of(dataset, n)
        codec = AutoencoderKL.from_pretrained(context.folder(name)).eval()
        out = []
        with torch.no_grad():
            for _, chunk in context.batches(list(pictures), 50, name):
                latents = codec.encode(torch.stack(list(chunk))).latent_dist.mode()
                out.append(codec.decode(latents).sample.clamp(-1, 1))
        return dataset, pictures, torch.cat(out)

    return context.once(f"{name} round trips {n}", travelled)


def codec(name: str, context: Context) -> list[Row]:
    """Reconstruction quality of an autoencoder."""
    n = context.count(500, 60)
    _, pictures, back = round_trips(context, name, n)
    ours = stats.bootstrap(psnr(pictures, back))
    small = functional.interpolate(pictures, size=(16, 16), mode="area")
    naive = functional.interpolate(small, pictures.shape[-2:], mode="bicubic", align_corners=False).clamp(-1, 1)
    shrunk = stats.bootstrap(psnr(pictures, naive))
    picture = context.save(
        f"{name}.png",
        common.sheet([list(each[:10]) for each in (pictures, back, naive)], names=("render", "codec", "16 x 16")),
    )
    return [
        Row(
            claim=f"{name} reconstructs held-out renders at 32 dB PSNR or more",
            source=SOURCE,
            measured=f"{ours.text(digits=2)} dB",
            baseline=f"shrinking to the latent grid and back {shrunk.text(digits=2)} dB",
            bars=[Bar(ours, shrunk.value, 50.0, at_least=32.0)],
            n=n,
            picture=picture,
            data={"psnr": ours.to_json(), "shrunk": shrunk.to_json()},
        )
    ]


def judge_row(
    claim: str, readings: list[oracle.SceneReading], dataset: ToyboxDataset, n: int, picture: str | None
) -> Row:
    """The row for a judge that read the first ``n`` pictures of a dataset."""
    got = oracle.measure(readings, dataset.scenes[:n], common.masks_of(dataset, n))
    words = {"shape": SHAPES, "color": COLORS, "pattern": PATTERNS, "size": SIZES, "ground": GROUNDS, "sky": SKIES}
    # answering with the most frequent word every time
    guesses = []
    for name, known in words.items():
        answers = [
            getattr(t, name) for s in dataset.scenes[:n] for t in (s.toys if name not in ("ground", "sky") else (s,))
        ]
        guesses.append((max(answers.count(word) for word in known), len(answers)))
    chance = sum(hits for hits, _ in guesses) / sum(total for _, total in guesses)
    single = ", ".join(f"{name} {100 * interval.value:.1f}" for name, interval in got.single.items())
    return Row(
        claim=claim,
        source=SOURCE,
        measured=(
            f"{percent(got.attributes)} ({single}); toys found {100 * got.found.value:.1f} %, mask IoU {got.miou:.3f}, "
            f"right number of toys {100 * got.counted.value:.1f} %"
        ),
        baseline=f"always the most frequent word {100 * chance:.1f} %",
        bars=[Bar(got.attributes, chance, 1.0, at_least=0.98)],
        n=got.toys,
        leans_on=f"toys of {MIN_PIXELS}+ visible pixels; {got.left_out} smaller ones left out",
        picture=picture,
        data=got.to_json() | {"chance": chance},
    )


def reader(context: Context) -> list[Row]:
    """The judge on renders: known and held-out attribute combinations."""
    eye = common.judge_of(context)
    rows = []
    for split, size, said in (
        ("test", context.count(1000, 100), "held-out renders"),
        (
            "heldout",
            context.count(500, 60),
            "renders whose every toy is a combination that no generator was trained on",
        ),
    ):
        dataset = ToyboxDataset(split, 1000 if split == "test" else 500, common.side(context, "toy-judge"))
        pictures = common.pictures_of(dataset, size)
        readings = eye.read(pictures)
        picture = context.save(f"judge-{split}.png", reading_sheet(pictures[:10], readings[:10]))
        rows.append(
            judge_row(f"toy-judge reads at least 98 % of the attributes of {said}", readings, dataset, size, picture)
        )
    return rows


def reader_of_round_trips(name: str, context: Context) -> list[Row]:
    """The judge on pictures that went through a codec."""
    n = context.count(500, 60)
    dataset, _, back = round_trips(context, name, n)
    readings = common.judge_of(context).read(back)
    picture = context.save(f"judge-{name}.png", reading_sheet(back[:10], readings[:10]))
    claim = f"toy-judge reads at least 98 % of the attributes of {name}'s round trips"
    return [judge_row(claim, readings, dataset, n, picture)]


def reading_sheet(pictures: Tensor, readings: list[oracle.SceneReading]):
    """Pictures above the masks that were read, each painted in the colour that was read."""
    from sfumato.toybox.rendering import COLOR_RGB

    painted = []
    for picture, reading in zip(pictures, readings, strict=True):
        canvas = torch.zeros_like(picture)
        for toy in reading.objects:
            canvas[:, toy.mask] = torch.tensor(COLOR_RGB[toy.color])[:, None] * 2 - 1
        painted.append(canvas)
    return common.sheet([list(pictures), painted])


def exchanged(scene: Scene) -> Scene | None:
    """The scene with the colours of its two toys exchanged; None where there are not two of different colours."""
    if len(scene.toys) != 2 or scene.toys[0].color == scene.toys[1].color:
        return None
    first, second = (toy.color for toy in scene.toys)
    return scene.replace(0, color=second).replace(1, color=first)


def retrieval(context: Context) -> list[Row]:
    """Captions found from pictures and pictures from captions, among 64; whose colour is whose, in scenes of two."""
    clip = load_clip(context.folder("toy-clip"))
    dataset = ToyboxDataset("test", 1000, common.side(context, "toy-clip"))
    groups = context.count(15, 3)
    hits: dict[str, list[bool]] = {"caption": [], "picture": [], "binding": []}
    for group in range(groups):
        rows = range(64 * group, 64 * group + 64)
        scenes = [dataset.scenes[i] for i in rows]
        pixels = common.pictures_of(dataset, rows.stop)[rows.start :]
        rivals = {k: other for k, scene in enumerate(scenes) if (other := exchanged(scene)) is not None}
        with torch.no_grad():
            seen = clip.pictures(pixels)
            scores = seen @ clip.text([caption(scene).text for scene in scenes]).T
            wrong = seen[list(rivals)] * clip.text([caption(other).text for other in rivals.values()])
        hits["caption"] += (scores.argmax(1) == torch.arange(64)).tolist()
        hits["picture"] += (scores.argmax(0) == torch.arange(64)).tolist()
        hits["binding"] += (scores.diagonal()[list(rivals)] > wrong.sum(-1)).tolist()
    captions, pictures, bound = (stats.share(each) for each in hits.values())
    return [
        Row(
            claim="toy-clip finds the right caption of 64 for 90 % of held-out renders or more",
            source=SOURCE,
            measured=f"{percent(captions)}; the right picture of 64 {percent(pictures)}",
            baseline="chance 1.6 %",
            bars=[Bar(captions, 1 / 64, 1.0, at_least=0.9)],
            n=captions.n,
            data={"caption": captions.to_json(), "picture": pictures.to_json()},
        ),
        Row(
            claim="toy-clip tells the caption of two toys from the one with their colours exchanged in 95 % of renders",
            source=SOURCE,
            measured=percent(bound),
            baseline="chance 50 %",
            bars=[Bar(bound, 0.5, 1.0, at_least=0.95)],
            n=bound.n,
            data=bound.to_json(),
        ),
    ]


def choose_guidance(context: Context, name: str) -> float:
    """The guidance with the most right toys on other prompts than are reported; 1, 2 and 3 toys weigh the same."""

    def chosen() -> float:
        model, eye = common.load(context, name), common.judge_of(context)
        n = context.count(25, 10)
        asked = [p for k in (1, 2, 3) for p in common.prompts("val", TUNE + k, n, k, "random")]
        candidates = GUIDANCES if not context.quick else GUIDANCES[1:4:2]
        rights = []
        for guidance in candidates:
            texts = [prompt.text for prompt in asked]
            pixels = common.generate(context, model, texts, TUNE, f"{name}, guidance {guidance}", guidance)
            checks = [oracle.check(r, p.requests) for r, p in zip(eye.read(pixels), asked, strict=True)]
            rights.append(sum(check.all_bound for check in checks))
            context.report(f"  {name}: guidance {guidance}: {rights[-1]} of {len(asked)} right")
        return candidates[max(range(len(candidates)), key=rights.__getitem__)]

    return context.once(f"guidance {name}", chosen)


def generator(name: str, context: Context) -> list[Row]:
    """Prompts of one, two and three toys, with the guidance chosen elsewhere."""
    model, eye = common.load(context, name), common.judge_of(context)
    guidance = choose_guidance(context, name)
    steps = model.defaults["steps"]
    rows = []
    for toys, size, seed, split in (
        (1, context.count(500, 20), REPORT, "test"),
        (1, context.count(100, 20), REPORT, "heldout"),
        (2, context.count(200, 20), REPORT + 1, "test"),
        (3, context.count(200, 20), REPORT + 2, "test"),
    ):
        asked = common.prompts(split, seed, size, toys, "random")
        texts = [prompt.text for prompt in asked]
        pixels = common.generate(context, model, texts, seed + 7, f"{name}, {toys} toys", guidance)
        readings = eye.read(pixels)
        requests = [prompt.requests for prompt in asked]
        got = oracle.rates([oracle.check(r, w) for r, w in zip(readings, requests, strict=True)])
        # the same pictures against the requests of the next prompt
        shuffled = oracle.rates(
            [oracle.check(r, w) for r, w in zip(readings, requests[1:] + requests[:1], strict=True)]
        )
        other = shuffled.all_bound.value
        bound = "all toys there in their colours"
        counted = Bar(got.counted, 1 / 3, 1.0, at_least=0.88, what="right number of toys")
        bars = {
            (1, "test"): [Bar(got.all_bound, other, 1.0, at_least=0.98, what=bound), counted],
            (2, "test"): [Bar(got.all_bound, other, 1.0, at_least=0.85, what=bound), counted],
            (3, "test"): [Bar(got.all_bound, other, 0.65, at_least=0.5, at_most=0.8, what=bound)],
        }.get((toys, split), [])
        said = {
            (1, "test"): "one toy: shape and colour both right in 98 % of the pictures, the number of toys in 88 %",
            (1, "heldout"): "one toy in a combination never trained on: shape and colour both right",
            (2, "test"): "two toys: both right in 85 % of the pictures, the number of toys in 88 %",
            (3, "test"): "three toys: all right in 50 to 80 % of the pictures, so that steering can show something",
        }[toys, split]
        rows.append(
            Row(
                claim=f"{name}, {said}",
                source=SOURCE,
                measured=(
                    f"{percent(got.all_bound)}; all shapes there {percent(got.all_present)}; right number of toys "
                    f"{percent(got.counted)}; guidance {guidance}, {steps} steps, {2 * steps} forward-equivalents"
                ),
                baseline=f"another prompt's toys {percent(shuffled.all_bound)}",
                bars=bars,
                headline=(toys, split) == (2, "test") and name == "toy-sd",
                n=size,
                leans_on=common.trust_text(context, "shape", "color"),
                picture=context.save(
                    f"{name}-{split}-{toys}.png", common.sheet([list(pixels[:10]), list(pixels[10:20])])
                ),
                data={"rates": got.to_json(), "shuffled": shuffled.to_json(), "guidance": guidance, "steps": steps},
            )
        )
    return rows


def own_tokens(name: str, context: Context) -> list[Row]:
    """Whose token carries the colour: another prompt's embedding is put in at one place alone."""
    n = context.count(120, 6)
    found = swapped_colors(common.load(context, name), common.judge_of(context), n)
    color, noun = (stats.wilson(round(found[place] * n), n) for place in ("color", "noun"))
    return [
        Row(
            claim=f"{name}: another colour's embedding at the colour's own token changes the toy's colour in 60 % of "
            "the pictures, and more often than at the noun's",
            source="as in Stable Diffusion, where an adjective's own token acts",
            measured=percent(color),
            baseline=f"at the noun {percent(noun)}, at the end and the padding {100 * found['end']:.1f} %",
            bars=[
                Bar(color, 0.0, 1.0, at_least=0.6),
                Bar(stats.newcombe(color, noun), 0.0, 1.0, above=0.0, what="more than at the noun"),
            ],
            n=n,
            leans_on=common.trust_text(context, "shape", "color"),
            data=found,
        )
    ]


EXPERIMENT = Experiment(
    key="zoo",
    title="the built-in models",
    intro=(
        "Everything is measured on scenes and seeds that no training and no choice has seen. Toys of the test scenes"
        " have attribute combinations that occur in training; *held-out* combinations never did."
    ),
    file=__file__,
    parts=(
        *(Part(f"{name}: codec", (name,), partial(codec, name)) for name in CODECS),
        Part("judge on renders", ("toy-judge",), reader),
        *(Part(f"{name}: judge", ("toy-judge", name), partial(reader_of_round_trips, name)) for name in CODECS),
        Part("retrieval", ("toy-clip",), retrieval),
        *(Part(name, (name, "toy-judge"), partial(generator, name)) for name in GENERATORS),
        *(Part(f"{name}: tokens", (name, "toy-judge"), partial(own_tokens, name)) for name in GENERATORS),
    ),
)
