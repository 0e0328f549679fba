"""Inside-outside attention against loops by hand, the composite text, pictures, limits, refusals."""

from __future__ import annotations

import pytest
import torch

from sfumato.attention.tap import Tap
from sfumato.errors import BadInput, NoMatch
from sfumato.sampling import Intervention, generate
from sfumato.steer.shape_guided import DECAYS, InsideOutside, ShapeGuided, Sides, infer_region
from sfumato.steer.shape_guided.pieces import split
from sfumato.text.words import Words
from tests.tiny import tiny_model

PROMPT = "a red cube and a blue ball"
HALF = torch.zeros(32, 32)
HALF[:, :16] = 1


class Both(Intervention):
    """Every map before and after the edits of others."""

    def __init__(self):
        self.before, self.after = {}, {}

    def taps(self):
        def see(kept):
            def look(call):
                kept.setdefault((call.step.i, call.site.path), (call.site, call.probs().detach().double()))
                self.mark(call.step)

            return look

        chosen = {"where": lambda site: site.grid is not None}
        return [Tap(observe=see(self.before), raw=True, **chosen), Tap(observe=see(self.after), **chosen)]


def options(**more):
    return {"steps": 2, "seed": 2, "guidance": 3.0, "decode": False, **more}


def watched(model, guided, **more):
    both = Both()
    given = options(**more)
    if model.embeds_guidance:
        del given["guidance"]
    result = generate(model, given.pop("prompt", PROMPT), interventions=[guided, both], **given)
    return result, both


