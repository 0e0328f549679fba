"""Prompt-to-Prompt against the paper's algorithm written naively: source and edit as rows of one batch, attention
explicit, maps overwritten; and what must hold exactly: identity, zero strength, replay, refusals."""

from __future__ import annotations

import functools
import json

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from sfumato import cards
from sfumato.edit.prompt_to_prompt import PromptToPrompt
from sfumato.errors import BadInput, Conflict, NoMatch, SfumatoError
from sfumato.explain.daam import DAAM
from sfumato.models.quiet import quiet
from sfumato.sampling import generate
from sfumato.sampling.recording import Recorder, Recording
from sfumato.text.words import Words
from tests.helpers import fingerprint
from tests.tiny import tiny_model

SOURCE, SWAPPED, LONGER = "a red cube on a dog", "a green ball on a dog", "a small red cube on a big dog"
KINDS = ["sd", "sdxl", "sd3", "flux"]
STEPS, SCALE, SEED = 5, 3.0, 3


def options(model, **more):
    scheduler = "flow_euler" if model.flow else "ddim"
    guided = {} if model.embeds_guidance else {"guidance": SCALE}
    return {"steps": STEPS, "seed": SEED, "decode": False, "scheduler": scheduler, **guided, **more}


# -- the algorithm as the paper has it ---------------------------------------------------------------------------------


