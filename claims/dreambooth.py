"""DreamBooth: are toys learnt that no word can reach, and does the prior keep the rest as it was?"""

from __future__ import annotations

from typing import Any

import numpy as np

from claims import common, subjects, textual_inversion
from claims.core import Context, Experiment, Part, Row
from claims.subjects import Arm
from sfumato.adapters.fresh import adapting, learning_weights
from sfumato.metrics import stats
from sfumato.teach.dreambooth import DreamBooth
from sfumato.text.placeholders import placeholders
from sfumato.toybox import COLORS, SHAPES, oracle

SOURCE = "Ruiz et al. 2023"
SETTINGS: dict[str, Any] = {"batch": 2}
#: chosen on the secret "zigzag" with other seeds than those reported
RATES = {"full": 1e-4, "lora": 2e-3}
ARMS = ("full", "full, no prior", "lora")


def recognised(context: Context, model: Any, secret: Any, n: int) -> Arm:
    """Pictures of the class alone, without the identifier."""
    return subjects.drawn(context, "class alone", model, secret, secret.noun, n)


def unrelated(context: Context, model: Any, n: int) -> float:
    """Share of other toys with the right shape and colour."""
    wishes = [(COLORS[i % len(COLORS)], SHAPES[(i * 5 + 1) % len(SHAPES)]) for i in range(n)]
    texts = [f"a {color} {shape}" for color, shape in wishes]
    pictures = common.generate(
        context, model, texts, subjects.REPORT + 5000, "unrelated prompts", **subjects.quickly(context)
    )
    reads = common.judge_of(context).read(pictures)
    hits = [oracle.find(read, oracle.Wanted.parse([color, shape])) is not None
            for read, (color, shape) in zip(reads, wishes, strict=True)]  # fmt: skip
    return float(np.mean(hits))


def arms(context: Context, name: str) -> list[dict[str, Any]]:
    """Every arm of every secret with its leak and drift, once per run."""

    def made() -> list[dict[str, Any]]:
        model, out, n = common.load(context, name), [], context.count(48, 6)
        before = unrelated(context, model, n)
        for secret in subjects.secrets(context):
            found: dict[str, Any] = {"secret": secret, "renders": subjects.ceiling(context, secret, n)}
            found["floor"] = subjects.drawn(context, "description", model, secret, secret.description, n)
            words = textual_inversion.taught(context, name, secret.key, 1)
            with placeholders(model, words):
                found["word"] = subjects.drawn(context, "word", model, secret, "<rex>", n)
            found["leak before"] = recognised(context, model, secret, n).identity
            for arm in ARMS:
                context.report(f"  {name}: teaching {secret.key}, {arm}")
                mode = arm.partition(",")[0]
                given = {"steps": context.count(300, 2), "prior": 0 if "no prior" in arm else context.count(100, 2)}
                system = DreamBooth(class_noun=secret.noun, mode=mode, lr=RATES[mode], **given, **SETTINGS)
                taught = system.teach(model, subjects.folder_of(context, secret))
                said = taught.facts["subjects"][0]
                with adapting(taught.lora), learning_weights(model, taught.weights):  # type: ignore[arg-type]
                    found[arm] = subjects.drawn(context, arm, model, secret, said, n)
                    found[f"{arm} leak"] = recognised(context, model, secret, n).identity
                    found[f"{arm} drift"] = before - unrelated(context, model, n)
                sizes = [p.numel() for each in taught.lora.values() for p in each.parameters().values()]
                found[f"{arm} parameters"] = sum(sizes) + sum(w.numel() for w in taught.weights.values())
            out.append(found)
        return out

    return context.once(f"{name} dreambooth", made)


def measured(context: Context, name: str) -> list[Row]:
    found, reader = arms(context, name), subjects.reader_of(context)
    b = [each for each in found if each["secret"].kind == "B"]

    def closed(each: dict[str, Any], arm: str) -> float:
        return subjects.closed(each[arm].identity, each["floor"].identity, each["renders"].identity)

    gained = [closed(each, "full") - closed(each, "word") for each in b]
    prompt = [each["full"].ground - each["word"].ground for each in found]
    leak, bare = ([each[f"{arm} leak"] for each in found] for arm in ("full", "full, no prior"))
    lora = [closed(each, "lora") / max(closed(each, "full"), 1e-6) for each in found]
    share = float(np.mean([each["lora parameters"] / each["full parameters"] for each in found]))
    drift = {arm: float(np.mean([each[f"{arm} drift"] for each in found])) for arm in ARMS}
    shown = [[arm.pictures[i] for key in ("renders", "floor", "word", *ARMS) for i in (0, 1) if (arm := each[key])]
             for each in found]  # fmt: skip
    picture = context.save(f"dreambooth-{name}.png", common.sheet(shown))
    data = {each["secret"].key: {k: v.identity if isinstance(v, Arm) else v for k, v in each.items() if k != "secret"}
            for each in found}  # fmt: skip
    n = len(found) * len(found[0]["full"].reads)
    shared: dict[str, Any] = {"source": SOURCE, "n": n, "leans_on": reader.leans, "data": data}
    gap = stats.mean(gained).text() if len(gained) > 1 else f"{gained[0]:.2f}"
    return [
        Row(claim=f"{name}: textures never rendered (type B): 25 % more of the gap is closed than by a word, and "
            "prompts are obeyed within 5 points", measured=f"{gap}, obedience {np.nanmean(prompt):+.2f}",
            baseline=f"word {np.mean([closed(e, 'word') for e in b]):.2f}",
            holds=bool(np.mean(gained) >= 0.25 and np.nanmean(prompt) >= -0.05), picture=picture, **shared),
        Row(claim=f"{name}: without a prior the class leaks (30 % of its pictures are the secret), with it 60 % less",
            measured=f"{np.mean(leak):.2f}", baseline=f"no prior {np.mean(bare):.2f}",
            holds=bool(np.mean(leak) <= 0.4 * np.mean(bare)) if np.mean(bare) >= 0.3 else None, **shared),
        Row(claim=f"{name}: a LoRA of rank 4 is within 10 % of full fine-tuning with under 5 % of its parameters",
            measured=f"{np.nanmean(lora):.2f} of the gap, {100 * share:.1f} % of the parameters",
            baseline="full fine-tuning 1", holds=bool(np.nanmean(lora) >= 0.9 and share < 0.05), **shared),
        Row(claim=f"{name}: other toys are drawn as before, within 5 points", measured=f"{drift['full']:+.2f}",
            baseline=f"no prior {drift['full, no prior']:+.2f}, LoRA {drift['lora']:+.2f}",
            holds=bool(drift["full"] <= 0.05), **shared),
    ]  # fmt: skip


EXPERIMENT = Experiment(
    key="dreambooth",
    title="DreamBooth",
    intro="The eight secret toys of the textual-inversion claims, five pictures each: all weights with and without a "
    "prior, and a LoRA of rank 4 with one, beside a taught word.",
    file=__file__,
    parts=(
        Part("toy-sd", ("toy-sd", "toy-judge"), lambda context: measured(context, "toy-sd")),
        Part("toy-sd3", ("toy-sd3", "toy-judge"), lambda context: measured(context, "toy-sd3")),
    ),
)