def sides_of(site):
    """Which pixels of a grid are inside the left half, row by row."""
    h, w = site.grid
    return [x < w // 2 for _ in range(h) for x in range(w)]


def groups_of(model, length):
    """By hand: the side of each text position: 0 inside, 1 outside, None neither."""
    side = [None] * length
    for offset, first, part in {"sd": [(0, 1, 38)], "sd3": [(0, 1, 38), (77, 0, 32)], "pixart": [(0, 0, 32)]}.get(
        model.family.name, [(0, 0, 32)]
    ):
        for i in range(part):
            side[offset + first + i] = 0
            side[offset + first + part + i] = 1
    return side


@pytest.mark.parametrize("kind", ["sd", "pixart"])
def test_cross_and_self_attention_by_hand(kind):
    model = tiny_model(kind)
    _, both = watched(model, ShapeGuided(words=["cube"], mask=HALF, boost=2.0))
    expected = {}
    for key, (site, before) in both.before.items():
        if site not in expected:
            inside, columns = sides_of(site), before.shape[-1]
            if site.kind == "self":
                rows = [[float(q == k) for k in inside] for q in inside]
            else:
                sides = groups_of(model, columns)
                rows = [[2.0 * (side is not None and q == (side == 0)) for side in sides] for q in inside]
            expected[site] = torch.tensor(rows, dtype=torch.float64)
        torch.testing.assert_close(both.after[key][1], before * expected[site], rtol=1e-5, atol=1e-7)
    assert {site.kind for site in expected} == {"cross", "self"}


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_joint_attention_is_conditioned_on_ones_own_side(kind):
    model = tiny_model(kind)
    _, both = watched(model, ShapeGuided(words=["cube"], mask=HALF, boost=2.0))
    steps = max(i for i, _ in both.before) + 1
    expected = {}
    for key, (site, before) in both.before.items():
        fades = key[0] / steps  # the mask among pixels does, linearly
        if (site, fades) not in expected:
            inside, (first, _), (text, stop) = sides_of(site), site.image, site.text
            side = [None] * before.shape[-1]
            side[first : first + len(inside)] = [0 if here else 1 for here in inside]
            side[text:stop] = groups_of(model, stop - text)
            place = [(each, text <= i < stop) for i, each in enumerate(side)]

            def weight(q, k, fades=fades):
                (own, from_text), (other, to_text) = q, k
                if from_text and own is None:
                    return 1.0
                if own != other and not from_text and not to_text:
                    return fades
                return 0.0 if own != other else (2.0 if to_text and not from_text else 1.0)

            rows = [[weight(q, k) for k in place] for q in place]
            expected[site, fades] = torch.tensor(rows, dtype=torch.float64)
        conditioned = before * expected[site, fades]
        conditioned = conditioned / conditioned.sum(-1, keepdim=True)
        torch.testing.assert_close(both.after[key][1], conditioned, rtol=1e-4, atol=1e-7)
    assert steps > 1


def test_cells_are_shared_in_joint_attention():
    """Where the silhouette cuts through a cell, it counts by its share, unless it is told otherwise."""
    model = tiny_model("sd3")
    ramp = torch.linspace(0, 1, 16).expand(16, 16)
    seen = {soft: watched(model, ShapeGuided(words=["cube"], mask=ramp, soft=soft))[1] for soft in (None, True, False)}
    for key, (_, after) in seen[None].after.items():
        assert torch.equal(after, seen[True].after[key][1]) and not torch.equal(after, seen[False].after[key][1])
    _, unet = watched(tiny_model("sd"), ShapeGuided(words=["cube"], mask=ramp))
    assert {float(x) for x in (unet.after[0, next(p for i, p in unet.after)][1] == 0).unique()} == {0.0, 1.0}


def test_nothing_leaks_through_attention():
    """The derivative of what an outside pixel receives with respect to inside values is exactly zero."""
    model = tiny_model("sd")
    _, both = watched(model, ShapeGuided(words=["cube"], mask=HALF))
    site, after = next(each for each in both.after.values() if each[0].kind == "self")
    values = torch.randn(*after.shape[:2], after.shape[-1], 3, dtype=torch.float64, requires_grad=True)
    inside = torch.tensor(sides_of(site))
    (gradient,) = torch.autograd.grad((after @ values)[:, :, ~inside].sum(), values)
    assert gradient[:, :, inside].abs().max() == 0 and gradient[:, :, ~inside].abs().max() > 0


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "pixart"])
def test_composite_text(kind):
    model = tiny_model(kind)
    seen = {}

    class Look(Intervention):
        def before_predict(self, step):
            seen.update(step.condition.cond, uncond=step.condition.uncond["embeds"])
            self.mark(step)

    off = ShapeGuided(words=["cube"], mask=HALF, cross=False, self_attention=0)
    plain_condition = model.encode_text(PROMPT)
    generate(model, PROMPT, interventions=[off, Look()], **options())
    whole, inside, outside = (
        model.encode_text(text, None, guidance=False).cond for text in (PROMPT, "a red cube", "a blue ball")
    )
    for name in ("embeds", "mask"):
        if name not in seen:
            continue
        expected = whole[name].clone()
        for offset, first, part in {"sd3": [(0, 1, 38), (77, 0, 32)], "pixart": [(0, 0, 32)]}.get(kind, [(0, 1, 38)]):
            start = offset + first
            expected[:, start : start + part] = inside[name][:, start : start + part]
            expected[:, start + part : start + 2 * part] = outside[name][:, start : start + part]
        assert torch.equal(seen[name], expected)
    uncond = plain_condition.uncond["embeds"]
    if kind == "pixart":  # its mask leaves nothing behind the first token, which each side must have
        uncond = torch.cat([uncond[:, :32], uncond[:, :32]], 1)
    assert torch.equal(seen["uncond"], uncond)


def test_each_side_has_the_negative_prompt():
    model = tiny_model("sd")
    seen = []

    class Look(Intervention):
        def before_predict(self, step):
            seen.append(step.condition.uncond["embeds"])
            self.mark(step)

    guided = ShapeGuided(words=["cube"], mask=HALF)
    generate(model, PROMPT, negative="a big dog", interventions=[guided, Look()], **options(steps=1))
    negative = model.encode_text("a big dog", None, guidance=False).cond["embeds"]
    assert torch.equal(seen[0][:, :39], negative[:, :39]) and torch.equal(seen[0][:, 39:], negative[:, 1:39])


