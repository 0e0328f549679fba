"""SaD and PaD: which attributes a generator makes too often or too rarely, and which it combines wrongly.

Kim, Kwon, Uh 2024 (https://arxiv.org/abs/2310.17261); the figures are in :mod:`sfumato.metrics.sad_pad`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sfumato import cards
from sfumato.cards import Card, Field, Template, register
from sfumato.errors import NoMatch
from sfumato.metrics.frechet import finite
from sfumato.metrics.sad_pad import Divergences, divergence, hcs
from sfumato.protocol import Comparison

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.models.readers import Clip

__all__ = ["SadPad", "attribute_embeddings", "find_attributes", "plots"]


@register
class SadPad:
    """The system as ``sfumato judge REAL FAKE --attributes ...`` runs it: its card, its parameters, one call."""

    CARD = Card(
        key="sad_pad",
        title="Attribute Based Interpretable Evaluation Metrics for Generative Models",
        authors="Kim, Kwon, Uh",
        year=2024,
        arxiv="2310.17261",
        verb="judge",
        needs=(),
        defaults_from="section 3 and the authors' code (template, floor, units); null and excess are ours",
        cost="one forward of a CLIP per picture",
        not_reproduced="attributes from a language model or a captioner: give a list, or captions",
        default_for=("judge",),
        summary="Names the attributes and pairs of attributes that two sets of pictures show unequally often.",
    )

    class Params(cards.Params):
        template: Template = Field("a photo of {}", description="sentence an attribute is put into; {} stands for it")
        pairs: bool = Field(True, description="whether to look at pairs of attributes")
        draws: int = Field(100, ge=0, le=10_000, description="permutations that say what chance would show")
        reference: bool = Field(False, description="centre the attributes as the authors' code does")
        seed: int = Field(0, ge=0, description="of the permutations")

    def __init__(self, **given: Any):
        self.params = self.Params(**given)

    def scores(self, clip: Clip, attributes: Sequence[str], real: np.ndarray, fake: np.ndarray) -> Any:
        """HCS (n, m) and (n', m) of two sets of picture embeddings (n, d), (n', d); both centred on the real one."""
        written, text_centre = attribute_embeddings(clip, attributes, self.params.template, self.params.reference)
        centre = finite(real).mean(0)
        return tuple(hcs(each, written, centre, text_centre) for each in (real, fake))

    def compare(
        self,
        names: Sequence[str],
        real: np.ndarray,
        fake: np.ndarray,
        mentions: np.ndarray | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Divergences:
        """:func:`divergence` of scores with this system's parameters."""
        p = self.params
        return divergence(
            real, fake, names, pairs=p.pairs, draws=p.draws, seed=p.seed, mentions=mentions, on_progress=on_progress
        )

    def find_attributes(self, captions: Iterable[str], most: int = 20) -> list[str]:
        """:func:`find_attributes`."""
        return find_attributes(captions, most)

    def compare_attributes(
        self,
        attributes: Sequence[str],
        real: np.ndarray,
        fake: np.ndarray,
        mentions: np.ndarray | None = None,
        scored_by: str = "",
    ) -> Comparison:
        """:meth:`compare` as figures, tables and plots."""
        return _shown(self.compare(attributes, real, fake, mentions), scored_by)


# --- attributes ------------------------------------------------------------------------------------------------------


def attribute_embeddings(clip: Clip, attributes: Sequence[str], template: str, reference: bool = False) -> Any:
    """Text embeddings (m, d) of the attributes in the template, and their centre C_A (d,).

    The authors' code puts attributes into "a photo of" but centres on the bare words, which leaves the direction of
    the template in every attribute alike; here both wear it. ``reference=True`` follows the code.
    """
    written = clip.text_features([template.format(attribute) for attribute in attributes])
    centred = clip.text_features(list(attributes)) if reference else written
    return written, centred.mean(0)


def find_attributes(captions: Iterable[str], most: int = 20, least: float = 0.01) -> list[str]:
    """The words that describe and name things most often in captions: adjectives and nouns of their noun phrases.

    Words in fewer than ``least`` or more than 95 % of the captions cannot tell two sets apart and are left out. Raises
    NoMatch when nothing remains. (The paper takes them from BLIP captions, or from a language model.)
    """
    from sfumato.text.phrases import noun_phrases

    found: Counter[str] = Counter()
    n = 0
    for text in captions:
        n += 1
        phrases = noun_phrases(text)
        found.update({word.text.lower() for phrase in phrases for word in (*phrase.modifiers, phrase.head)})
    ranked = [word for word, count in sorted(found.items(), key=lambda item: (-item[1], item[0]))
              if max(least * n, 2) <= count <= 0.95 * n]  # fmt: skip
    if not ranked:
        raise NoMatch(f"no attribute occurs in the {n} captions often enough; give a list with --attributes.")
    return ranked[:most]