class Explicit(TorchFunctionMode):
    """Attention of the conditional rows written out, with ``edit(site, source map, target map)`` (k n t) of the
    target's."""

    def __init__(self, sites, edit, cond):
        super().__init__()
        self.sites, self.edit, self.cond, self.calls = sites, edit, cond, 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, k, v = (args[i] if len(args) > i else kwargs[n] for i, n in enumerate(("query", "key", "value")))
        site = self.sites[self.calls]
        self.calls += 1
        out, rows = func(*args, **kwargs), list(self.cond)
        source, target = (q[rows].double() @ k[rows].double().transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        probs = torch.stack([source, self.edit(site, source.clone(), target.clone())])
        out[rows] = (probs @ v[rows].double()).to(q.dtype)
        return out


def naive(model, source, target, edit, blend=None, size=None):
    """(latents of the source, latents of the edit): both as rows of one batch, step by step."""
    with torch.no_grad(), quiet():
        scheduler = model.make_scheduler("flow_euler" if model.flow else "ddim")
        height, width = size or model.default_size
        timesteps = model.timesteps(scheduler, STEPS, height, width)
        noise = torch.randn(
            (1, *model.latent_shape(height, width)), generator=torch.Generator().manual_seed(SEED)
        ).repeat(2, 1, 1, 1)
        x = model.prepare(noise, scheduler)
        distilled = model.embeds_guidance
        condition = model.encode_text(
            [source, target],
            None,
            guidance=not distilled,
            embedded_guidance=model.defaults["guidance"] if distilled else None,
        )
        sites = model.sites(height, width)
        for i, t in enumerate(timesteps):
            cond = (0, 1) if distilled else (2, 3)  # rows: without text, with text; of each the source, the edit
            at = lambda site, m, own, i=i: edit(i, site, m, own)  # noqa: E731
            with Explicit(sites, at, cond) as mode:
                out = model.predict(x, t, condition, ("cond",) if distilled else ("uncond", "cond"))
            assert mode.calls == len(sites)
            if not distilled:
                uncond, cond_out = out.chunk(2)
                out = uncond + SCALE * (cond_out - uncond)
            x = scheduler.step(out, t, x, return_dict=False)[0]
            if blend is not None:
                x = torch.cat([x[:1], blend(i, x[:1], x[1:])])
    return x[:1], x[1:]


PARTNERS = {  # by hand: for every word of a target the word of SOURCE that it stands for
    SOURCE: (0, 1, 2, 3, 4, 5),
    SWAPPED: (0, 1, 2, 3, 4, 5),
    LONGER: (0, None, 1, 2, 3, 4, None, 5),
}


def laid_out(stream, prompt):
    """Positions on the text axis of each word's tokens, of the end, and of the filling, from the tokenizer itself."""
    count = lambda text: len(stream.tokenizer(text, add_special_tokens=False).input_ids)  # noqa: E731
    place = stream.offset + len(stream.tokenizer("").input_ids) - 1  # behind a start token, where there is one
    words = []
    for word in prompt.split():
        words.append(list(range(place, place + count(word))))
        place += count(word)
    return words, place, list(range(place + 1, stream.offset + stream.length))


def mapper(model, target, mode):
    """R (s t) and which target tokens have a counterpart, from :data:`PARTNERS`."""
    matrix, taken = torch.eye(model.text_length), torch.ones(model.text_length)
    streams = {stream.offset: stream for stream in reversed(Words(model).streams)}  # of two on one axis the first
    for stream in streams.values():
        (ours, end, pads), (theirs, other_end, other_pads) = (laid_out(stream, text) for text in (SOURCE, target))
        whole = slice(min(ours[0][0], theirs[0][0]), stream.offset + stream.length)
        matrix[whole, whole], taken[whole] = 0, 0
        groups = [(ours[i], there) for i, there in zip(PARTNERS[target], theirs, strict=True) if i is not None]
        groups += [([end], [other_end])] + [([i], [j]) for i, j in zip(pads, other_pads, strict=False)]
        if mode == "replace":  # nothing that the source attends to is lost, no token keeps attention of its own
            groups.append((pads[len(other_pads) :], other_pads[-1:]))
            taken[whole] = 1
        for sources, targets in groups:
            one_to_one = len(sources) == len(targets)
            for a, i in enumerate(sources):
                for b, j in enumerate(targets):
                    matrix[i, j] = float(a == b) if one_to_one else 1 / len(targets)
                    taken[j] = 1
    return matrix.double(), taken


def paper(model, target, mode, *, cross=(0, 0.8), own=(0, 0.4), factors=None, words=None, cells=None):
    """The paper's edit of one map, column by column."""
    matrix, taken = mapper(model, target, mode)
    reading = Words(model).read(target)
    h, w = model.latent_shape(*model.default_size)[1:]
    limit = cells or max(64, h * w // 16)
    joint = any(site.kind == "joint" for site in model.sites(*model.default_size))

    t = model.text_length
    factor, start, end = torch.ones(t), torch.full((t,), cross[0]), torch.full((t,), cross[1])
    for j in range(t):
        for word, c in (factors or {}).items():
            factor[j] = c if holds(reading, word, j) else factor[j]
        for word, span in (words or {}).items():
            if holds(reading, word, j):
                start[j], end[j] = span

    def edit(i, site, m, mine):
        out = mine.clone()
        rows = slice(*site.image)
        if site.kind in ("self", "joint") and own[0] <= i / STEPS < own[1]:
            if (joint and cells is None) or site.grid[0] * site.grid[1] <= limit:
                out[:, rows, rows] = m[:, rows, rows]
        if site.text is not None:
            block = (slice(None), rows, slice(*site.text))
            made = torch.einsum("hpw,wn->hpn", m[block], matrix)
            made = factor * torch.where(taken > 0, made, mine[block])
            open_ = (start <= i / STEPS + 1e-6) & (i / STEPS + 1e-6 < end)
            out[block] = torch.where(open_, made, mine[block])
        if site.kind == "joint":
            # signs of the factors do not count in what the row is shared out by
            out[:, rows] = out[:, rows] / out[:, rows].abs().sum(-1, keepdim=True)
        return out

    return edit


def holds(reading, word, position):
    return any(position in span.positions for span in reading.find(word))


CASES = {
    "replace": (SWAPPED, "replace", {}, {}),
    "refine": (LONGER, "refine", {}, {}),
    "reweight after refine": (
        LONGER,
        "refine",
        {"reweight": {"small": -2.0, "cube": 3.0}},
        {"factors": {"small": -2.0, "cube": 3.0}},
    ),
    "reweight alone": (SOURCE, "replace", {"reweight": {"cube": 2.5}}, {"factors": {"cube": 2.5}}),
    "windows": (
        SWAPPED,
        "replace",
        {"cross_replace": [0.0, 0.6], "self_replace": [0.0, 1.0], "windows": {"ball": (0.4, 0.8)}},
        {"cross": (0.0, 0.6), "own": (0.0, 1.0), "words": {"ball": (0.4, 0.8)}},
    ),
    "cross alone": (SWAPPED, "auto", {"self_replace": [0.0]}, {"own": (0, 0)}),
    "self alone": (SWAPPED, "auto", {"cross_replace": [0.0], "self_replace": [1.0]}, {"cross": (0, 0), "own": (0, 1)}),
}


@functools.cache
def plain(kind, prompt):
    model = tiny_model(kind)
    return generate(model, prompt, **options(model)).latents


TWO = ("replace", "reweight after refine")
CHECKED = [(case, "sd") for case in (*TWO, "windows")] + [(case, "sd3") for case in CASES]
CHECKED += [("reweight after refine", "flux"), ("reweight after refine", "sdxl"), ("replace", "sd35")]


@pytest.mark.parametrize(("case", "kind"), CHECKED)
def test_edits_are_those_of_the_paper(kind, case):
    target, mode, given, told = CASES[case]
    model = tiny_model(kind)
    expected_source, expected = naive(
        model, SOURCE, target, paper(model, target, "refine" if mode == "refine" else "replace", **told)
    )
    edit = PromptToPrompt(source=SOURCE, mode=mode, **given)
    edited = generate(model, target, interventions=edit, **options(model)).latents
    source = edit.recording.latents[-1]
    effect = (expected - plain(kind, target)).abs().max()
    assert (source - expected_source).abs().max() < 1e-5 * expected.abs().max()
    assert (edited - expected).abs().max() < 0.02 * effect
    if kind == "sd" and case in TWO:  # other windows would not have passed
        other = PromptToPrompt(source=SOURCE, mode=mode, **{**given, "cross_replace": [0.2], "self_replace": [0.6]})
        assert (generate(model, target, interventions=other, **options(model)).latents - expected).abs().max() > (
            0.05 * effect
        )


@pytest.mark.parametrize("own", [False, True])
def test_local_blend_is_that_of_the_notebooks(own):
    model = tiny_model("sd")
    reader = Words(model)
    steps: dict[str, list] = {"source": [], "own": []}
    edit_map = paper(model, LONGER, "refine")
    sums: dict[tuple, torch.Tensor] = {}
    blended = [site.path for site in model.sites(32, 32) if site.kind == "cross" and site.grid == (8, 8)]
    assert blended

    def edit(i, site, m, mine):
        new = edit_map(i, site, m, mine)
        if site.path in blended:
            for name, maps in (("source", m), ("own", mine if own else new)):
                key = (name, site.path)
                sums[key] = sums.get(key, 0) + maps
        return new

    def mask_of(name, prompt, words, pool, threshold):
        maps = torch.stack([sums[name, path] for path in blended]).flatten(0, 1)  # layers and heads
        columns = [p for w in words for span in reader.read(prompt).find(w) for p in span.positions]
        mean = maps[..., columns].sum(-1).mean(0).view(1, 1, 8, 8)
        if pool:
            mean = F.max_pool2d(mean, (3, 3), (1, 1), padding=(1, 1))
        mean = F.interpolate(mean, size=(16, 16))
        return (mean / mean.max()) > threshold

    def blend(i, z, z_new):
        if i < 2:  # start_blend 0.4 of 5 steps
            return z_new
        mask = mask_of("source", SOURCE, ["cube"], True, 0.9) | mask_of("own", LONGER, ["cube", "small"], True, 0.9)
        cut = mask_of("source", SOURCE, ["dog"], False, 0.98) | mask_of("own", LONGER, ["dog"], False, 0.98)
        mask = mask & ~cut
        steps["own"].append(mask)
        return z + mask * (z_new - z)

    _, expected = naive(model, SOURCE, LONGER, edit, blend)
    system = PromptToPrompt(
        source=SOURCE,
        blend=["cube", "small"],
        substruct="dog",
        threshold=0.9,
        substruct_threshold=0.98,
        start_blend=0.4,
        blend_maps="own" if own else "edited",
    )
    edited = generate(model, LONGER, interventions=system, **options(model)).latents
    assert torch.equal(system.mask, steps["own"][-1][:, 0])
    assert 0.02 < system.mask.float().mean() < 0.98
    torch.testing.assert_close(edited, expected.float(), rtol=1e-4, atol=1e-4)
    kept = ~system.mask[:, None].expand_as(edited)
    assert torch.equal(edited[kept], system.recording.latents[-1][kept])  # outside: the source, bit for bit


# -- what holds exactly ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "pixart"])
def test_an_edit_to_the_same_prompt_is_the_source_bit_for_bit(kind):
    model, turn = tiny_model(kind), (*KINDS, "pixart").index(kind)
    given = options(model, steps=3) if kind != "pixart" else {"steps": 3, "seed": SEED, "decode": False}
    plain = generate(model, SOURCE, **given).latents
    cases = [{}, {"cross_replace": [1.0], "self_replace": [1.0]}, {"cross_replace": [0.4], "blend": ["cube"]}]
    for params in cases if kind in ("sd", "sd3") else cases[turn % 3 :][:1]:
        system = PromptToPrompt(source=SOURCE, **params)
        result = generate(model, SOURCE, interventions=system, **given)
        assert torch.equal(result.latents, plain)
        assert result.coverage["prompt_to_prompt"]["calls"] > 0


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux"])
def test_nothing_taken_over_is_the_plain_run_bit_for_bit(kind):
    model = tiny_model(kind)
    plain = generate(model, SWAPPED, **options(model)).latents
    for params in ({"strength": 0}, {"cross_replace": [0.0], "self_replace": [0.0]}, {"strength": 0, "blend": "dog"}):
        result = generate(model, SWAPPED, interventions=PromptToPrompt(source=SOURCE, **params), **options(model))
        assert torch.equal(result.latents, plain) and result.cost == (STEPS if model.embeds_guidance else 2 * STEPS)


def test_swaps_of_one_token_for_one_keep_every_map():
    """With the identity for a mapper, every kind of source attention is taken over whole: the map of the edit is the
    source's, whatever the words are."""
    model = tiny_model("sd")
    daam, edit = DAAM(words=["dog"], coarsest=100), PromptToPrompt(source=SOURCE, cross_replace=[1.0])
    target = "a blue ball on a dog"
    generate(model, target, interventions=[edit, daam], **options(model))
    source = DAAM(words=["dog"], coarsest=100)
    generate(model, SOURCE, interventions=source, **options(model))
    torch.testing.assert_close(daam.maps[0].map("dog"), source.maps[0].map("dog"), rtol=1e-4, atol=1e-6)
    free = DAAM(words=["dog"], coarsest=100)
    generate(model, target, interventions=free, **options(model))
    assert (free.maps[0].map("dog") - source.maps[0].map("dog")).abs().max() > 1e-5


# -- the recording -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux"])
def test_further_edits_lean_on_the_recording(kind, tmp_path):
    model = tiny_model(kind)
    first, given = PromptToPrompt(source=SOURCE, blend="dog"), options(model, steps=3)
    generate(model, SWAPPED, interventions=first, **given)
    rows = 3 if model.embeds_guidance else 6
    other = "a blue cone on a dog"
    fresh = generate(model, other, interventions=PromptToPrompt(source=SOURCE, blend="dog"), **given)
    assert fresh.cost == 2 * rows
    path = first.recording.save(tmp_path / "source.safetensors")
    for recording in (first.recording, Recording.load(path)):
        again = generate(model, other, interventions=PromptToPrompt(recording, blend="dog"), **given)
        assert torch.equal(again.latents, fresh.latents)
        assert again.cost == rows  # its own rows and nothing else
    assert again.recipe["with"] == fresh.recipe["with"]  # so that `make --like` draws the source and repeats it
    assert first.recording.nbytes < 1.1 * path.stat().st_size < 1.3 * first.recording.nbytes + 20_000
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadInput, match="damaged"):
        Recording.load(path)


def test_a_recording_serves_several_edits_at_once():
    model = tiny_model("sd")
    first = PromptToPrompt(source=SOURCE)
    alone = generate(model, SWAPPED, interventions=first, **options(model)).latents
    targets = [SWAPPED, LONGER]
    both = generate(
        model, targets, interventions=PromptToPrompt(first.recording), **options(model, seed=[SEED, SEED])
    ).latents
    torch.testing.assert_close(both[:1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux"])
def test_recording_changes_nothing_and_repeats_attention(kind):
    model = tiny_model(kind)
    recorder = Recorder(lambda site, progress: site.text is not None and progress < 0.5)
    plain = generate(model, SOURCE, **options(model)).latents
    seen = generate(model, SOURCE, interventions=recorder, **options(model)).latents
    recording = recorder.recording
    assert torch.equal(plain, seen) and torch.equal(recording.at(STEPS), plain) and len(recording.latents) == STEPS + 1
    site = next(site for site in model.sites(*model.default_size) if site.text is not None)
    assert [recording.holds(i, site) for i in range(STEPS)] == [True, True, True, False, False]
    torch.testing.assert_close(
        recording.call(0, site).probs().sum(-1), torch.ones(1, site.heads, recording.call(0, site).q.shape[2])
    )
    if kind == "sd":  # the text's keys do not depend on the step: they are kept once
        assert recording.tensors[f"0|{site.path}|k"] is recording.tensors[f"2|{site.path}|k"]
    with pytest.raises(NoMatch, match="steps 0 to 2"):
        recording.call(4, site)
    with pytest.raises(NoMatch, match="0 to 5"):
        recording.at(6)
    before = fingerprint(model)
    with pytest.raises(BadInput, match="GiB, more than the limit"):
        generate(model, SOURCE, interventions=Recorder(lambda *_: True, limit=1e-6), **options(model))
    assert fingerprint(model) == before


# -- refusals and forms ------------------------------------------------------------------------------------------------


def test_forms_of_parameters():
    system = cards.build(
        "prompt-to-prompt:source=a cube,reweight=[cube=1.5|a=-2],windows=a=0.2-0.6,cross_replace=[0.1|0.9]"
    )
    assert system.factors == {"cube": 1.5, "a": -2.0} and system.windows == {"a": (0.2, 0.6)}
    assert system.cross == (0.1, 0.9) and system.own == (0.0, 0.4)
    same = PromptToPrompt(
        source="a cube", reweight={"cube": 1.5, "a": -2}, windows={"a": (0.2, 0.6)}, cross_replace=[0.1, 0.9]
    )
    assert cards.from_recipe(json.loads(json.dumps(cards.to_recipe(same)))).factors == system.factors


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "needs source"),
        ({"source": "a cube", "reweight": ["cube"]}, "word=factor"),
        ({"source": "a cube", "reweight": ["cube=big"]}, "word=factor"),
        ({"source": "a cube", "windows": ["cube=1"]}, None),
        ({"source": "a cube", "windows": ["cube=0.6-0.2"]}, "word=start-end"),
        ({"source": "a cube", "cross_replace": [0.6, 0.2]}, "fractions of progress"),
        ({"source": "a cube", "cross_replace": [1.2]}, "fractions of progress"),
        ({"source": "a cube", "strength": 2}, "strength"),
    ],
)
def test_bad_parameters(given, says):
    if says is None:
        assert PromptToPrompt(**given).windows == {"cube": (0.0, 1.0)}
        return
    with pytest.raises(BadInput, match=says) as caught:
        PromptToPrompt(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"reweight": {"balls": 2}}, NoMatch, "Did you mean 'ball'"),
        ({"windows": {"cube": (0, 1)}}, NoMatch, "'cube' is not in the prompt"),
        ({"blend": ["dogs"]}, NoMatch, "Did you mean 'dog'"),
        ({"substruct": ["dog"]}, BadInput, "blend names none"),
        ({"reweight": {"ball": 2}, "cross_replace": [0.0]}, BadInput, "reweight of 'ball' never acts"),
        ({"layers": ["nowhere"]}, NoMatch, "match none of: down.0"),
        ({"self_cells": 1}, NoMatch, "below every grid"),
    ],
)
def test_bad_words_and_places(given, error, says):
    model = tiny_model("sd")
    before = fingerprint(model)
    with pytest.raises(error, match=says) as caught:
        generate(model, SWAPPED, interventions=PromptToPrompt(source=SOURCE, **given), **options(model))
    assert "\n" not in str(caught.value) and fingerprint(model) == before