def test_without_constraints_it_is_the_plain_run_on_the_composite_text():
    model = tiny_model("sd")

    class Composite(Intervention):
        role = "conditioner"

        def on_text(self, run, condition):
            self.mark()
            a, b = (model.encode_text(text, None, guidance=False).cond["embeds"] for text in ("a red cube", "a wall"))
            embeds = condition.cond["embeds"].clone()
            embeds[:, 1:39], embeds[:, 39:77] = a[:, 1:39], b[:, 1:39]
            condition.cond["embeds"] = embeds
            return condition

    off = ShapeGuided(words=["cube"], outside="a wall", mask=HALF, cross=False, self_attention=0)
    one = generate(model, PROMPT, interventions=off, **options()).latents
    two = generate(model, PROMPT, interventions=Composite(), **options()).latents
    assert torch.equal(one, two)


def test_parts_of_the_constraint_can_be_left_out():
    model = tiny_model("sd")
    for left_out, kept in (("self", "cross"), ("cross", "self")):
        off = {"self_attention": 0.0} if left_out == "self" else {"cross": False}
        _, both = watched(model, ShapeGuided(words=["cube"], mask=HALF, **off))
        for key, (site, before) in both.before.items():
            same = torch.equal(before, both.after[key][1])
            assert same == (site.kind == left_out), (site.kind, kept)


def test_the_mask_among_pixels_decays():
    model = tiny_model("sd")
    for name, at in (("constant", 1.0), ("linear", 0.5), ("cosine", 0.5), ("exponential", 0.95**25)):
        assert DECAYS[name](0.5) == pytest.approx(at) and DECAYS[name](0.0) == 1
        guided = ShapeGuided(words=["cube"], mask=HALF, decay=name, self_attention=0.8, cross=False)
        _, both = watched(model, guided, scheduler="ddim")
        site, before = next(v for k, v in both.before.items() if k[0] == 1 and v[0].kind == "self")
        after = both.after[1, site.path][1]
        inside = torch.tensor(sides_of(site))
        leak = (after[..., inside, :][..., ~inside] / before[..., inside, :][..., ~inside]).flatten()
        torch.testing.assert_close(leak, torch.full_like(leak, 1 - 0.8 * at), rtol=1e-5, atol=1e-6)


def test_the_way_back_fades_only_where_fading_is_the_rule():
    sides = torch.eye(2)
    for decay, rule, leaks in (
        (None, "linear", (0.5, 0.5)),
        (None, "constant", (0, 0)),
        ("linear", "constant", (0.5, 0)),
        ("linear", "linear", (0.5, 0)),
    ):
        params = ShapeGuided.Params(decay=decay)
        for hard, leak in zip((False, True), leaks, strict=True):
            weights = InsideOutside(params, HALF, [], hard=hard)._among_pixels(sides, 0.5, rule)
            assert torch.equal(weights, torch.tensor([[1, leak], [leak, 1]]))


def test_renormalised_everywhere_on_request():
    _, both = watched(tiny_model("sd"), ShapeGuided(words=["cube"], mask=HALF, renormalise="all"))
    for _, after in both.after.values():
        torch.testing.assert_close(after.sum(-1), torch.ones_like(after.sum(-1)))


def test_soft_masks_and_several_regions():
    model = tiny_model("sd")
    ramp = torch.linspace(0, 1, 16).expand(16, 16)
    _, both = watched(model, ShapeGuided(words=["cube"], mask=ramp, soft=True))
    site, before = next(each for each in both.before.values() if each[0].kind == "self" and each[0].grid == (16, 16))
    m = ramp.flatten().double()
    same = m[:, None] * m + (1 - m[:, None]) * (1 - m)
    torch.testing.assert_close(both.after[0, site.path][1], before * same, rtol=1e-4, atol=1e-6)

    boxes = [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]
    guided = ShapeGuided(words=["cube", "blue ball"], box=boxes, outside="a wall", boost=1.0)
    _, both = watched(model, guided)
    assert guided.texts == [["a red cube", "a blue ball", "a wall"]]
    site, before = next(each for each in both.before.values() if each[0].kind == "cross" and each[0].grid == (16, 16))
    after = both.after[0, site.path][1].unflatten(2, (16, 16))
    before = before.unflatten(2, (16, 16))
    parts = [slice(1, 26), slice(26, 51), slice(51, 76)]  # 76 positions in three parts, one left over
    for place, own in (
        ((slice(0, 8), slice(0, 8)), 0),
        ((slice(8, 16), slice(8, 16)), 1),
        ((slice(0, 8), slice(8, 16)), 2),
    ):
        here, raw = after[(..., *place, slice(None))], before[(..., *place, slice(None))]
        torch.testing.assert_close(here[..., parts[own]], raw[..., parts[own]])
        assert here.sum() == pytest.approx(here[..., parts[own]].sum().item())