# --- into a report ---------------------------------------------------------------------------------------------------


def _shown(found: Divergences, scored_by: str, most: int = 20) -> Comparison:
    shown = Comparison(plots=plots(found), data=found.to_json())
    shown.figures.append(("SaD", found.sad, f"1000 x KL, {scored_by}; chance stays below {found.sad_null:.4g}"))
    if found.pairs:
        shown.figures.append(("PaD", found.pad, f"1000 x KL; chance stays below {found.pad_null:.4g}"))
    rows: list[tuple[str, ...]] = [
        (
            each.name, f"{each.kl:.1f}", f"{each.null:.1f}", f"{each.p:.3f}",
            ("too much" if each.gap.value > 0 else "too little") if each.shifted else "no shift seen",
            each.gap.text(digits=2),
            "" if each.auroc is None else f"{each.auroc:.2f}" + ("" if each.readable else " unreadable"),
        )
        for each in found.attributes
    ]  # fmt: skip
    heads: tuple[str, ...] = ("attribute", "1000 KL", "chance", "p", "there is", "mean gap [95 %]", "AUROC")
    shown.tables.append(("Attributes, by divergence", heads, rows))
    if found.pairs:
        rows = [
            (f"{each.first} + {each.second}", f"{each.kl:.1f}", f"{each.excess:.1f}", f"{each.null:.1f}",
             f"{each.p:.3f}", "combined otherwise" if each.shifted else "")
            for each in found.pairs[:most]
        ]  # fmt: skip
        heads = ("pair", "1000 KL", "excess", "chance", "p", "")
        shown.tables.append(("Pairs, by what their two attributes do not explain", heads, rows))
    unread = [each.name for each in found.attributes if not each.readable]
    if unread:
        shown.notes.append(f"{scored_by} cannot tell {', '.join(unread)} (AUROC below 0.75); do not read their rows")
    return shown


# --- pictures --------------------------------------------------------------------------------------------------------


def plots(found: Divergences, most: int = 12) -> dict[str, Image]:
    """``attributes``: ranked divergences, coloured by sign; ``densities``: the first ones; ``pairs``: every pair."""
    drawn = {"attributes": _bars(found, most), "densities": _curves(found, most)}
    return drawn | ({"pairs": _matrix(found)} if found.pairs else {})


def _bars(found: Divergences, most: int) -> Image:
    shown = found.attributes[:most][::-1]
    figure = _figure(6, 0.6 + 0.3 * len(shown))
    axes = figure.subplots()
    colors = ["#c44" if each.gap.value > 0 else "#48c" for each in shown]
    labels = [each.name + ("" if each.readable else " (unreadable)") for each in shown]
    axes.barh(labels, [each.kl for each in shown], color=colors)
    if all(np.isfinite(each.null) for each in shown):
        axes.plot([each.null for each in shown], labels, "k|", markersize=10)
    axes.set_xlabel("1000 KL; red: too much, blue: too little; |: 95 % of chance")
    return _drawn(figure)


def _curves(found: Divergences, most: int) -> Image:
    shown = found.attributes[: min(most, 6)]
    columns = min(3, len(shown))
    figure = _figure(2.6 * columns, 1.9 * -(-len(shown) // columns))
    for each, axes in zip(shown, np.ravel(figure.subplots(-(-len(shown) // columns), columns)), strict=False):
        grid, real, fake = found.grids[each.name]
        axes.plot(grid, real, "k-", grid, fake, "r--", linewidth=1)
        axes.set_title(each.name, fontsize=9)
        axes.set_yticks([])
    return _drawn(figure)


def _matrix(found: Divergences) -> Image:
    names = list(found.grids)
    values = np.full((len(names), len(names)), np.nan)
    for pair in found.pairs:
        i, j = names.index(pair.first), names.index(pair.second)
        values[i, j] = values[j, i] = pair.excess
    figure = _figure(2 + 0.3 * len(names), 1.4 + 0.3 * len(names))
    axes = figure.subplots()
    shown = axes.imshow(values, cmap="magma")
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    figure.colorbar(shown, ax=axes, label="1000 x excess KL of the pair")
    return _drawn(figure)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure((width, height), dpi=110, layout="constrained")


def _drawn(figure: Any) -> Image:
    import io

    from PIL import Image

    encoded = io.BytesIO()
    figure.savefig(encoded, format="png")
    return Image.open(encoded).convert("RGB")
