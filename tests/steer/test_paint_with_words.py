"""Paint-with-words against its formula written out by hand, on every family; maps, masks, boxes, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.attention.tap import Tap
from sfumato.cards import build, from_recipe, to_recipe
from sfumato.errors import BadInput, Conflict, NoMatch
from sfumato.sampling import Intervention, generate
from sfumato.steer.paint_with_words import PaintWithWords
from sfumato.text.words import Words
from tests.tiny import tiny_model

PROMPT = "a red cube and a blue ball"
BOXES = [[0, 0.25, 0.5, 1], [0.4, 0, 1, 0.6]]
PHRASES = ["red cube", "blue ball"]


class Both(Intervention):
    """All scores before and after the edits of others, and the rows of each branch."""

    def __init__(self):
        self.before, self.after, self.rows = {}, {}, {}

    def taps(self):
        def see(kept):
            def look(call):
                key = (call.step.i, call.site.path, tuple(call.rows))
                kept[key] = (call.site, call.scores().detach().double())
                self.rows[key] = (call.rows, float(call.step.t))
                self.mark(call.step)

            return look

        chosen = {"where": lambda site: site.text is not None}
        return [Tap(observe=see(self.before), raw=True, **chosen), Tap(observe=see(self.after), **chosen)]


def options(model, **more):
    guided = {"true_guidance": 2.0} if model.embeds_guidance else {"guidance": 3.0}
    return {"steps": 3, "seed": 2, "decode": False, **guided, **more}


def cover(box, grid):
    """The share of each cell of a grid that lies in a box of fractions, cell by cell."""
    h, w = grid
    shares = torch.zeros(h, w, dtype=torch.float64)
    for y in range(h):
        for x in range(w):
            wide = max(0.0, min((x + 1) / w, box[2]) - max(x / w, box[0])) * w
            high = max(0.0, min((y + 1) / h, box[3]) - max(y / h, box[1])) * h
            shares[y, x] = wide * high
    return shares.flatten()


def sigma_of(model, t):
    if model.flow:
        return min(t / 1000 / (1 - t / 1000), 14.6) if t < 1000 else 14.6
    squared = model.pipe.scheduler.alphas_cumprod.double()[int(t)]
    return min(float(((1 - squared) / squared).sqrt()), 14.6)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "pixart"])
def test_the_formula(kind):
    model = tiny_model(kind)
    both = Both()
    painted = PaintWithWords(phrases=PHRASES, box=BOXES, strength=0.3)
    given = options(model, scheduler=None if model.flow else "ddim")
    result = generate(model, PROMPT, interventions=[painted, both], **given)
    words = Words(model)
    assert both.before
    for key, (site, before) in both.before.items():
        rows, t = both.rows[key]
        after, expected = both.after[key][1], before.clone()
        if "cond" in rows:
            (a, b), (first, last) = site.image, site.text
            block = before[rows["cond"], :, a:b, first:last]
            weight = 0.3 * np.log(1 + sigma_of(model, t)) * block.max().item()
            for phrase, box in zip(PHRASES, BOXES, strict=True):
                for position in words.one(PROMPT, phrase).positions:
                    expected[rows["cond"], :, a:b, first + position] += weight * cover(box, site.grid)
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)
        if "uncond" in rows:
            assert torch.equal(after[rows["uncond"]], before[rows["uncond"]])
    assert result.coverage["paint_with_words"]["tokens"] == ["red cube", "blue ball"]
    plain = generate(model, PROMPT, **given).latents
    assert not torch.allclose(result.latents, plain, atol=1e-3)
    weak = generate(model, PROMPT, interventions=PaintWithWords(phrases=PHRASES, box=BOXES, strength=0), **given)
    assert torch.equal(weak.latents, plain)


def weights_of(model, given, **more):
    """A of the finest site (n t), by a run."""
    painted = PaintWithWords(**given)
    generate(model, PROMPT, interventions=painted, **options(model, steps=1, **more))
    return max(painted._painted.items(), key=lambda item: item[0][0])[1][0]


def test_regions_of_one_phrase_are_joined_and_phrases_add_up():
    model = tiny_model("sd")
    at = {word: Words(model).one(PROMPT, word).positions[0] for word in ("red", "cube", "blue")}
    overlapping = {
        "phrases": ["red cube", "Red cube", "cube"],
        "box": [[0, 0, 0.5, 1], [0.25, 0, 1, 1], [0, 0, 1, 0.5]],
    }
    painted = weights_of(model, overlapping).reshape(16, 16, -1)
    assert painted[..., at["red"]].unique().tolist() == [1] and painted[..., at["blue"]].unique().tolist() == [0]
    assert painted[:8, :, at["cube"]].unique().tolist() == [2] and painted[8:, :, at["cube"]].unique().tolist() == [1]
    weighted = {"phrases": ["red cube", "blue ball"], "box": BOXES, "weights": [2, -0.5]}
    painted = weights_of(model, weighted)
    assert painted[:, at["red"]].max() == 2 and painted[:, at["blue"]].min() == -0.5


def test_which_of_two_equal_words():
    model = tiny_model("sd")
    prompt = "a red cube and a blue cube"
    spans = Words(model).find(prompt, "cube")
    for phrase, expected in (("cube#2", spans[1:]), ("cube", spans)):
        painted = PaintWithWords(phrases=[phrase], box=[[0, 0, 1, 1]])
        generate(model, prompt, interventions=painted, **options(model, steps=1))
        columns = next(iter(painted._painted.values()))[0].amax(0).nonzero().flatten().tolist()
        assert columns == sorted(position for span in expected for position in span.positions)


def test_maps_masks_and_boxes_say_the_same(tmp_path):
    model = tiny_model("sd")
    paint = np.zeros((64, 96, 3), np.uint8)
    paint[:, :48], paint[32:, 48:] = (255, 0, 0), (0, 0, 250)
    Image.fromarray(paint).save(tmp_path / "map.png")
    for i, layer in enumerate((paint[..., 0], paint[..., 2])):
        Image.fromarray(np.where(layer > 0, 255, 0).astype(np.uint8)).save(tmp_path / f"{i}.png")
    phrases = "phrases=[red cube|blue ball]"
    said = [
        f"{phrases},map={tmp_path}/map.png,colors=[red|#0000ff]",
        f"{phrases},mask=[{tmp_path}/0.png|{tmp_path}/1.png]",
        f"{phrases},box=[[0|0|0.5|1]|[0.5|0.5|1|1]]",
        f"{phrases},box=[[0|0|16|32]|[16|16|32|32]]",
        f"{phrases},mask={tmp_path}/0.png,box=0.5|0.5|1|1",
    ]
    systems = [build(f"paint_with_words:{each}") for each in said] + [
        PaintWithWords(phrases=PHRASES, map=paint, colors=["red", "blue"]),
        PaintWithWords(phrases=PHRASES, mask=[paint[..., 0] > 0, Image.fromarray(paint[..., 2] > 0)]),
    ]
    drawn = [generate(model, PROMPT, interventions=each, **options(model)).latents for each in systems]
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])
    again = from_recipe(to_recipe(systems[-1]))
    assert torch.equal(generate(model, PROMPT, interventions=again, **options(model)).latents, drawn[0])


def test_samples_do_not_influence_each_other_and_have_prompts_of_their_own():
    model = tiny_model("sd3")
    prompts = ["a blue ball and a big red cube", PROMPT]
    make = lambda: PaintWithWords(phrases=PHRASES, box=BOXES, strength=1.0)  # noqa: E731
    together = generate(model, prompts, interventions=make(), **options(model, seed=[1, 2])).latents
    alone = generate(model, PROMPT, interventions=make(), **options(model)).latents
    torch.testing.assert_close(together[1:], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_painting_draws_attention_and_fades(kind):
    model = tiny_model(kind)
    both = Both()
    painted = PaintWithWords(phrases=["red cube"], box=[BOXES[0]], strength=1.0)
    given = options(model, scheduler=None if model.flow else "ddim", steps=6)
    generate(model, PROMPT, interventions=[painted, both], **given)
    columns = Words(model).one(PROMPT, "red cube").positions
    raised = []
    for key, (site, before) in both.before.items():
        if key[1] == next(iter(both.before))[1]:
            cond, columns_here = both.rows[key][0]["cond"], [site.text[0] + p for p in columns]
            gain = (both.after[key][1] - before)[cond][..., columns_here].amax().item()
            raised.append(gain)
            after, plain = (x[cond].softmax(-1)[..., columns_here] for x in (both.after[key][1], before))
            assert (after - plain)[:, :, site.image[0] + cover(BOXES[0], site.grid).argmax()].min() > 0
    assert len(raised) == 6 and raised[0] > 3 * raised[-1]


def test_the_softer_rule_and_windows():
    model = tiny_model("sd")
    both = Both()
    painted = PaintWithWords(phrases=["cube"], box=[[0, 0, 1, 1]], strength=0.4, scale="std", window=(0.0, 0.5))
    generate(model, PROMPT, interventions=[painted, both], **options(model, scheduler="ddim", steps=4))
    assert painted.coverage()["steps"] == [0, 1]
    position = Words(model).one(PROMPT, "cube").positions[0]
    for key, (_, before) in both.before.items():
        cond, t = both.rows[key][0]["cond"], both.rows[key][1]
        gain = (both.after[key][1] - before)[cond][..., position]
        expected = 0.4 * np.log(1 + sigma_of(model, t) ** 2) * before[cond].std().item() if key[0] < 2 else 0.0
        torch.testing.assert_close(gain, torch.full_like(gain, expected), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["sdxl", "sd3"])
def test_regions_may_have_seeds_of_their_own(kind):
    model = tiny_model(kind)
    starts = []

    class Start(Intervention):
        def before_predict(self, step):
            starts.append(step.x)
            self.mark(step)

    given = options(model, steps=1)
    left = {"phrases": ["red cube"], "box": [[0, 0, 0.5, 1]]}
    for seeds, seed in (([7], 1), ([7], 2), ([], 1), ([8], 1)):
        generate(model, PROMPT, interventions=[PaintWithWords(**left, seeds=seeds), Start()], **{**given, "seed": seed})
    assert torch.equal(starts[0][..., :8], starts[1][..., :8]) and not torch.equal(starts[0], starts[1])
    assert torch.equal(starts[0][..., 8:], starts[2][..., 8:]) and not torch.equal(starts[0], starts[2])
    assert not torch.equal(starts[0][..., :8], starts[3][..., :8])
    assert 0.8 < starts[0][..., :8].std() / starts[2].std() < 1.25
    with pytest.raises(BadInput, match="begins from a picture"):
        image = Image.new("RGB", (32, 32))
        generate(model, PROMPT, image=image, interventions=PaintWithWords(**left, seeds=[7]), **{**given, "steps": 2})


def test_refusals_are_one_line(tmp_path):
    paint = np.zeros((8, 8, 3), np.uint8)
    for given, said in (
        ({}, "0 phrases for 0 regions"),
        ({"phrases": ["red cube"]}, "1 phrases for 0 regions"),
        ({"phrases": ["red cube"], "box": BOXES}, "1 phrases for 2 regions"),
        ({"phrases": ["cube"], "map": paint}, "go together"),
        ({"phrases": ["cube"], "colors": ["red"]}, "go together"),
        ({"phrases": ["cube"], "box": [BOXES[0]], "weights": [1, 2]}, "2 numbers for 1 phrases"),
        ({"phrases": ["cube"], "box": [BOXES[0]], "seeds": [1, 2]}, "2 numbers for 1 phrases"),
        ({"phrases": ["cube"], "box": [BOXES[0]], "seeds": [-1]}, "0 or above"),
        ({"phrases": ["cube"], "box": [BOXES[0]], "window": (0.5, 0.5)}, "window"),
        ({"phrases": ["cube"], "mask": tmp_path / "none.png"}, "is no file"),
    ):
        with pytest.raises(BadInput) as caught:
            PaintWithWords(**given)
        assert said in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(NoMatch, match="#000000"):
        PaintWithWords(phrases=["cube"], map=paint, colors=["red"])
    model = tiny_model("sd")
    for given, kind, said in (
        ({"phrases": ["red cone"], "box": [BOXES[0]]}, NoMatch, "red"),
        ({"phrases": ["cube"], "mask": np.zeros((4, 4))}, BadInput, "nothing is painted"),
        ({"phrases": ["cube"], "box": [[0, 0, 40, 10]]}, BadInput, "x0|y0|x1|y1"),
    ):
        with pytest.raises(kind) as caught:
            generate(model, PROMPT, interventions=PaintWithWords(**given), **options(model))
        assert said in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(NoMatch, match="red cube"):  # in one prompt of two
        painted = PaintWithWords(phrases=PHRASES, box=BOXES)
        generate(model, [PROMPT, "a blue ball"], interventions=painted, **options(model))
    with pytest.raises(Conflict, match="composed"):
        painted = PaintWithWords(phrases=PHRASES, box=BOXES)
        generate(model, PROMPT, compose=[("a dog", 2.0)], interventions=painted, **options(model))
