"""Prompt-to-Prompt: change a word, add a description, or turn a word up or down, and keep the rest of the picture.

What a picture looks like is laid out by which pixels attend to which words. So the edited prompt is drawn from the
source's noise while, for a share of the denoising, its attention maps are made from those of the source (Hertz et al.
2022, section 3); values stay those of the edited prompt.

    >>> edit = PromptToPrompt(source="a red cube and a blue ball")
    >>> generate(model, "a green cube and a blue ball", seed=3, interventions=edit)
    >>> again = PromptToPrompt(recording=edit.recording)  # further edits do not draw the source again
    >>> generate(model, "a red cube and a blue cone", seed=3, interventions=again)

An edited map is linear in the source's map M and the own map M*, column by column: M A + M* diag(b). Its product with
the values V* is therefore attention with the source's queries and keys to values A V*, plus own attention to b V*; no
map is materialised, and an edit that changes nothing keeps every bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sfumato import cards
from sfumato.attention.call import Call
from sfumato.attention.map_replacement import MapReplacement
from sfumato.attention.sites import Site
from sfumato.attention.tap import Tap
from sfumato.cards import Card, Field, register
from sfumato.edit.original import FollowsSource
from sfumato.edit.prompt_to_prompt.blend import LocalBlend
from sfumato.edit.prompt_to_prompt.mixed_map import MixedMap, StepEdit
from sfumato.edit.prompt_to_prompt.refusals import refuse_other_noise, refuse_source, refuse_unequal_lengths
from sfumato.edit.prompt_to_prompt.sites import EditedSites, edited_sites
from sfumato.edit.prompt_to_prompt.source import attention_of, prompts_of
from sfumato.edit.prompt_to_prompt.values import (
    Factors,
    WindowEdges,
    WordWindows,
    factors_of,
    known,
    refuse_overlaps,
    require,
    window_of,
    windows_of,
)
from sfumato.errors import BadInput, Conflict
from sfumato.sampling import Intervention, Run, Step
from sfumato.sampling.intervention import Coverage
from sfumato.sampling.recording import Recorder, Recording, record_auxiliary
from sfumato.text.align import align, best_mode, equaliser, gate
from sfumato.text.weights import read_weights
from sfumato.text.words import Words
from sfumato.windows import inside

__all__ = ["PromptToPrompt"]


@register
class PromptToPrompt(FollowsSource, Intervention):
    """Edits by attention control. ``recording`` is the source, given or drawn when the run begins."""

    CARD = Card(
        key="prompt_to_prompt",
        title="Prompt-to-Prompt Image Editing with Cross-Attention Control",
        authors="Hertz, Mokady, Tenenbaum, Aberman, Pritch, Cohen-Or",
        year=2022,
        arxiv="2208.01626",
        verb="edit",
        needs=("pictures", "noise_path", "text_attention"),
        defaults_from="the authors' notebooks for Stable Diffusion (cross 0.8, self 0.4, blend 0.3 from 0.2 on)",
        cost="the source's own rows once; then next to nothing beside the edited picture's rows",
        not_reproduced="masks and threshold per word; the joint attention of SD3 and Flux is our extension",
        summary="change words of the prompt and keep the picture",
        default_for=("edit",),
        example="prompt_to_prompt:source=a red cube and a red ball",
    )

    class Params(cards.Params):
        source: str | None = Field(default=None, description="the prompt of the picture that is edited")
        mode: Literal["auto", "replace", "refine"] = Field(
            default="auto",
            description="replace: word for word; refine: words added or removed; auto: replace where both prompts have "
            "equally many words",
        )
        reweight: Factors = Field(
            default=[], description="words of the new prompt with a factor for their attention, as word=1.5"
        )
        cross_replace: WindowEdges = Field(
            default=[0.8],
            min_length=1,
            max_length=2,
            description="share of the denoising whose attention to words is the source's: the end, or start and end",
            json_schema_extra={"unit": "progress"},
        )
        self_replace: WindowEdges = Field(
            default=[0.4],
            min_length=1,
            max_length=2,
            description="the same for attention among pixels, which carries layout and geometry",
            json_schema_extra={"unit": "progress"},
        )
        windows: WordWindows = Field(
            default=[], description="words of the new prompt with a window of their own, as word=0.2-0.6"
        )
        self_cells: int | None = Field(
            default=None,
            ge=1,
            description="largest grid at which attention among pixels is taken over; none: 16 times fewer cells than "
            "the latents but at least 64, and every layer of a joint attention",
            json_schema_extra={"unit": "cell"},
        )
        layers: list[str] = Field(default=[], description="blocks or module paths to edit, such as up; none: all")
        blend: list[str] = Field(
            default=[], description="words of either prompt; outside of where they act the source is kept"
        )
        substruct: list[str] = Field(default=[], description="words whose place is taken out of that of blend")
        threshold: float = Field(default=0.3, ge=0, le=1, description="share of its maximum from which a word acts")
        substruct_threshold: float = Field(default=0.3, ge=0, le=1, description="the same for substruct")
        start_blend: float = Field(
            default=0.2, ge=0, le=1, description="when blending begins", json_schema_extra={"unit": "progress"}
        )
        blend_maps: Literal["edited", "own"] = Field(
            default="edited", description="blend by the new prompt's maps after the edit, or as they were before it"
        )
        blend_cells: int | None = Field(
            default=None,
            ge=1,
            description="grid whose layers blend reads; none: nearest to 16 times fewer cells than the latents, "
            "at least 64",
            json_schema_extra={"unit": "cell"},
        )
        strength: float = Field(
            default=1.0, ge=0, le=1, description="share of the source's attention in place of the picture's own"
        )

    role = "editor"

    def __init__(self, recording: Recording | None = None, **given: Any):
        if recording is not None and given.get("source") is None and len(set(recording.prompts)) == 1:
            given["source"] = recording.prompts[0]
        self.params = self.Params(**given)
        refuse_source(recording, self.params.source)
        self._given = recording
        self.recording = recording
        self.cross, self.own = window_of(self.params.cross_replace), window_of(self.params.self_replace)
        self.factors = factors_of(self.params.reweight)
        self.windows = windows_of(self.params.windows)
        self.mask: Tensor | None = None  # (b h w) where the last blend let the edit through
        self.activity = Coverage()

    @property
    def replaces_words(self) -> bool:
        """Whether attention to words is the source's at any time."""
        return any(start < end for start, end in (self.cross, *self.windows.values()))

    @property
    def strength(self) -> float:
        """0 also where every window is empty and nothing is blended, which is the plain run by agreement."""
        acts = self.replaces_words or self.own[0] < self.own[1] or self.params.blend
        return self.params.strength if acts else 0.0

    # -- what is recorded of the source --------------------------------------------------------------------------------

    def wants(self, sites: Sequence[Site], grid: tuple[int, int]) -> Callable[[Site, float], bool]:
        """What a :class:`Recorder` has to keep of the source for this edit, at latents of ``grid`` (h, w)."""
        edited = self._edited(sites, grid)

        def wanted(site: Site, progress: float) -> bool:
            return self.strength > 0 and (
                (site.path in edited.text and any(inside(progress, w) for w in (self.cross, *self.windows.values())))
                or (site.path in edited.image and inside(progress, self.own))
                or site.path in edited.blend
            )

        return wanted

    def _edited(self, sites: Sequence[Site], grid: tuple[int, int]) -> EditedSites:
        p = self.params
        if p.substruct and not p.blend:
            raise BadInput("substruct takes words out of blend, but blend names none.")
        return edited_sites(
            sites, grid, layers=p.layers, self_cells=p.self_cells, blend=bool(p.blend), blend_cells=p.blend_cells
        )

    # -- what the loop calls -------------------------------------------------------------------------------------------

    def further_prompts(self) -> Sequence[str]:
        return [self.params.source or ""] if self._given is None else self._given.prompts

    def start(self, run: Run) -> None:
        """Aligns the prompts. Raises NoMatch for words, sites and layers that are not there, BadInput for prompts that
        cannot be aligned or a recording of something else."""
        p = self.params
        if sum(isinstance(part, PromptToPrompt) for part in run.parts) > 1:
            raise Conflict("prompt_to_prompt is given twice; put all changes into one edited prompt.")
        self.recording = self._given
        sources = [read_weights(p.source or "").text] * len(run)
        if self.recording is not None:
            sources = prompts_of(self.recording, run)
        self._sites = self._edited(run.sites, run.grid)
        words, length = Words(run.model), run.model.text_length
        readings = [(words.read(a), words.read(b)) for a, b in zip(sources, run.prompts, strict=True)]
        targets = [target for _, target in readings]
        for word in (*self.factors, *self.windows):
            require(word, targets)
        shut = [word for word in self.factors if not any(a < b for a, b in [self.windows.get(word, self.cross)])]
        if shut and p.strength:
            raise BadInput(f"reweight of {shut[0]!r} never acts: cross_replace, or its own window, must be open.")
        for word in (*p.blend, *p.substruct):
            require(word, [reading for both in readings for reading in both])
        self._alignments = [
            align(words, a, b, best_mode(one, other) if p.mode == "auto" else p.mode, length)
            for (one, other), a, b in zip(readings, sources, run.prompts, strict=True)
        ]
        refuse_overlaps("reweight", self.factors, targets)
        refuse_overlaps("windows", self.windows, targets)
        self._factors = torch.stack([equaliser(r, known(self.factors, r), length) for r in targets])
        self._gates = [gate(r, self.cross, known(self.windows, r), length) for r in targets]
        self._now: StepEdit | None = None
        self._blend = LocalBlend(readings, p.blend, p.substruct, self._sites.blend_grid)
        self.mask = None

    def on_noise(self, run: Run, x: Tensor) -> Tensor:
        """Draws the source from the same noise, or checks that the recording began with it."""
        if run.compose:
            raise Conflict("prompt_to_prompt edits one prompt; it cannot serve composed ones as well.")
        if self.strength and run.words.relaid and (self.params.blend or self.replaces_words):
            raise Conflict(
                "prompt_to_prompt follows words by their places in the prompt, but another system (shape_guided) has "
                "laid the text out anew; with cross_replace=0 and no blend it takes over the attention among pixels "
                "alone, or leave one of them out."
            )
        if self.strength == 0:
            return x
        if self.recording is None:
            before = run.cost
            recorder = Recorder(self.wants(run.sites, run.grid))
            self.recording = record_auxiliary(run, x, [self.params.source or ""] * len(run), recorder)
            self.activity.cost += run.cost - before
        else:
            refuse_other_noise(self.recording, x)
        return x

    def taps(self) -> Sequence[Tap]:
        if self.strength == 0:
            return ()
        sites = self._sites
        taps = [Tap(lambda site: site.path in sites.text | sites.image, edit_map=self._edit, name="prompt_to_prompt")]
        if sites.blend:
            own = self.params.blend_maps == "own"
            taps.append(Tap(lambda site: site.path in sites.blend, observe=self._observe, raw=own, name="blend"))
        return taps

    def after_step(self, step: Step) -> None:
        """Local blend: z* <- z + m (z* - z), with m where the words act in either picture."""
        p = self.params
        if not (p.blend and self.strength and step.progress >= p.start_blend):
            return
        assert self.recording is not None
        source = self.recording.at(step.i + 1).to(step.x)
        mask = self._blend.mask(step.run.grid, p.threshold, p.substruct_threshold)
        self.mask = mask[:, 0]
        outside = source if p.strength == 1 else source + (1 - p.strength) * (step.x - source)
        step.x = torch.where(mask, step.x, outside)
        self.mark(step)

    def finish(self, run: Run) -> None:
        del self._now, self._blend

    # -- inside attention ----------------------------------------------------------------------------------------------

    def _edit(self, call: Call) -> MapReplacement | None:
        if "cond" not in call.rows or self.recording is None:
            return None
        i, site = call.step.i, call.site
        if self._now is None or self._now.i != i:
            alpha = torch.stack([g(call.step.progress) for g in self._gates]) * self.params.strength
            share = self.params.strength if inside(call.step.progress, self.own) else 0.0
            self._now = StepEdit.of(i, alpha, self._factors, self._alignments, share, call.v.device)
        edit = self._now
        share = edit.image_share if site.path in self._sites.image else 0.0
        words = edit.words and site.path in self._sites.text
        if not (words or share):
            return None
        self.mark(call.step, sites=[site.path])
        rows = call.rows["cond"]
        source = attention_of(self.recording, i, site, rows.stop - rows.start, call.v)
        refuse_unequal_lengths(source, call)
        if edit.identity and torch.equal(source.q, call.q[rows]) and torch.equal(source.k, call.k[rows]):
            return None  # the source's map is the own map
        mixed = MixedMap(source, edit if words else None, share)
        return MapReplacement(rows, mixed.attend, mixed.probs)

    def _observe(self, call: Call) -> None:
        if "cond" in call.rows and self.recording is not None:
            own = call.branch("cond")
            self._blend.add(attention_of(self.recording, call.step.i, call.site, own.q.shape[0], own.v), own)
