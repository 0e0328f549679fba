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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import field_validator
from torch import Tensor

from sfumato import cards
from sfumato.attention.call import Call
from sfumato.attention.sites import Site, matches_place
from sfumato.attention.tap import OtherMap, Tap
from sfumato.cards import Card, Field, register
from sfumato.errors import BadInput, Conflict, NoMatch, NotSupported
from sfumato.sampling import Intervention, Run, Step
from sfumato.sampling.intervention import Coverage
from sfumato.sampling.recording import Recorder, Recording, record_beside
from sfumato.text.align import Alignment, align, best_mode, equaliser, gate
from sfumato.text.weights import read_weights
from sfumato.text.words import Reading, Words

__all__ = ["PromptToPrompt"]

Window = tuple[float, float]


def _pairs(given: Any, form: str) -> Any:
    """A mapping of words as the texts ``word=value`` that recipes and the command line hold."""
    if isinstance(given, Mapping):
        return [
            f"{word}={form.format(*value) if isinstance(value, Sequence) else value}" for word, value in given.items()
        ]
    return given


def _window(given: Sequence[float]) -> Window:
    """(start, end) from one number, the end, or from both."""
    start, end = (0.0, given[0]) if len(given) == 1 else tuple(given)
    if not 0 <= start <= end <= 1:
        raise ValueError("a window is its end, or its start and end, as fractions of progress from 0 to 1")
    return start, end