# --- pictures --------------------------------------------------------------------------------------------------------


def picture(n=1):
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(4)) * 2 - 1


@pytest.mark.parametrize(("kind", "scheduler"), [("sd", "ddim"), ("sd3", None)])
def test_on_a_picture_the_outside_is_kept(kind, scheduler):
    model = tiny_model(kind)
    clean = model.encode_image(picture())
    given = options(image=picture(), strength=1.0, scheduler=scheduler, steps=3)
    way = {}
    for reference in (False, True):
        guided = ShapeGuided(words=["cube"], source=["a big ball"], mask=HALF, reference=reference)
        seen = []
        result = generate(model, PROMPT, interventions=guided, on_step=lambda s, seen=seen: seen.append(s.x), **given)
        assert torch.equal(result.latents[..., 8:], clean[..., 8:])
        assert (result.latents[..., :8] - clean[..., :8]).abs().max() > 1e-2
        late = 0 if reference else 1
        for i in (0, 1):
            assert torch.equal(seen[i][..., 8:], guided._trajectory[i + late][..., 8:])
        way[reference] = guided._trajectory
        assert result.cost == pytest.approx(3 + 6)  # the way back costs one forward per step, the way forth two
    assert torch.equal(way[False], way[True]) and torch.equal(way[False][-1], clean)
    outside = ShapeGuided(words=["cube"], source=["a big ball"], mask=HALF, invert=True)
    kept = generate(model, PROMPT, interventions=outside, **given).latents
    assert torch.equal(kept[..., :8], clean[..., :8]) and not torch.equal(kept[..., 8:], clean[..., 8:])
    free = ShapeGuided(words=["cube"], source=["a big ball"], mask=HALF, copy_outside=False)
    assert not torch.equal(generate(model, PROMPT, interventions=free, **given).latents[..., 8:], clean[..., 8:])


def test_fresh_noise_enters_the_region_only():
    model = tiny_model("sd")
    given = options(image=picture(), strength=1.0, scheduler="ddim")
    starts = {}
    for fresh in (0.0, 0.5, 1.0):
        guided = ShapeGuided(words=["cube"], source=["a big ball"], mask=HALF, fresh=fresh)
        first = []

        class Start(Intervention):
            def before_predict(self, step, first=first):
                self.mark(step)
                first.append(step.x)

        generate(model, PROMPT, interventions=[guided, Start()], **given)
        starts[fresh] = first[0]
    assert torch.equal(starts[1.0][..., 8:], starts[0.0][..., 8:])
    assert abs(starts[1.0][..., :8].std() - 1) < 0.15


def test_only_new_words_are_boosted():
    model = tiny_model("sd")
    guided = ShapeGuided(words=["cube"], source=["a big cube"], mask=HALF, outside="a wall", boost=3.0)
    generate(model, PROMPT, image=picture(), strength=1.0, interventions=guided, **options(scheduler="ddim"))
    reading = Words(model).read("a red cube")
    weights = {span.text: {guided.columns[0, p].item() for p in span.positions} for span in reading.all()}
    assert weights == {"a": {1.0}, "red": {3.0}, "cube": {1.0}}
    assert guided.columns[0, 0] == 0  # the start token is on no side
    end = reading.special()["<end>"].positions[0]
    assert guided.columns[0, end] == 3.0
    fresh = ShapeGuided(words=["cube"], mask=HALF, boost=3.0)
    generate(model, PROMPT, interventions=fresh, **options())
    assert set(fresh.columns[0, 1:].tolist()) == {3.0}


