"""DreamBooth: are toys learnt that no word can reach, and does the prior keep the rest as it was?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from claims import children, common, subjects, textual_inversion
from claims.bars import Bar
from claims.core import Context, Experiment, Part, Row
from claims.subjects import Arm
from sfumato.adapters.trainable import adapting, substituted_weights
from sfumato.teach.dreambooth import DreamBooth
from sfumato.teach.taught import Taught
from sfumato.text.placeholders import placeholders
from sfumato.toybox import COLORS, SHAPES, Secret, oracle

SOURCE = "Ruiz et al. 2023"
SETTINGS: dict[str, Any] = {"batch": 2, "checkpoint_every": 10_000, "timesteps": "cubic"}
RATES = {"full": (2e-5, 1e-4, 5e-4), "lora": (5e-4, 2e-3, 8e-3)}
ARMS = ("full", "full, no prior", "full, wrong noun", "lora")


def learnt(context: Context, model: Any, secret: Secret, arm: str, rate: float) -> Taught:
    """The secret in the weights."""
    context.report(f"  teaching {secret.key}, {arm}, rate {rate:g}")
    mode = arm.partition(",")[0]
    noun = SHAPES[(SHAPES.index(secret.noun) + 2) % len(SHAPES)] if "wrong noun" in arm else secret.noun
    given = {"steps": context.count(400, 2), "prior": 0 if "no prior" in arm else context.count(100, 2)}
    system = DreamBooth(class_noun=noun, mode=mode, lr=rate, **given, **SETTINGS)
    with subjects.at_work(context, model, noun) as work:
        return system.teach(model, subjects.folder_of(context, secret, side=model.default_size[0]), work=work)


def rate(context: Context, name: str, mode: str) -> float:
    """The learning rate that does best on validation secrets of type B, with a prior."""
    model, n = children.world(context, name), context.count(18, 3)

    def score(value: float) -> float:
        found = []
        for secret in subjects.validation(context, "B"):
            taught = learnt(context, model, secret, mode, value)
            found.append(drawn(context, model, secret, taught, f"rate {value:g}", n))
        return subjects.worth(found)

    rates = RATES[mode][: context.count(3, 1)]
    return subjects.chosen(context, f"{name}, {mode}: rate", rates, score, __file__, (name, "toy-judge"))


def drawn(context: Context, model: Any, secret: Secret, taught: Taught, arm: str, n: int) -> Arm:
    """Pictures of the identifier and its noun."""
    with adapting(taught.lora), substituted_weights(model, taught.weights):  # type: ignore[arg-type]
        return subjects.drawn(context, arm, model, secret, taught.facts["subjects"][0], n)


def unrelated(context: Context, model: Any, n: int) -> float:
    """Share of other toys with the right shape and colour."""
    requests = [(COLORS[i % len(COLORS)], SHAPES[(i * 5 + 1) % len(SHAPES)]) for i in range(n)]
    texts = [f"a {color} {shape}" for color, shape in requests]
    pictures = common.generate(
        context, model, texts, subjects.REPORT + 5000, "unrelated prompts", **subjects.quickly(context)
    )
    reads = common.judge_of(context).read(pictures)
    hits = [oracle.find(read, oracle.RequestedToy.parse([color, shape])) is not None
            for read, (color, shape) in zip(reads, requests, strict=True)]  # fmt: skip
    return float(np.mean(hits))


def arms(context: Context, name: str) -> list[dict[str, Any]]:
    """Every arm of every secret with its leak and drift, once per run."""

    def made() -> list[dict[str, Any]]:
        model, out, n = children.world(context, name), [], context.count(48, 6)
        before = unrelated(context, model, n)
        for secret in subjects.secrets(context):
            found: dict[str, Any] = {"secret": secret, "renders": subjects.ceiling(context, secret, n)}
            said = {"nearest word": f"{secret.near} {secret.noun}", "description": secret.description,
                    "word": "<rex>", "class alone": secret.noun}  # fmt: skip
            k = textual_inversion.vectors(context, name)
            with placeholders(model, textual_inversion.taught(context, name, secret, k)):
                found |= {arm: subjects.kept(context, arm, model, secret, noun, n) for arm, noun in said.items()}
            found["leak before"] = found.pop("class alone").identity
            for arm in ARMS:
                own = after(context, name, secret, arm, rate(context, name, arm.partition(",")[0]), n)
                found[arm] = subjects.seen(context, arm, secret, own["noun"], own["pictures"])
                found[f"{arm} leak"] = subjects.seen(context, arm, secret, secret.noun, own["class alone"]).identity
                found[f"{arm} drift"] = before - own["unrelated"]
                found[f"{arm} parameters"], found[f"{arm} changes"] = own["parameters"], own["changes"]
            out.append(found)
        return out

    return context.once(f"{name} dreambooth", made)


def after(context: Context, name: str, secret: Secret, arm: str, rate: float, n: int) -> dict[str, Any]:
    """What the model draws after it was taught: the secret, its class alone, and other toys (the share of right ones);
    how many numbers it learnt, and how far the weights of each kind moved."""

    def made() -> dict[str, Any]:
        model = children.world(context, name)
        taught = learnt(context, model, secret, arm, rate)
        noun, sizes = taught.facts["subjects"][0], [w.numel() for w in taught.weights.values()]
        sizes += [p.numel() for each in taught.lora.values() for p in each.parameters().values()]
        facts = {"noun": noun, "parameters": sum(sizes), "changes": changes(model, taught)}  # while model is untaught
        with adapting(taught.lora), substituted_weights(model, taught.weights):  # type: ignore[arg-type]
            return facts | {
                "pictures": subjects.pictured(context, arm, model, secret, noun, n),
                "class alone": subjects.pictured(context, "class alone", model, secret, secret.noun, n),
                "unrelated": unrelated(context, model, n),
            }  # fmt: skip

    return context.kept((f"{secret.key}, {arm}", name, rate, n), made, __file__, (name, "toy-judge"))


def changes(model: Any, taught: Taught) -> dict[str, float]:
    """Mean relative change of the matrices of each kind of layer (Kumari et al. 2023, section 3.1)."""
    per: dict[str, list[float]] = {}
    for path, value in taught.weights.items():
        component, _, parameter = path.partition(".")
        own = model.modules[component].get_parameter(parameter)
        if own.ndim < 2:
            continue
        kind = next((kind for mark, kind in KINDS if mark in parameter), "the rest")
        per.setdefault(kind, []).append(float((value - own).norm() / own.norm().clamp_min(1e-12)))
    return {kind: float(np.mean(each)) for kind, each in per.items()}


KINDS = (
    ("attn2.to_k", "keys and values of the text"), ("attn2.to_v", "keys and values of the text"),
    ("add_k_proj", "keys and values of the text"), ("add_v_proj", "keys and values of the text"),
    ("attn2", "cross-attention, the rest"), ("attn", "self-attention"),
)  # fmt: skip


def gaps(found: Sequence[dict[str, Any]], arm: str) -> list[float]:
    """Share of the gap that an arm closes, of each secret."""
    return [subjects.gap(each[arm], (each["nearest word"], each["description"]), each["renders"]) for each in found]


def measured(context: Context, name: str) -> list[Row]:
    found, reader = arms(context, name), subjects.reader_of(context)
    b = [each for each in found if each["secret"].kind == "B"]
    gained = subjects.average(np.subtract(gaps(b, "full"), gaps(b, "word")))
    prompt = subjects.average([each["full"].ground - each["word"].ground for each in found])
    leak, bare = ([each[f"{arm} leak"] for each in found] for arm in ("full", "full, no prior"))
    identity = {arm: [each[arm].identity for each in found] for arm in ARMS}
    leaked, kept = subjects.against(leak, bare), subjects.against(identity["full"], identity["full, no prior"])
    noun = subjects.average(np.subtract(identity["full"], identity["full, wrong noun"]))
    lora = subjects.against(gaps(found, "lora"), gaps(found, "full"))
    share = subjects.average([each["lora parameters"] / each["full parameters"] for each in found])
    drift = {arm: subjects.average([each[f"{arm} drift"] for each in found]) for arm in ARMS}
    shown = {"renders": "renders, on any ground", "description": "described", "word": "a taught word"}
    shown |= {arm: arm for arm in ARMS}
    picture = context.save(f"dreambooth-{name}.png", subjects.scenes(found, shown))
    data = {each["secret"].key: {k: v.identity if isinstance(v, Arm) else v for k, v in each.items() if k != "secret"}
            for each in found}  # fmt: skip
    rates = {mode: rate(context, name, mode) for mode in RATES}
    n = len(found) * len(found[0]["full"].reads)
    shared: dict[str, Any] = {"source": SOURCE, "n": n, "leans_on": reader.leans,
                              "data": {"secrets": data, "rates": rates}}  # fmt: skip
    powerless = "" if np.mean(bare) >= 0.3 else f"without a prior the class leaks in {np.mean(bare):.2f} only"
    return [
        Row(claim=f"{name}: textures never rendered (type B): 25 % more of the gap is closed than by a word, and "
            "prompts are obeyed within 5 points", measured=f"{gained.text()}, obedience {prompt.text()}",
            baseline=f"word {np.mean(gaps(b, 'word')):.2f}", picture=picture, headline=True,
            bars=[Bar(gained, null=0.0, ideal=1.0, at_least=0.25, what="gap closed beyond the word's"),
                  Bar(prompt, null=-0.8, ideal=0.0, at_least=-0.05, what="obedience")], **shared),
        Row(claim=f"{name}: without a prior the class leaks (30 % of its pictures are the secret); with it 60 % less, "
            "at a loss of at most 10 % of identity", measured=f"{leaked.text()} of the leak, {kept.text()} of identity",
            baseline=f"no prior: leak {np.mean(bare):.2f}, identity {np.mean(identity['full, no prior']):.2f}",
            void=powerless, bars=[Bar(leaked, null=1.0, ideal=0.0, at_most=0.4, what="leak"),
                                  Bar(kept, null=0.0, ideal=1.0, at_least=0.9, what="identity")], **shared),
        Row(claim=f"{name}: the right noun is worth something: under another the secret is recognised less often",
            measured=noun.text(), baseline=f"another noun {np.mean(identity['full, wrong noun']):.2f}",
            bars=[Bar(noun, null=0.0, ideal=0.5, above=0.0, what="identity gained")], **shared),
        Row(claim=f"{name}: a LoRA of rank 4 is within 10 % of full fine-tuning with under 5 % of its parameters",
            measured=f"{lora.text()} of the gap, {share.text(percent=True)} of the parameters",
            baseline="full fine-tuning 1",
            bars=[Bar(lora, null=0.0, ideal=1.0, at_least=0.9, what="gap closed over full's"),
                  Bar(share, null=1.0, ideal=0.01, at_most=0.05, what="share of the parameters")], **shared),
        Row(claim=f"{name}: other toys are drawn as before, within 5 points", measured=drift["full"].text(),
            baseline=", ".join(f"{arm} {each.value:+.2f}" for arm, each in drift.items()),
            bars=[Bar(drift["full"], null=0.5, ideal=0.0, at_most=0.05, what="lost")], **shared),
    ]  # fmt: skip


EXPERIMENT = Experiment(
    key="dreambooth",
    title="DreamBooth",
    intro="The eight secret toys of the textual-inversion claims, five pictures each, in the same generators: all "
    "weights with a prior, without one and under a wrong noun, and a LoRA of rank 4, beside a taught word. Learning "
    "rates are chosen on other toys; intervals are over toys.",
    file=__file__,
    parts=(
        Part("toy-sd", ("toy-sd", "toy-judge"), lambda context: measured(context, "toy-sd")),
        Part("toy-sd3", ("toy-sd3", "toy-judge"), lambda context: measured(context, "toy-sd3")),
    ),
)
