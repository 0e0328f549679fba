"""Inside-outside attention (section 3): pixels see only words, and only pixels, of their own side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato import mask_ops
from sfumato.attention.call import Call
from sfumato.attention.tap import Tap
from sfumato.models import Condition, Site
from sfumato.sampling import Intervention, Run
from sfumato.steer.shape_guided.pieces import plain
from sfumato.steer.shape_guided.sides import Sides
from sfumato.text.weights import WeightedPrompt, encode_weighted

DECAYS = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1 - progress,
    "exponential": lambda progress: 0.95 ** (50 * progress),
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
}


def takes_part(site: Site) -> bool:
    return site.grid is not None and site.kind != "temporal"


class InsideOutside(Intervention):
    """The constraint itself: a composite text and inside-outside attention, for given regions and texts.

    ``params``: those of ``ShapeGuided``. ``regions`` (r H W); ``texts`` and, where something is edited, ``before``: one
    list of r + 1 texts per sample, the outside last. ``hard``: the given decay is left out, as on the original's way
    back.
    """

    role = "editor"
    hard: bool = False
    weighted: Sequence[Sequence[WeightedPrompt]] = ()  # the texts with the prompt's weights, where these are known

    def __init__(
        self,
        params: Any,
        regions: Tensor,
        texts: Sequence[Sequence[str]],
        before: Sequence[Sequence[str]] | None = None,
        hard: bool = False,
    ):
        self.options, self.regions, self.texts, self.before, self.hard = params, regions, texts, before, hard

    @property
    def strength(self) -> float:
        return self.options.strength

    def on_text(self, run: Run, condition: Condition) -> Condition:
        """The composite text: each side's own encoding, side by side."""
        sides = Sides(run.model, len(self.regions) + 1)
        embeds = condition.cond["embeds"].clone()
        rows = {**condition.cond, "embeds": embeds}
        if "mask" in rows:
            rows["mask"] = rows["mask"].clone()
        length = embeds.shape[1]
        self.own = sides.own(length).to(embeds.device)
        boosted = self.own.sum(0) * self.options.boost
        self.columns = boosted.repeat(len(run), 1)  # (b t)
        for group in range(sides.groups):
            texts = [each[group] for each in self.texts]
            sides.check_lengths(texts)
            given = [each[group] for each in self.weighted] if self.weighted else list(map(plain, texts))
            alone = encode_weighted(
                run.model,
                given,
                None,
                guidance=False,
                embedded_guidance=condition.guidance,
                weighting=run.weighting,
            ).cond
            for stream, (first, part) in sides.stretches.items():
                embeds[:, sides.part(stream, group)] = alone["embeds"][:, first : first + part]
                if "mask" in rows:
                    rows["mask"][:, sides.part(stream, group)] = alone["mask"][:, first : first + part]
            for i, old in enumerate(self.before or ()):
                fixed = sides.fixed(old[group], texts[i], group, length).to(embeds.device)
                self.columns[i] = torch.where(fixed, self.own.sum(0), self.columns[i])
        self._at: dict[tuple[tuple[int, int], bool], Tensor] = {}
        self.mark()
        uncond = condition.uncond
        if uncond is not None and (condition.negatives or "mask" in uncond):
            # a negative prompt, or the few tokens that a mask leaves, must be there for every side
            uncond = {**uncond, **{name: uncond[name].clone() for name in ("embeds", "mask") if name in uncond}}
            for stream, (first, part) in sides.stretches.items():
                for group in range(1, sides.groups):
                    for name in {"embeds", "mask"} & set(uncond):
                        uncond[name][:, sides.part(stream, group)] = uncond[name][:, first : first + part]
        return Condition(rows, uncond, condition.prompts, condition.negatives, condition.guidance)

    def taps(self) -> Sequence[Tap]:
        wanted = {"cross", "joint"} if self.options.cross else set()
        wanted |= {"self", "joint"} if self.options.self_attention else set()
        if not wanted:
            return []
        return [
            Tap(lambda site: takes_part(site) and site.kind in wanted, edit_probs=self._edit, name="inside-outside")
        ]

    # -- inside attention ----------------------------------------------------------------------------------------------

    def _edit(self, call: Call) -> Tensor:
        weights = self._weights(call.site, call.step.progress)
        weights = 1 + self.strength * (weights - 1)
        probs = call.probs()
        if call.site.kind == "joint":  # tokens of reference pictures follow: they are left as they are
            rows, columns = (probs.shape[axis] - weights.shape[axis - 1] for axis in (2, 3))
            weights = torch.nn.functional.pad(weights, (0, columns, 0, rows), value=1.0)
        repeats = len(probs) // len(weights)
        probs = probs * weights.repeat(repeats, 1, 1)[:, None].to(probs)
        if self.options.renormalise == "all" or (self.options.renormalise == "joint" and call.site.kind == "joint"):
            probs = probs / probs.sum(-1, keepdim=True).clamp_min(torch.finfo(probs.dtype).tiny)
        self.mark(call.step, sites=[call.site.path])
        return probs

    def _weights(self, site: Site, progress: float) -> Tensor:
        """(b n t), or (1 n t) where all samples agree: what each probability is multiplied by."""
        sides = self._sides(site)
        if site.kind == "self":
            return self._among_pixels(sides, progress, "constant")[None]
        words = self._to_words(sides)
        if site.kind == "cross":
            return words
        # joint: rows and columns are those of one sequence
        assert site.text is not None
        image, text = slice(*site.image), slice(*site.text)
        total = max(image.stop, text.stop)
        weights = torch.ones(len(words), total, total, device=words.device)
        if self.options.self_attention:
            weights[:, image, image] = self._among_pixels(sides, progress, "linear")
        if self.options.cross:
            weights[:, image, text] = words
            grouped = self.own.sum(0) > 0
            rows = torch.arange(total, device=words.device)[text][grouped]
            weights[:, rows, image] = (self.own.T @ sides)[grouped]
            weights[:, rows, text] = (self.own.T @ self.own)[grouped]
        return weights

    def _to_words(self, sides: Tensor) -> Tensor:
        """(b n t): inside pixels see inside tokens, outside pixels outside tokens, nobody the start token; section 3.2
        with the original's boost of (new) words."""
        return (sides.T @ self.own)[None] * self.columns[:, None]

    def _among_pixels(self, sides: Tensor, progress: float, otherwise: str) -> Tensor:
        """(n n): pixels see their own side, section 3.1; ``self_attention`` 1 is a hard mask."""
        same = (sides.T @ sides).clamp(max=1)
        decay = "constant" if self.hard and self.options.decay else self.options.decay
        return 1 + self.options.self_attention * DECAYS[decay or otherwise](progress) * (same - 1)

    def _sides(self, site: Site) -> Tensor:
        """(r+1 n): how much of each pixel of a site's grid belongs to each region, and to the outside."""
        assert site.grid is not None
        soft = site.kind == "joint" if self.options.soft is None else self.options.soft
        if (site.grid, soft) not in self._at:
            inside = mask_ops.on_grid(self.regions, site.grid, self.options.level, soft)
            sides = torch.cat([inside, 1 - inside.amax(0, keepdim=True)])
            self._at[site.grid, soft] = sides.flatten(1).to(self.own.device)
        return self._at[site.grid, soft]