def test_the_region_may_be_inferred(monkeypatch):
    model = tiny_model("sd")
    region, cost = infer_region(model, picture(), "a big ball", steps=2)
    assert region.shape == (16, 16) and 0 < region.sum() < region.numel() and cost == 2
    guided = ShapeGuided(words=["cube"], source=["a big ball"])
    result = generate(model, PROMPT, image=picture(), strength=1.0, interventions=guided, **options(scheduler="ddim"))
    assert 0 < guided.regions.mean() < 1 and result.cost == pytest.approx(10 + 2 + 4)


# --- words and refusals ----------------------------------------------------------------------------------------------


def test_prompts_are_split_by_their_phrases():
    words = Words(tiny_model("sd"))
    for prompt, asked, expected in (
        ("a red cube and a blue ball on the grass", ["cube"], (["a red cube"], "a blue ball on the grass")),
        ("a red cube and a blue ball on the grass", ["ball"], (["a blue ball"], "a red cube and on the grass")),
        ("a dog, a cat and a big cone", ["cat"], (["a cat"], "a dog and a big cone")),
        ("on the sand, a red cube", ["red cube"], (["a red cube"], "on the sand")),
        ("a cat", ["cat"], (["a cat"], "")),
        ("a cat on a mat", [], (["a cat on a mat"], "")),
        ("a cat and a cat", ["cat"], (["a cat and a cat"], "")),
    ):
        inside, rest = split(words, prompt, asked)
        assert ([piece.text for piece in inside], rest.text) == expected
        for piece in (*inside, rest):  # every character comes from where it says
            told = zip(piece.text, piece.origins, strict=True)
            assert all(place < 0 or prompt[place] == char for char, place in told)
            assert sum(place < 0 for place in piece.origins) == (5 if piece.text == "a cat and a cat" and asked else 0)


def test_sides_of_every_encoder():
    sides = Sides(tiny_model("sd3"), 2)
    own = sides.own(77 + 64)
    assert own.sum(1).tolist() == [38 + 32, 38 + 32] and own.sum(0).max() == 1
    assert own[:, 0].sum() == 0 and own[0, 77] == 1
    with pytest.raises(BadInput, match="room for 38"):
        sides.check_lengths(["big dog " * 30])


def test_refusals_are_one_line():
    model = tiny_model("sd")
    image = {"image": picture(), "strength": 1.0}
    for given, run, said in (
        ({"words": ["cube"]}, {}, "needs a silhouette"),
        ({"words": ["cube"], "mask": HALF * 0}, {}, "is empty"),
        ({"words": ["cube"], "box": [0, 0, 1, 1]}, {}, "whole picture"),
        ({"words": ["cube"], "box": [[0, 0, 0.4, 1], [0.5, 0, 0.7, 1]]}, {}, "2 regions and 1 words"),
        ({"words": ["cube"], "mask": HALF, "source": ["a dog"]}, {}, "no image"),
        ({"words": ["cube"], "mask": HALF}, image, "needs source"),
        ({"words": ["cube"], "mask": HALF, "source": ["a dog"]}, {**image, "scheduler": "pndm"}, "'ddim'"),
        ({"words": ["cube"], "mask": HALF, "source": ["a", "b"]}, image, "one per region"),
        (
            {"words": ["cube"], "mask": HALF, "source": ["a dog"], "fresh": 0.5},
            {"image": picture(), "strength": 0.5, "scheduler": "ddim"},
            "very start",
        ),
    ):
        with pytest.raises(BadInput) as caught:
            generate(model, PROMPT, interventions=ShapeGuided(**given), **run, **{k: v for k, v in options().items()})
        assert said in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(NoMatch, match="cube"):
        generate(model, PROMPT, interventions=ShapeGuided(words=["cubes"], mask=HALF), **options())


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_at_strength_zero_nothing_changes(kind):
    model = tiny_model(kind)
    plain = generate(model, PROMPT, **options()).latents
    weak = generate(model, PROMPT, interventions=ShapeGuided(words=["cube"], mask=HALF, strength=0), **options())
    assert torch.equal(plain, weak.latents)
