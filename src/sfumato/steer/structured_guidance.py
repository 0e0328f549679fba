"""Structured Diffusion Guidance: every noun phrase brings its own colour, whatever else the prompt says.

A text encoder mixes: by the time "ball" of "a red cube and a blue ball" is encoded, it has seen red. So each noun
phrase is encoded by itself as well, and put back in its place among the embeddings of the whole prompt. Where the
picture looks is still said by the prompt (the keys); what it finds there is the mean of the prompt's and the phrases'
values (Feng et al. 2022, section 3.2).

    >>> generate(model, "a red cube and a blue ball", interventions=StructuredGuidance())

Keys are W_p, values V_i = f_V(W_i) of the sequences W_0 = W_p, W_1 ... W_k, and the output is the mean of the M V_i. As
f_V is linear, that is M f_V(mean of the W_i): one attention call with values of the averaged sequence, at no cost. With
``mode="conjunction"`` there are many keys and one value: the maps of all W_i are averaged, the values are those of one
sequence into which all phrases are put.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sfumato import cards
from sfumato.attention.call import Call
from sfumato.attention.tap import Tap
from sfumato.cards import Card, Field, register
from sfumato.errors import BadInput, Conflict, NoMatch, NotSupported
from sfumato.models import Condition
from sfumato.sampling import Intervention, Run
from sfumato.sampling.intervention import Coverage
from sfumato.text.phrases import nested_phrases
from sfumato.text.weights import encode_weighted
from sfumato.text.words import Reading, Words, WordSpan, find_phrases
from sfumato.windows import Window

__all__ = ["StructuredGuidance"]


@register
class StructuredGuidance(Intervention):
    """Rewrites what cross-attention finds at the prompt's tokens. The unconditional branch is left as it is."""

    CARD = Card(
        key="structured_guidance",
        title="Training-Free Structured Diffusion Guidance for Compositional Text-to-Image Synthesis",
        authors="Feng, He, Fu, Jampani, Akula, Narayana, Basu, Wang, Wang",
        year=2022,
        arxiv="2212.05032",
        verb="steer",
        needs=("text_attention", "linear_text_values"),
        defaults_from="the paper and its code: noun phrases of all depths, values averaged evenly, all steps",
        cost="none per step; one text encoding per noun phrase; conjunction: k + 1 maps per cross-attention",
        not_reproduced="scene-graph parses, user study, GLIP; joint attention and PixArt are refused: there values "
        "are no linear function of the encoder's output, so neither the averaging nor its identity holds",
        summary="lets each noun phrase bring its own values, so that colours land on the right thing",
    )

    class Params(cards.Params):
        phrases: list[str] = Field(
            default=[], description="phrases to encode by themselves; none: the noun phrases of the prompt"
        )
        nesting: Literal["all", "highest", "lowest"] = Field(
            default="all", description="which of the noun phrases found: of all depths, the outermost or the innermost"
        )
        mode: Literal["values", "conjunction"] = Field(
            default="values", description="values: one key, many values; conjunction: many keys, one value"
        )
        strength: float = Field(
            default=1.0,
            ge=0,
            le=1,
            description="share of what is found that comes from the structure",
            json_schema_extra={"unit": "share"},
        )
        full_weight: float = Field(
            default=1.0, ge=0, description="weight of the whole prompt in the mean; each phrase has 1"
        )
        window: Window = Field(
            default=(0.0, 1.0),
            description="share of the denoising in which it acts",
            json_schema_extra={"unit": "progress"},
        )
        reference: bool = Field(
            default=False,
            description="conjunction: let all phrases stand in the first key as well, as the original's code does",
        )

    role = "editor"

    def __init__(self, **given: Any):
        self.params = self.Params(**given)
        self.window = self.params.window
        if self.params.reference and self.params.mode != "conjunction":
            raise BadInput("reference of structured_guidance differs in mode=conjunction only; set that too.")
        self.phrases: list[list[str]] = []
        self.activity = Coverage()

    # -- what the loop calls -------------------------------------------------------------------------------------------

    def start(self, run: Run) -> None:
        """Finds the phrases. Raises NoMatch for prompts without any."""
        if sum(isinstance(part, StructuredGuidance) for part in run.parts) > 1:
            raise Conflict("structured_guidance is given twice; name the phrases of both in one.")
        if run.samples.start == 0:
            self.phrases = []
        self._words = Words(run.model)
        self._readings = [self._words.read(prompt) for prompt in run.prompts]
        self._spans = self._chosen(self._readings)
        self.phrases += [[span.text for span in spans] for spans in self._spans]
        self.activity.tokens.update({span.label: 1 for spans in self._spans for span in spans})

    def on_text(self, run: Run, condition: Condition) -> Condition:
        """Encodes the phrases and makes the sequences that keys and values are taken from; returns ``condition``."""
        if run.compose:
            raise Conflict("structured_guidance and compose both say what the prompt's attention finds; choose one.")
        if run.words.relaid:
            raise Conflict(
                "structured_guidance puts phrases in their places in the prompt, but another system (shape_guided) has "
                "laid the text out anew, each side encoded by itself already; leave one of them out."
            )
        full = condition.cond["embeds"]
        self._refuse_own_projection(run, full.shape[-1])
        phrases_of = [
            [prompt.part(span.text, range(span.start, span.end)) for span in spans]
            for prompt, spans in zip(run.weighted, self._spans, strict=True)
        ]
        texts = sorted({each for one in phrases_of for each in one}, key=lambda each: (each.text, each.weights))
        encoded = encode_weighted(run.model, texts, guidance=False, weighting=run.weighting)
        alone = dict(zip(texts, encoded.cond["embeds"], strict=True))
        k = max(len(spans) for spans in self._spans)
        sequences = full[None].repeat(k + 1, 1, 1, 1)  # (i b t d): W_0 = W_p, then W_p with phrase i in its place
        weights = torch.zeros(k + 1, len(full), 1, 1, device=full.device)
        weights[0] = self.params.full_weight
        together = full.clone()
        for row, (reading, spans) in enumerate(zip(self._readings, self._spans, strict=True)):
            each = list(zip(spans, phrases_of[row], strict=True))
            for i, (span, text) in enumerate(each, 1):
                there, here = self._places(reading, span)
                sequences[i, row, there] = alone[text][here]
                weights[i, row] = 1.0
            for span, text in sorted(each, key=lambda one: one[0].start - one[0].end):  # inner ones over outer ones
                there, here = self._places(reading, span)
                together[row, there] = alone[text][here]
        self._weights = weights / weights.sum(0)
        mean = (self._weights * sequences.float()).sum(0).to(full.dtype)
        values = mean if self.params.mode == "values" else together
        self._values = torch.lerp(full.float(), values.float(), self.params.strength).to(full.dtype)
        if self.params.reference:
            sequences[0] = together
        self._keys = sequences
        return condition

    def taps(self) -> Sequence[Tap]:
        if self.params.strength == 0:
            return []
        many = self._edit_probs if self.params.mode == "conjunction" else None
        return [
            Tap(
                lambda site: site.kind == "cross",
                edit_values=self._edit_values,
                edit_probs=many,
                name="structured_guidance",
            )
        ]

    def finish(self, run: Run) -> None:
        del self._words, self._readings, self._spans, self._weights, self._values, self._keys

    # -- inside attention ----------------------------------------------------------------------------------------------

    def _edit_values(self, call: Call) -> Tensor | None:
        if "cond" not in call.rows:
            return None
        rows, values = call.rows["cond"], call.v.clone()
        values[rows] = _projected(call, "to_v", self._values, values[rows])
        self.mark(call.step, sites=[call.site.path])
        return values

    def _edit_probs(self, call: Call) -> Tensor | None:
        """The mean of the maps that the keys of all sequences give."""
        if "cond" not in call.rows:
            return None
        rows, own = call.rows["cond"], call.probs()
        mean = torch.zeros_like(own[rows])
        mask = call.mask if call.mask is None or call.mask.dim() < 4 or len(call.mask) == 1 else call.mask[rows]
        for keys, weights in zip(self._keys, self._weights, strict=True):
            k = _projected(call, "to_k", keys, call.k[rows])
            probs = Call(
                call.q[rows], k, call.v[rows], mask, scale=call.scale, site=call.site, module=call.module
            ).probs()
            mean = mean + weights.repeat_interleave(len(probs) // len(keys), 0)[..., None] * probs
        probs = own.clone()
        probs[rows] = torch.lerp(own[rows], mean, self.params.strength)
        return probs

    # -- choices -------------------------------------------------------------------------------------------------------

    def _chosen(self, readings: Sequence[Reading]) -> list[list[WordSpan]]:
        found = (
            find_phrases(readings, self.params.phrases) if self.params.phrases else list(map(self._parsed, readings))
        )
        for reading, spans in zip(readings, found, strict=True):
            if any(span.start < 0 for span in spans):
                raise BadInput(f"phrases={self.params.phrases} of structured_guidance: special tokens are no phrases.")
            if not spans:
                lacks = f"none of {self.params.phrases}" if self.params.phrases else "no noun phrase of several words"
                there = ", ".join(span.label for span in reading.all())
                raise NoMatch(
                    f"structured_guidance: the prompt {reading.prompt!r} has {lacks} besides itself; name phrases of "
                    f"it. Its words: {there}."
                )
        return found

    def _parsed(self, reading: Reading) -> list[WordSpan]:
        """Noun phrases of more than one word that an encoder sees, the whole prompt left out: it is W_p already."""
        whole = reading.prompt.strip(" .,;!")
        chosen = [p for p in nested_phrases(reading.prompt) if len(p.text.split()) > 1 and p.text != whole]
        if self.params.nesting == "highest":
            chosen = [p for p in chosen if not any(_inside(p, other) for other in chosen)]
        elif self.params.nesting == "lowest":
            chosen = [p for p in chosen if not any(_inside(other, p) for other in chosen)]
        spans = []
        for phrase in chosen:
            try:
                spans.append(reading.span(phrase.start, phrase.end))
            except NoMatch:  # behind the end of what the encoder reads
                continue
        return spans

    def _places(self, reading: Reading, span: WordSpan) -> tuple[list[int], list[int]]:
        """Positions of a phrase's tokens in the whole prompt, and where they are when it is encoded by itself."""
        alone = self._words.read(span.text).tokens()
        pairs = {(there, alone[name][: len(there)]) for name, there in span.tokens.items()}
        (there, here), *others = pairs
        cut = bool(reading.dropped())  # a phrase at the end may be seen in part
        if others or len(there) != len(here) or (not cut and any(len(there) != len(each) for each in alone.values())):
            raise NotSupported(
                f"structured_guidance: {span.text!r} falls into other tokens by itself than within the prompt; give "
                f"phrases of whole words."
            )
        return list(there), list(here)

    def _refuse_own_projection(self, run: Run, width: int) -> None:
        """Models that send the text through a network of their own first (PixArt) would need its output."""
        for site in run.sites:
            if site.kind == "cross":
                module = run.model.denoiser.get_submodule(site.path)
                if getattr(module.to_v, "in_features", width) != width:
                    raise NotSupported(
                        f"structured_guidance averages embeddings of the text encoder, which {run.model.name} changes "
                        f"by a network of its own before attention sees them. It works on Stable Diffusion and SDXL."
                    )


def _projected(call: Call, name: str, context: Tensor, like: Tensor) -> Tensor:
    """Keys or values (b k t d) that an attention module makes of text (b t d), shaped as ``like``."""
    module = call.module
    if getattr(module, "norm_cross", None) is not None:
        context = module.norm_encoder_hidden_states(context)
    context = context.repeat_interleave(len(like) // len(context), 0)  # frames may be folded into the batch
    return getattr(module, name)(context).unflatten(-1, (like.shape[1], -1)).transpose(1, 2).to(like.dtype)


def _inside(inner: Any, outer: Any) -> bool:
    """Whether one phrase lies within another one."""
    return inner is not outer and outer.start <= inner.start and inner.end <= outer.end