def test_what_does_not_go_together():
    model = tiny_model("sd")
    edit = PromptToPrompt(source=SOURCE)
    generate(model, SWAPPED, interventions=edit, **options(model))
    recording = edit.recording

    def run(system, prompt=SWAPPED, **more):
        return generate(model, prompt, interventions=system, **options(model, **more))

    for broken, says in [
        (lambda: run(PromptToPrompt(recording), seed=4), "begins with the noise"),
        (lambda: run(PromptToPrompt(recording), steps=4), "other steps"),
        (lambda: run(PromptToPrompt(recording), scheduler="euler"), "other steps or another scheduler"),
        (lambda: run(PromptToPrompt(recording), size=(48, 32)), "32x32"),
        (lambda: PromptToPrompt(recording, source="a cat"), "shows 'a red cube on a dog'"),
        (lambda: run(PromptToPrompt(source=SOURCE, mode="replace"), LONGER), "equally many words"),
        (lambda: run(PromptToPrompt(source=SOURCE), compose=[("a cat", 1.0)]), "compose"),
        (lambda: run([PromptToPrompt(source=SOURCE), PromptToPrompt(source=SOURCE)]), "given twice"),
        (lambda: run(PromptToPrompt(recording, cross_replace=[1.0])), "is not recorded; steps 0 to 3"),
    ]:
        with pytest.raises(SfumatoError, match=says) as caught:
            broken()
        assert "\n" not in str(caught.value)
    assert issubclass(Conflict, SfumatoError)