@register
class PromptToPrompt(Intervention):
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
        reweight: list[str] = Field(
            default=[], description="words of the new prompt with a factor for their attention, as word=1.5"
        )
        cross_replace: list[float] = Field(
            default=[0.8],
            min_length=1,
            max_length=2,
            description="share of the denoising whose attention to words is the source's: the end, or start and end",
            json_schema_extra={"unit": "progress"},
        )
        self_replace: list[float] = Field(
            default=[0.4],
            min_length=1,
            max_length=2,
            description="the same for attention among pixels, which carries layout and geometry",
            json_schema_extra={"unit": "progress"},
        )
        windows: list[str] = Field(
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

        @field_validator("reweight", mode="before")
        @classmethod
        def _factors(cls, given: Any) -> Any:
            return _pairs(given, "{}")

        @field_validator("windows", mode="before")
        @classmethod
        def _spans(cls, given: Any) -> Any:
            return _pairs(given, "{}-{}")

        @field_validator("cross_replace", "self_replace")
        @classmethod
        def _ordered(cls, given: list[float]) -> list[float]:
            _window(given)
            return given

        @field_validator("reweight")
        @classmethod
        def _readable(cls, given: list[str]) -> list[str]:
            _factors_of(given)
            return given

        @field_validator("windows")
        @classmethod
        def _readable_windows(cls, given: list[str]) -> list[str]:
            _windows_of(given)
            return given

    role = "editor"

    def __init__(self, recording: Recording | None = None, **given: Any):
        self.params = self.Params(**given)
        if recording is None and self.params.source is None:
            raise BadInput("prompt_to_prompt needs source, the prompt of the picture that is edited, or a recording.")
        if recording is not None:
            if self.params.source is not None and read_weights(self.params.source).text not in recording.prompts:
                raise BadInput(f"source is {self.params.source!r}, but the recording shows {recording.prompts[0]!r}.")
            if self.params.source is None and len(set(recording.prompts)) == 1:
                self.params = self.params.model_copy(update={"source": recording.prompts[0]})
        self._given = recording
        self.recording = recording
        self.cross, self.own = _window(self.params.cross_replace), _window(self.params.self_replace)
        self.factors = _factors_of(self.params.reweight)
        self.windows = _windows_of(self.params.windows)
        self.mask: Tensor | None = None  # (b h w) where the last blend let the edit through
        self.activity = Coverage()

    @property
    def strength(self) -> float:
        """0 also where every window is empty and nothing is blended, which is the plain run by agreement."""
        windows = [self.cross, self.own, *self.windows.values()]
        asked = any(start < end for start, end in windows) or self.params.blend
        return self.params.strength if asked else 0.0

    # -- what is recorded of the source --------------------------------------------------------------------------------

    def wants(self, sites: Sequence[Site], grid: tuple[int, int]) -> Callable[[Site, float], bool]:
        """What a :class:`Recorder` has to keep of the source for this edit, at latents of ``grid`` (h, w)."""
        plan = _Plan.of(self, sites, grid)

        def wanted(site: Site, progress: float) -> bool:
            return self.strength > 0 and (
                (site.path in plan.text and any(_inside(progress, w) for w in (self.cross, *self.windows.values())))
                or (site.path in plan.image and _inside(progress, self.own))
                or site.path in plan.blend
            )

        return wanted

    # -- what the loop calls -------------------------------------------------------------------------------------------

    def start(self, run: Run) -> None:
        """Aligns the prompts. Raises NoMatch for words, sites and layers that are not there, BadInput for prompts that
        cannot be aligned or a recording of something else."""
        if sum(isinstance(part, PromptToPrompt) for part in run.parts) > 1:
            raise Conflict("prompt_to_prompt is given twice; put all changes into one edited prompt.")
        self.recording = self._given
        self._told = [self.params.source or ""] * len(run)  # with its weights
        sources = [read_weights(text).text for text in self._told]
        if self.recording is not None:
            sources = self._rows_of(self.recording, run)
        self._plan = _Plan.of(self, run.sites, run.grid)
        words, length = Words(run.model), run.model.text_length
        self._readings = [(words.read(a), words.read(b)) for a, b in zip(sources, run.prompts, strict=True)]
        targets = [target for _, target in self._readings]
        for word in (*self.factors, *self.windows):
            _require(word, targets)
        shut = [word for word in self.factors if not any(a < b for a, b in [self.windows.get(word, self.cross)])]
        if shut and self.params.strength:
            raise BadInput(f"reweight of {shut[0]!r} never acts: cross_replace, or its own window, must be open.")
        for word in (*self.params.blend, *self.params.substruct):
            _require(word, [reading for both in self._readings for reading in both])
        self._alignments: list[Alignment] = []
        for (one, other), a, b in zip(self._readings, sources, run.prompts, strict=True):
            mode = best_mode(one, other) if self.params.mode == "auto" else self.params.mode
            self._alignments.append(align(words, a, b, mode, length))
        for name, asked in (("reweight", self.factors), ("windows", self.windows)):
            _refuse_overlaps(name, asked, targets)
        self._equalisers = [equaliser(r, _known(self.factors, r), length) for r in targets]
        self._gates = [gate(r, self.cross, _known(self.windows, r), length) for r in targets]
        self._now: _Deal | None = None
        self._sums: dict[str, Tensor] = {}
        self.mask = None
        self._run = run

    def on_noise(self, run: Run, x: Tensor) -> Tensor:
        """Draws the source from the same noise, or checks that the recording began with it."""
        if run.compose:
            raise Conflict("prompt_to_prompt edits one prompt; it cannot serve composed ones as well.")
        windows = [self.cross, *self.windows.values()]
        if self.strength and run.words.relaid and (self.params.blend or any(start < end for start, end in windows)):
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
            self.recording = record_beside(run, x, self._told, recorder)
            self.activity.cost += run.cost - before
        elif not torch.equal(self.recording.latents[0].to(x).expand_as(x), x):
            raise BadInput(
                "an edit begins with the noise of its source; give the seed, or the latents, of the recording."
            )
        return x

    def taps(self) -> Sequence[Tap]:
        if self.strength == 0:
            return ()
        plan = self._plan
        taps = [Tap(lambda site: site.path in plan.text | plan.image, edit_map=self._edit, name="prompt_to_prompt")]
        if plan.blend:
            own = self.params.blend_maps == "own"
            taps.append(Tap(lambda site: site.path in plan.blend, observe=self._sum, raw=own, name="blend"))
        return taps

    def after_step(self, step: Step) -> None:
        """Local blend: z* <- z + m (z* - z), with m where the words act in either picture."""
        p = self.params
        if not (p.blend and self.strength and step.progress >= p.start_blend):
            return
        assert self.recording is not None
        kept = self.recording.at(step.i + 1).to(step.x)
        mask = self._where("blend", p.threshold, pooled=True)
        if p.substruct:
            mask &= ~self._where("substruct", p.substruct_threshold, pooled=False)
        self.mask = mask[:, 0]
        outside = kept if p.strength == 1 else kept + (1 - p.strength) * (step.x - kept)
        step.x = torch.where(mask, step.x, outside)
        self.mark(step)

    def finish(self, run: Run) -> None:
        del self._run, self._now, self._sums

    # -- inside attention ----------------------------------------------------------------------------------------------

    def _edit(self, call: Call) -> OtherMap | None:
        if "cond" not in call.rows:
            return None
        assert self.recording is not None
        i, site = call.step.i, call.site
        if self._now is None or self._now.i != i:
            self._now = self._deal_at(i, call.step.progress, call.v)
        deal = self._now
        share = deal.share if site.path in self._plan.image else 0.0
        words = deal.words and site.path in self._plan.text
        if not (words or share):
            return None
        self.mark(call.step, sites=[site.path])
        rows = call.rows["cond"]
        source = self._source(i, site, rows.stop - rows.start, call.v)
        if deal.identity and torch.equal(source.q, call.q[rows]) and torch.equal(source.k, call.k[rows]):
            return None  # the source's map is the own map
        mix = _Mix(source, deal if words else None, share)
        return OtherMap(rows, mix.attend, mix.probs)

    def _source(self, i: int, site: Site, rows: int, like: Tensor) -> Call:
        """The source's attention, one row for each edited one."""
        assert self.recording is not None
        call = self.recording.call(i, site, like[:1])
        if call.q.shape[0] != rows:
            call.q, call.k = (tensor.expand(rows, -1, -1, -1) for tensor in (call.q, call.k))
        return call

    def _deal_at(self, i: int, progress: float, like: Tensor) -> _Deal:
        """A and b of M A + M* diag(b) for this step.

        With c the equaliser, R the alignment and r its taken columns, the edit of column j is
        c_j (r_j (M R)_j + (1 - r_j) M*_j), and alpha_j of it is taken beside (1 - alpha_j) M*_j.
        """
        alpha = torch.stack([g(progress) for g in self._gates]) * self.params.strength
        factor, taken = torch.stack(self._equalisers), torch.stack([a.taken for a in self._alignments])
        matrix = torch.stack([a.matrix for a in self._alignments])
        deal = matrix * (alpha * factor * taken)[:, None]
        keep = alpha * factor * (1 - taken) + (1 - alpha)
        diagonal = torch.diag_embed(torch.diagonal(deal, dim1=1, dim2=2))
        one = torch.ones_like(keep)
        return _Deal(
            i,
            deal.to(like.device),
            keep.to(like.device),
            share=self.params.strength if _inside(progress, self.own) else 0.0,
            words=bool((alpha > 0).any()),
            keeps=bool(keep.any()),
            sums_to_one=torch.equal(deal.abs().sum(2), one),
            identity=torch.equal(deal, diagonal) and torch.equal(deal.sum(1) + keep, one),
        )

    # -- local blend ---------------------------------------------------------------------------------------------------

    def _sum(self, call: Call) -> None:
        """Add this call's maps of the blend words, summed over words and heads, to those of the steps before."""
        if "cond" not in call.rows:
            return
        own = call.branch("cond")
        source = self._source(call.step.i, call.site, own.q.shape[0], own.v)
        for which in ("blend", "substruct"):
            for k, (name, part) in enumerate((("source", source), ("own", own))):
                columns = self._columns(getattr(self.params, which), k)
                if columns is None:
                    continue
                positions, weights = columns
                assert call.site.text is not None
                maps = part.word_probs([call.site.text[0] + p for p in positions]).mean(1)  # over heads
                summed = torch.einsum("bnc,bc->bn", maps, weights.to(maps))
                key = f"{which} {name}"
                self._sums[key] = self._sums.get(key, 0.0) + summed

    def _columns(self, words: Sequence[str], which: int) -> tuple[list[int], Tensor] | None:
        """Positions of some words in the source (0) or the edited (1) prompts, and which samples (b c) have them."""
        found = [
            {p for word in words if _has(both[which], word) for span in both[which].find(word) for p in span.positions}
            for both in self._readings
        ]
        positions = sorted(set().union(*found))
        if not positions:
            return None
        return positions, torch.tensor([[float(p in own) for p in positions] for own in found])

    def _where(self, which: str, threshold: float, pooled: bool) -> Tensor:
        """Where some words act in either picture, bool (b 1 h w) on the latents' grid."""
        run, mask = self._run, None
        for name in ("source", "own"):
            summed = self._sums.get(f"{which} {name}")
            if summed is None:
                continue
            maps = summed.float().view(len(run), 1, *self._plan.blend_grid)
            if pooled:
                maps = F.max_pool2d(maps, 3, 1, 1)
            maps = F.interpolate(maps, size=run.grid)
            here = maps / maps.amax((-2, -1), keepdim=True).clamp_min(1e-12) > threshold
            mask = here if mask is None else mask | here
        assert mask is not None
        return mask

    # -- checks --------------------------------------------------------------------------------------------------------

    def _rows_of(self, recording: Recording, run: Run) -> list[str]:
        """The source prompt of every sample. Raises BadInput where the recording is of another kind of run."""
        if recording.model != run.model.name or recording.size != run.size:
            made = f"{recording.size[0]}x{recording.size[1]} with {recording.model}"
            raise BadInput(
                f"the recording is of {made}, this run is {run.size[0]}x{run.size[1]} with {run.model.name}."
            )
        if recording.begin != run.begin or not torch.equal(recording.timesteps.cpu(), run.timesteps.cpu()):
            raise BadInput("the recording was made with other steps or another scheduler than this run.")
        if len(recording) not in (1, len(run)):
            raise BadInput(f"the recording has {len(recording)} samples for {len(run)}; one for all, or one each.")
        return recording.prompts * (len(run) if len(recording) == 1 else 1)


@dataclass(frozen=True)
class _Plan:
    """Paths of the sites whose attention to words and among pixels is edited, and of those that blend reads."""

    text: frozenset[str]
    image: frozenset[str]
    blend: frozenset[str]
    blend_grid: tuple[int, int]

    @classmethod
    def of(cls, edit: PromptToPrompt, sites: Sequence[Site], grid: tuple[int, int]) -> _Plan:
        p = edit.params
        quarter = max(64, grid[0] * grid[1] // 16)  # the 16x16 of Stable Diffusion's 64x64 latents
        reading = [site for site in sites if site.kind in ("cross", "joint") and site.text and site.grid]
        chosen = [site for site in sites if not p.layers or matches_place(site, p.layers)]
        if not chosen:
            places = ", ".join(dict.fromkeys(site.block for site in sites))
            raise NoMatch(f"layers={p.layers} of prompt_to_prompt match none of: {places}.")
        limit = p.self_cells or (None if any(site.kind == "joint" for site in sites) else quarter)
        image = [site for site in chosen if site.kind in ("self", "joint") and (limit is None or _cells(site) <= limit)]
        if not image and p.self_cells:
            grids = ", ".join(str(_cells(site)) for site in sites if site.kind in ("self", "joint"))
            raise NoMatch(f"self_cells={limit} of prompt_to_prompt is below every grid here: {grids or 'none'} cells.")
        blend: list[Site] = []
        if p.blend:
            if not reading:
                raise NotSupported("blend of prompt_to_prompt reads attention from picture to text; there is none.")
            wanted = p.blend_cells or quarter
            best = min(reading, key=lambda site: (abs(_cells(site) - wanted), -_cells(site)))
            blend = [site for site in reading if site.grid == best.grid]
        elif p.substruct:
            raise BadInput("substruct takes words out of blend, but blend names none.")
        return cls(
            text=frozenset(site.path for site in chosen if site in reading),
            image=frozenset(site.path for site in image),
            blend=frozenset(site.path for site in blend),
            blend_grid=blend[0].grid or grid if blend else grid,
        )


@dataclass(frozen=True, eq=False)
class _Deal:
    """One step's edit: ``matrix`` (b s t) and ``keep`` (b t) of M A + M* diag(b), and the ``share`` of attention among
    pixels that is the source's. ``words``: whether any word's gate is open; ``keeps``: whether b is not all zero;
    ``sums_to_one``: whether rows of A do; ``identity``: whether M A + M diag(b) is M."""

    i: int
    matrix: Tensor
    keep: Tensor
    share: float
    words: bool
    keeps: bool
    sums_to_one: bool
    identity: bool


class _Mix:
    """The edited map of one call: columns dealt from the source's map beside columns of its own.

    Where image and text share one softmax the edited rows are shared out anew (over the sums of the absolute weights,
    so that factors below zero stay harmless); where the text has its own softmax they are left as they are, as in the
    paper. Text queries of a joint attention keep their own rows.
    """

    def __init__(self, source: Call, deal: _Deal | None, share: float):
        self.source, self.deal, self.share = source, deal, share
        site = source.site
        self.image = slice(*site.image) if site.kind != "cross" else None
        self.text = slice(*site.text) if site.text is not None else None
        whole = share == 1 or self.image is None
        self.keeps = not whole or (self.text is not None and (deal is None or deal.keeps))
        # every key's attention goes where it went in the source
        self.as_it_is = not self.keeps and (deal is None or deal.identity)
        self.shares_out = site.kind == "joint" and (self.keeps or (deal is not None and not deal.sums_to_one))

    def attend(self, own: Call) -> Tensor:
        """The output (b k n d)."""
        image = own.image

        def edited(rows: slice) -> Tensor:
            ours, theirs = own.of_queries(rows), self.source.of_queries(rows)
            out = theirs.with_values(self._dealt(own.v)).attend()
            if self.keeps:
                out = out + ours.with_values(self._kept(own.v)).attend()
            if self.shares_out:
                ones = torch.ones_like(own.v)
                total = theirs.with_values(self._dealt(ones, absolute=True)).attend()
                total = total + ours.with_values(self._kept(ones, absolute=True)).attend()
                out = out / total.clamp_min(torch.finfo(out.dtype).tiny)
            return out

        n = own.q.shape[2]
        parts = [
            edited(rows) if inside else own.of_queries(rows).attend() for rows, inside in _split(slice(0, n), image)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def probs(self, own: Call, queries: slice) -> Tensor:
        """The map (b k n t) of some queries, materialised for those who look."""
        start, stop, _ = queries.indices(own.q.shape[2])
        parts = []
        for rows, inside in _split(slice(start, stop), own.image):
            probs = own.probs(rows)
            if inside:
                eye = torch.eye(probs.shape[-1], device=probs.device).expand(probs.shape[0], 1, -1, -1)
                source = self.source.probs(rows)
                theirs, ours = self._dealt(eye), self._kept(eye)
                edited = source @ theirs + (probs @ ours if self.keeps else 0.0)
                if self.shares_out:
                    ones = eye.new_ones(probs.shape[0], 1, probs.shape[-1], 1)
                    total = source @ self._dealt(ones, True) + probs @ self._kept(ones, True)
                    edited = edited / total.clamp_min(torch.finfo(edited.dtype).tiny)
                probs = edited
            parts.append(probs)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _dealt(self, values: Tensor, absolute: bool = False) -> Tensor:
        """A V: the values (b k t d) as the source's keys find them."""
        if self.as_it_is:
            return values
        out = torch.zeros_like(values)
        if self.image is not None:
            out[:, :, self.image] = self.share * values[:, :, self.image]
        if self.text is not None and self.deal is not None:
            matrix = self.deal.matrix.abs() if absolute else self.deal.matrix
            out[:, :, self.text] = (matrix[:, None] @ values[:, :, self.text].float()).to(values.dtype)
        return out

    def _kept(self, values: Tensor, absolute: bool = False) -> Tensor:
        """diag(b) V: the values (b k t d) as the own keys find them."""
        out = values.clone()
        if self.image is not None:
            out[:, :, self.image] *= 1 - self.share
        if self.text is not None and self.deal is not None:
            keep = self.deal.keep.abs() if absolute else self.deal.keep
            out[:, :, self.text] *= keep[:, None, :, None].to(values.dtype)
        return out


def _split(queries: slice, image: slice) -> list[tuple[slice, bool]]:
    """Queries before, in and behind the image, in order, and whether they are of the image."""
    cuts = [(queries.start, image.start, False), (image.start, image.stop, True), (image.stop, queries.stop, False)]
    clipped = [(max(a, queries.start), min(b, queries.stop), inside) for a, b, inside in cuts]
    return [(slice(a, b), inside) for a, b, inside in clipped if a < b]


def _cells(site: Site) -> int:
    return site.grid[0] * site.grid[1] if site.grid is not None else 0


def _inside(progress: float, window: Window) -> bool:
    return window[0] <= progress < window[1]


def _has(reading: Reading, word: str) -> bool:
    try:
        return bool(reading.find(word))
    except NoMatch:
        return False


def _known(given: Mapping[str, Any], reading: Reading) -> dict[str, Any]:
    """Those words that a prompt has."""
    return {word: value for word, value in given.items() if _has(reading, word)}


def _require(word: str, readings: Sequence[Reading]) -> None:
    """Raise NoMatch, as told by the last prompt, if no prompt has this word."""
    if not any(_has(reading, word) for reading in readings):
        readings[-1].find(word)


def _refuse_overlaps(name: str, asked: Mapping[str, Any], readings: Sequence[Reading]) -> None:
    """Raise BadInput where two phrases share a word of a prompt and ask for different things."""
    for reading in readings:
        known = [(word, span) for word in _known(asked, reading) for span in reading.find(word)]
        for i, (one, first) in enumerate(known):
            for other, second in known[i + 1 :]:
                if asked[one] != asked[other] and first.start < second.end and second.start < first.end:
                    raise BadInput(
                        f"{name} of prompt_to_prompt asks for two things at once: {one!r} and {other!r} overlap in "
                        f"{reading.prompt!r}."
                    )


def _factors_of(given: Sequence[str]) -> dict[str, float]:
    found = {}
    for text in given:
        word, equals, number = text.rpartition("=")
        try:
            found[word.strip()] = float(number)
        except ValueError:
            equals = ""
        if not equals or not word.strip() or not abs(found[word.strip()]) <= 1e4:
            raise ValueError(f"{text!r} is not word=factor, such as ball=1.5")
    return found


def _windows_of(given: Sequence[str]) -> dict[str, Window]:
    found = {}
    for text in given:
        word, equals, span = text.rpartition("=")
        try:
            found[word.strip()] = _window([float(edge) for edge in span.split("-", 1)])
        except ValueError:
            equals = ""
        if not equals or not word.strip():
            raise ValueError(f"{text!r} is not word=start-end, such as ball=0.2-0.6")
    return found
