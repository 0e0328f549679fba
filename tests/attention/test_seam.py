"""The attention seam: exact against explicit attention in float64, bit-exact where left alone, composing, refusing."""

from __future__ import annotations

import ast
import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.hooks import HookRegistry, ModelHook
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextConfig,
    CLIPTextModel,
    T5Config,
    T5EncoderModel,
    ViTConfig,
    ViTModel,
)

import sfumato
from sfumato.attention import MapReplacement, Tap
from sfumato.attention.call import FEW_KEYS, Call
from sfumato.attention.seam import AttentionSeam
from sfumato.attention.sites import Where, find_sites
from sfumato.errors import BadInput, Conflict, NoMatch, NotSupported
from sfumato.models.site import Site

B, K, N, T, D = 3, 4, 6 * 5, 11, 8


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# -- one bare attention call -------------------------------------------------------------------------------------------


class Bare(nn.Module):
    """A module that does nothing but call attention with the arguments it is given."""

    def forward(self, *args, **kwargs):
        return F.scaled_dot_product_attention(*args, **kwargs)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = Bare(), Bare()

    def forward(self, *args, **kwargs):
        return self.a(*args, **kwargs) + self.b(*args, **kwargs)


def site(path="a", kind="cross", grid=(6, 5), text=(0, T), image=(0, N), index=0) -> Site:
    return Site(path, kind, grid, text, image, K, path, index)


def qkv(dtype=torch.float32, n=N, t=T, kv_heads=K, grad=False):
    make = lambda k, m: torch.randn(B, k, m, D, dtype=torch.float32).to(dtype).requires_grad_(grad)  # noqa: E731
    return make(K, n), make(kv_heads, t), make(kv_heads, t)


def explicit(q, k, v, mask=None, is_causal=False, scale=None, **_):
    """The textbook, in float64, written independently of the library."""
    q, k, v = q.double(), k.double(), v.double()
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (torch.stack([x[:, i // groups] for i in range(q.shape[1])], 1) for x in (k, v))
    scores = torch.einsum("bknd,bktd->bknt", q, k) * (scale if scale is not None else 1 / q.shape[-1] ** 0.5)
    if mask is not None:
        scores = torch.where(mask, scores, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    if is_causal:
        n, t = scores.shape[-2:]
        scores = torch.where(torch.ones(n, t, dtype=torch.bool).tril(), scores, -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    probs = weights / weights.sum(-1, keepdim=True)
    return probs, probs @ v


CASES = {
    "plain": {},
    "scale": {"scale": 0.3},
    "bool mask": {"attn_mask": "keys"},
    "bool mask per query": {"attn_mask": "queries"},
    "additive mask": {"attn_mask": "bias"},
    "mask without batch": {"attn_mask": "2d"},
    "causal": {"is_causal": True},
    "causal and mask": {"is_causal": True, "attn_mask": "keys"},
    "grouped queries": {"enable_gqa": True},
    "many keys": {"many": True},
    "many keys, mask": {"many": True, "attn_mask": "keys"},
    "many keys, causal": {"many": True, "is_causal": True},
    "many keys, grouped": {"many": True, "enable_gqa": True},
}


def arguments(case, dtype=torch.float32, grad=False):
    kwargs = dict(CASES[case])
    t = FEW_KEYS + 20 if kwargs.pop("many", False) else T
    q, k, v = qkv(dtype, t=t, kv_heads=2 if kwargs.get("enable_gqa") else K, grad=grad)
    masks = {
        "keys": torch.rand(B, 1, 1, t) > 0.4,
        "queries": torch.rand(B, K, N, t) > 0.4,
        "bias": torch.randn(B, K, N, t).to(dtype),
        "2d": torch.rand(N, t) > 0.4,
    }
    if "attn_mask" in kwargs:
        mask = masks[kwargs["attn_mask"]]
        if mask.dtype == torch.bool:
            mask[..., 0] = True
        kwargs["attn_mask"] = mask
    return (q, k, v), kwargs


def reference(args, kwargs):
    return explicit(
        *args, mask=kwargs.get("attn_mask"), is_causal=kwargs.get("is_causal", False), scale=kwargs.get("scale")
    )


def through_seam(module, taps, args, kwargs, sites=None, rows=None):
    with AttentionSeam(module, sites or [site()], taps) as seam, seam.forward(rows=rows):
        return module(*args, **kwargs)


@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("case", CASES)
def test_maps_equal_explicit_attention_and_observing_keeps_every_bit(case, grad):
    args, kwargs = arguments(case, grad=grad)
    probs, out = reference(args, kwargs)
    net, seen = Net(), {}
    columns, inside = [3, 0, 7], (2, 9)

    def look(call: Call):
        seen["words"] = call.word_probs(columns)
        seen["part"] = call.word_probs(slice(1, 4), queries=slice(7, 19))
        seen["within"] = call.word_probs([2, 8], within=inside)
        seen["probs"] = call.probs()
        seen["some"] = call.probs(slice(4, 9))

    plain = net(*args, **kwargs)
    watched = through_seam(net, [Tap(observe=look)], args, kwargs, sites=[site("a"), site("b")])
    assert torch.equal(plain, watched)
    close = {"rtol": 0, "atol": 2e-6}
    torch.testing.assert_close(seen["probs"].double(), probs, **close)
    torch.testing.assert_close(seen["some"].double(), probs[:, :, 4:9], **close)
    torch.testing.assert_close(seen["words"].double(), probs[..., columns], **close)
    torch.testing.assert_close(seen["part"].double(), probs[:, :, 7:19, 1:4], **close)
    mass = probs[..., slice(*inside)].sum(-1, keepdim=True)
    torch.testing.assert_close(
        seen["within"].double(), torch.where(mass > 0, probs[..., [2, 8]] / mass, 0.0), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(plain.double() / 2, out, rtol=0, atol=5e-6)


@pytest.mark.parametrize("case", CASES)
def test_edited_site_computes_the_same_attention_explicitly(case):
    args, kwargs = arguments(case)
    probs, out = reference(args, kwargs)
    for tap in (Tap(edit_scores=lambda call: call.scores()), Tap(edit_probs=lambda call: call.probs())):
        edited = through_seam(Net().a, [tap], args, kwargs, sites=[site("")])
        torch.testing.assert_close(edited.double(), out, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("case", ["plain", "many keys", "bool mask"])
def test_low_precision_inputs_give_maps_computed_in_float32(case, dtype):
    args, kwargs = arguments(case, dtype)
    probs, out = reference(args, kwargs)
    bare, seen = Bare(), []
    observed = through_seam(bare, [Tap(observe=lambda c: seen.append(c.word_probs([1, 4])))], args, kwargs, [site("")])
    assert torch.equal(observed, bare(*args, **kwargs))
    assert seen[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(seen[0].double(), probs[..., [1, 4]], rtol=1e-4, atol=1e-6)
    edited = through_seam(bare, [Tap(edit_probs=lambda c: c.probs())], args, kwargs, [site("")])
    assert edited.dtype == dtype
    torch.testing.assert_close(edited.double(), out, rtol=0, atol=1e-2 if dtype != torch.float64 else 1e-12)


def test_queries_that_may_look_nowhere_get_zeros_as_in_the_kernel():
    (q, k, v), mask = qkv(), torch.ones(B, 1, N, T, dtype=torch.bool)
    mask[:, :, 4] = False
    bare, seen = Bare(), []
    plain = through_seam(
        bare, [Tap(observe=lambda c: seen.append(c.word_probs([0, 1])))], (q, k, v), {"attn_mask": mask}, [site("")]
    )
    edited = through_seam(bare, [Tap(edit_probs=lambda c: c.probs())], (q, k, v), {"attn_mask": mask}, [site("")])
    assert torch.equal(seen[0][:, :, 4], torch.zeros_like(seen[0][:, :, 4]))
    torch.testing.assert_close(edited, plain, rtol=0, atol=2e-6)
    masked_out = through_seam(
        bare, [Tap(edit_scores=lambda c: torch.full_like(c.scores(), -torch.inf))], (q, k, v), {}, [site("")]
    )
    assert torch.equal(masked_out, torch.zeros_like(masked_out))


@pytest.mark.parametrize("case", ["plain", "many keys", "many keys, mask"])
def test_gradients_flow_through_observed_maps(case):
    args, kwargs = arguments(case, grad=True)
    seen = []
    through_seam(Bare(), [Tap(observe=lambda c: seen.append(c.word_probs([2, 5])))], args, kwargs, [site("")])
    weight = torch.randn_like(seen[0])
    ours = torch.autograd.grad((seen[0] * weight).sum(), args[:2])
    theirs = torch.autograd.grad((reference(args, kwargs)[0][..., [2, 5]] * weight.double()).sum(), args[:2])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_maps_read_without_gradients_leave_those_of_the_output_alone():
    args, _ = arguments("plain", grad=True)

    def look(call):
        with torch.no_grad():
            call.word_probs([1])

    out = through_seam(Bare(), [Tap(observe=look)], args, {}, [site("")])
    ours = torch.autograd.grad(out.square().sum(), args)
    theirs = torch.autograd.grad(Bare()(*args).square().sum(), args)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_joint_attention_reads_image_queries_against_text_keys():
    n, image, text = 20 + 9, (0, 20), (20, 29)
    q, k, v = qkv(n=n, t=n)
    probs, _ = explicit(q, k, v)
    seen = {}

    def look(call):
        seen["raw"] = call.word_probs([22, 28])
        seen["text"] = call.word_probs(call.text, within=(call.text.start, call.text.stop))

    through_seam(Bare(), [Tap(observe=look)], (q, k, v), {}, [site("", "joint", (4, 5), text, image)])
    block = probs[:, :, slice(*image), slice(*text)]
    torch.testing.assert_close(seen["raw"].double(), probs[:, :, :20, [22, 28]], rtol=0, atol=2e-6)
    torch.testing.assert_close(seen["text"].double(), block / block.sum(-1, keepdim=True), rtol=0, atol=2e-6)


def test_word_maps_of_more_columns_than_features():
    args, kwargs = arguments("many keys", grad=True)
    probs, _ = reference(args, kwargs)
    seen = []
    through_seam(
        Bare(), [Tap(observe=lambda c: seen.append(c.word_probs(slice(0, 3 * D + 1))))], args, kwargs, [site("")]
    )
    torch.testing.assert_close(seen[0].double(), probs[..., : 3 * D + 1], rtol=0, atol=2e-6)


def test_places_are_asked_once_a_pass_for_sites_of_one_kind_and_image():
    asked = []

    def places(at: Site):
        asked.append(at.path)

    def sites(**images):
        return [site(path, "joint", text=None, image=image) for path, image in images.items()]

    args, _ = arguments("plain")
    alike, other = sites(a=(0, N), b=(0, N)), sites(a=(0, N), b=(T, N + T))
    with AttentionSeam(Net(), alike, [Tap(observe=lambda call: None)]) as seam:
        for _ in range(2):
            with seam.forward(places=places):
                seam.module(*args)
        assert asked == ["a", "a"]
        with seam.forward() as forward:
            seam.module(*args)
            assert forward.places_at(alike[0]) is None
    asked.clear()
    wide = [torch.cat([args[0]] * 2, 2)[:, :, : N + T]] * 3
    with AttentionSeam(Net(), other, [Tap(observe=lambda call: None)]) as seam, seam.forward(places=places):
        seam.module(*wide)
    assert asked == ["a", "b"]


# -- editing and composition -------------------------------------------------------------------------------------------


def test_edits_compose_in_the_order_of_the_taps_and_observers_see_the_result():
    args, _ = arguments("plain")
    q, k, v = args
    bias, seen = torch.randn(N, T), {}
    taps = [
        Tap(observe=lambda c: seen.setdefault("first", c.probs())),
        Tap(observe=lambda c: seen.setdefault("raw", c.probs()), raw=True),
        Tap(edit_probs=lambda c: c.probs() * 2),
        Tap(edit_scores=lambda c: c.scores() + bias),
        Tap(edit_values=lambda c: c.v + 1),
        Tap(edit_scores=lambda c: c.scores() * 0.5),
        Tap(edit_probs=lambda c: c.probs() + 0.25),
        Tap(observe=lambda c: seen.setdefault("words", c.word_probs([4]))),
    ]
    out = through_seam(Bare(), taps, args, {}, [site("")])
    scores = torch.einsum("bknd,bktd->bknt", q, k) / D**0.5
    final = ((scores + bias) * 0.5).softmax(-1) * 2 + 0.25
    torch.testing.assert_close(seen["raw"], scores.softmax(-1))
    torch.testing.assert_close(seen["first"], final)
    torch.testing.assert_close(seen["words"], final[..., [4]])
    torch.testing.assert_close(out, final @ (v + 1), rtol=1e-5, atol=1e-5)


def test_another_map_in_place_of_some_rows():
    (q, k, v), _ = arguments("plain")
    one = torch.randn(1, K, N, T).softmax(-1)
    seen = {}

    def swap(call):
        return MapReplacement(
            slice(1, 2),
            attend=lambda own: (own.probs() * 0.5 + one * 0.5) @ own.v,
            probs=lambda own, queries: own.probs(queries) * 0.5 + one[:, :, queries] * 0.5,
        )

    def look(call):
        seen["all"], seen["words"] = call.probs(), call.word_probs([4, 2])
        seen["within"] = call.word_probs([4], within=(2, 6))
        seen["row"], seen["rest"] = call.branch("a").probs(), call.branch("b").word_probs([4])

    taps = [Tap(edit_map=swap), Tap(observe=look), Tap(edit_scores=lambda c: c.scores() * 2)]
    where = [site("")]
    rows = {"a": slice(1, 2), "b": slice(2, B)}
    net = Bare()
    with AttentionSeam(net, where, taps) as seam, seam.forward(rows=rows):
        out = net(q, k, v)
    probs = (2 * torch.einsum("bknd,bktd->bknt", q, k) / D**0.5).softmax(-1)
    probs[1:2] = probs[1:2] * 0.5 + one * 0.5
    for name, expected in {
        "all": probs,
        "words": probs[..., [4, 2]],
        "within": probs[..., [4]] / probs[..., 2:6].sum(-1, keepdim=True),
        "row": probs[1:2],
        "rest": probs[2:, ..., [4]],
    }.items():
        torch.testing.assert_close(seen[name], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out, probs @ v, rtol=1e-5, atol=1e-5)
    with pytest.raises(Conflict, match="two editors"):
        through_seam(Bare(), [Tap(edit_map=swap), Tap(edit_map=swap)], (q, k, v), {}, where)


def test_rows_around_another_map_keep_every_bit():
    args, _ = arguments("plain")
    plain = Bare()(*args)
    seen = []

    def swap(call):
        return MapReplacement(
            slice(1, 2), attend=lambda own: own.attend(), probs=lambda own, queries: own.probs(queries)
        )

    taps = [Tap(edit_map=swap), Tap(observe=lambda c: seen.append(c.branch("b").word_probs([4])))]
    with AttentionSeam(net := Bare(), [site("")], taps) as seam:
        with seam.forward(rows={"a": slice(1, 2), "b": slice(2, B)}):
            out = net(*args)
    assert torch.equal(out, plain)
    q, k, _ = args
    probs = (torch.einsum("bknd,bktd->bknt", q, k) / D**0.5).softmax(-1)
    torch.testing.assert_close(seen[0], probs[2:, ..., [4]])


def test_an_edit_of_scores_never_revives_a_masked_key():
    args, kwargs = arguments("bool mask")
    seen = []
    taps = [Tap(edit_scores=lambda c: c.scores() + 50), Tap(observe=lambda c: seen.append(c.probs()))]
    through_seam(Bare(), taps, args, kwargs, [site("")])
    assert (seen[0].masked_select(~kwargs["attn_mask"]) == 0).all()
    torch.testing.assert_close(seen[0].double(), reference(args, kwargs)[0], rtol=0, atol=1e-5)


def test_values_alone_stay_on_the_fused_kernel():
    (q, k, v), _ = arguments("plain")
    tap = Tap(edit_values=lambda c: c.v.flip(0))
    assert torch.equal(through_seam(Bare(), [tap], (q, k, v), {}, [site("")]), Bare()(q, k, v.flip(0)))


def test_an_editor_that_returns_none_keeps_every_bit():
    args, _ = arguments("plain")
    tap = Tap(edit_scores=lambda c: None, edit_probs=lambda c: None, edit_values=lambda c: None)
    assert torch.equal(through_seam(Bare(), [tap], args, {}, [site("")]), Bare()(*args))


def test_edit_of_one_branch_leaves_the_others_rows_as_they_are():
    args, _ = arguments("plain")

    def only_cond(call):
        probs = call.probs().clone()
        probs[call.rows["cond"]] = 0
        return probs

    rows = {"uncond": slice(0, 2), "cond": slice(2, 3)}
    out = through_seam(Bare(), [Tap(edit_probs=only_cond)], args, {}, [site("")], rows)
    assert (out[2] == 0).all()
    torch.testing.assert_close(out[:2], Bare()(*args)[:2], rtol=0, atol=2e-6)


def test_wrong_shape_from_an_editor_is_refused():
    args, _ = arguments("plain")
    with pytest.raises(BadInput, match="edit_probs at .* returned shape"):
        through_seam(Bare(), [Tap(edit_probs=lambda c: c.probs()[:1])], args, {}, [site("")])


# -- rows --------------------------------------------------------------------------------------------------------------


def test_rows_are_told_and_never_guessed():
    args, kwargs = arguments("bool mask")
    probs, _ = reference(args, kwargs)
    seen = {}

    def look(call):
        seen.update({name: call.branch(name).word_probs([1, 6]) for name in call.rows})
        seen["probs"] = call.branch("cond").probs()

    rows = {"cond": slice(0, 1), "uncond": slice(1, 3)}  # an order no parity rule would guess
    through_seam(Bare(), [Tap(observe=look)], args, kwargs, [site("")], rows)
    torch.testing.assert_close(seen["cond"].double(), probs[:1][..., [1, 6]], rtol=0, atol=2e-6)
    torch.testing.assert_close(seen["uncond"].double(), probs[1:][..., [1, 6]], rtol=0, atol=2e-6)
    torch.testing.assert_close(seen["probs"].double(), probs[:1], rtol=0, atol=2e-6)


def test_frames_folded_into_the_batch_axis_belong_to_their_sample():
    frames = 4
    q, k, v = (torch.randn(2 * frames, K, m, D) for m in (N, T, T))
    seen = []
    rows = {"uncond": slice(0, 1), "cond": slice(1, 2)}
    through_seam(
        Bare(), [Tap(observe=lambda c: seen.append(c.branch("cond").probs()))], (q, k, v), {}, [site("")], rows
    )
    torch.testing.assert_close(seen[0].double(), explicit(q, k, v)[0][frames:], rtol=0, atol=2e-6)
    with pytest.raises(BadInput, match="rows speak of 3 samples"):
        through_seam(Bare(), [Tap(observe=print)], (q, k, v), {}, [site("")], {"cond": slice(0, 3)})


def test_unknown_branch_lists_those_there_are():
    args, _ = arguments("plain")
    with pytest.raises(NoMatch, match="no rows of branch 'cond'.*uncond"):
        through_seam(Bare(), [Tap(observe=lambda c: c.branch("cond"))], args, {}, [site("")], {"uncond": slice(0, 3)})


# -- coverage, stopping, leaving no trace ------------------------------------------------------------------------------


class Counting(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def test_sites_nobody_asked_for_keep_the_fused_kernel():
    args, _ = arguments("plain")
    net, seen = Net(), []
    tap = Tap(
        where=lambda s: s.path == "a", edit_probs=lambda c: c.probs() * 0, observe=lambda c: seen.append(c.site.path)
    )
    with Counting() as counting:
        out = through_seam(net, [tap], args, {}, [site("a"), site("b")])
    assert counting.calls == 1 and seen == ["a"]
    assert torch.equal(out, Bare()(*args) + 0)


def test_a_second_attention_call_of_a_site_passes_untouched():
    class Twice(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v) - F.scaled_dot_product_attention(q, k[:, :, :4], v[:, :, :4])

    args, seen = arguments("plain")[0], []
    out = through_seam(Twice(), [Tap(observe=lambda c: seen.append(c.k.shape[2]))], args, {}, [site("")])
    assert seen == [T] and torch.equal(out, Twice()(*args))


def test_stopping_after_the_last_wanted_site():
    args, _ = arguments("plain")
    net, ran = Net(), []
    net.b.register_forward_pre_hook(lambda *_: ran.append("b"))
    stop = Tap(where=lambda s: s.path == "a", observe=lambda c: None, stop_after=True)
    stay = Tap(where=lambda s: s.path == "a", observe=lambda c: None)
    with AttentionSeam(net, [site("a"), site("b")], [stop]) as seam:
        with seam.forward() as forward:
            net(*args)
            raise AssertionError("the pass went on")
        assert forward.stopped and forward.calls == {"a": 1} and ran == []
    with AttentionSeam(net, [site("a"), site("b")], [stop, stay]) as seam:
        with seam.forward() as forward:
            net(*args)
        assert not forward.stopped and ran == ["b"]


def hooks_of(module):
    return [
        dict(m._forward_hooks) | dict(m._forward_pre_hooks) | dict(m._forward_hooks_always_called)
        for m in module.modules()
    ]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["observer", "module"])
def test_no_trace_is_left(error, where):
    args, _ = arguments("plain")
    net = Net()
    before, plain = hooks_of(net), net(*args)

    def fail(*_):
        if error:
            raise error("stop here")

    if where == "module":
        handle = net.a.register_forward_hook(fail)
    try:
        through_seam(
            net, [Tap(observe=fail if where == "observer" else lambda c: None)], args, {}, [site("a"), site("b")]
        )
        assert error is None
    except (RuntimeError, KeyboardInterrupt):
        assert error is not None
    if where == "module":
        handle.remove()
    assert hooks_of(net) == before and _get_current_function_mode_stack() == []
    assert torch.equal(net(*args), plain)


def test_outside_forward_the_taps_sleep():
    args, _ = arguments("plain")
    net, seen = Net(), []
    with AttentionSeam(net, [site("a")], [Tap(observe=seen.append, edit_probs=lambda c: c.probs() * 0)]) as seam:
        net(*args)
        assert seen == [] and seam.coverage() == {"sites": [], "calls": 0, "forwards": 0}


def test_another_thread_does_not_meet_the_taps():
    args, _ = arguments("plain")
    net, seen, plain = Net(), [], Net()(*args)
    with AttentionSeam(net, [site("a")], [Tap(edit_probs=lambda c: seen.append(1) or c.probs() * 0)]) as seam:
        with seam.forward():
            other = threading.Thread(target=lambda: seen.append(torch.equal(net(*args), plain)))
            other.start()
            other.join()
            net(*args)
    assert seen == [True, 1]


def test_two_seams_in_one_forward_conflict():
    args, _ = arguments("plain")
    net, tap = Net(), Tap(observe=lambda c: None)
    with AttentionSeam(net, [site("a")], [tap]) as one, AttentionSeam(net, [site("b")], [tap]) as two:
        with pytest.raises(Conflict), one.forward(), two.forward():
            net(*args)
        with two.forward():  # one after the other is fine
            net(*args)
    with pytest.raises(Conflict, match="not attached"), one.forward():
        pass


def test_coverage_counts_what_each_tap_saw():
    args, _ = arguments("plain")
    net = Net()
    a, ab = Tap(where=lambda s: s.path == "a", observe=lambda c: None), Tap(observe=lambda c: None)
    with AttentionSeam(net, [site("a"), site("b")], [a, ab]) as seam:
        for _ in range(3):
            with seam.forward():
                net(*args)
    assert seam.coverage(a) == {"sites": ["a"], "calls": 3, "forwards": 3}
    assert seam.coverage() == {"sites": ["a", "b"], "calls": 6, "forwards": 3}


# -- nothing is a silent no-op -----------------------------------------------------------------------------------------


def test_no_site_matched():
    with pytest.raises(NoMatch, match="the tap 'p2p' matches none of the 2 attention sites: a .cross., b .cross."):
        AttentionSeam(Net(), [site("a"), site("b")], [Tap(lambda s: s.kind == "joint", observe=print, name="p2p")])
    with pytest.raises(NoMatch, match="has no module 'c'"):
        AttentionSeam(Net(), [site("c")], [Tap(observe=print)])


def test_wanted_site_that_did_not_run():
    args, _ = arguments("plain")
    net = Net()
    with pytest.raises(NoMatch, match="site b did not run.*Sites seen: a"):
        with AttentionSeam(net, [site("a"), site("b")], [Tap(observe=lambda c: None)]) as seam, seam.forward():
            net.a(*args)


def test_sites_made_for_another_size_are_refused():
    args, _ = arguments("plain")
    with pytest.raises(NotSupported, match="another picture size"):
        through_seam(Bare(), [Tap(observe=print)], args, {}, [site("", grid=(7, 5))])
    with pytest.raises(NotSupported, match="another prompt length"):
        through_seam(Bare(), [Tap(observe=print)], args, {}, [site("", text=(0, 77))])
    with pytest.raises(BadInput, match="reach outside the 11 keys"):
        through_seam(Bare(), [Tap(observe=lambda c: c.word_probs([11]))], args, {}, [site("")])


def test_a_tap_that_does_nothing_or_contradicts_itself():
    with pytest.raises(BadInput, match="does nothing"):
        Tap()
    with pytest.raises(BadInput, match="drop stop_after"):
        Tap(edit_probs=lambda c: None, stop_after=True)


# -- the real architectures --------------------------------------------------------------------------------------------


def unet():
    torch.manual_seed(1)
    net = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        cross_attention_dim=12, attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()  # fmt: skip
    x, text = torch.randn(2, 4, 8, 6), torch.randn(2, 7, 12)
    return net, lambda: net(x, 3, text).sample


def sd3(dual=(0,)):
    torch.manual_seed(1)
    net = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4,
        pos_embed_max_size=8, dual_attention_layers=dual, qk_norm="rms_norm",
    ).eval()  # fmt: skip
    x, text, pooled = torch.randn(2, 4, 8, 12), torch.randn(2, 7, 12), torch.randn(2, 10)
    return net, lambda: net(x, text, pooled, torch.tensor([5.0, 5.0])).sample


def flux():
    torch.manual_seed(1)
    net = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip
    x, text, pooled = torch.randn(2, 12, 4), torch.randn(2, 7, 12), torch.randn(2, 10)
    ids = torch.zeros(12, 3), torch.zeros(7, 3)
    return net, lambda: net(x, text, pooled, torch.tensor([0.5, 0.5]), img_ids=ids[0], txt_ids=ids[1]).sample


def clip():
    net = CLIPTextModel(
        CLIPTextConfig(vocab_size=50, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2)
    )
    ids = torch.randint(1, 49, (2, 9))
    return net.eval(), lambda: net(ids).last_hidden_state


def vit():
    net = ViTModel(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=20,
            image_size=16,
            patch_size=8,
        )
    )
    x = torch.randn(2, 3, 16, 16)
    return net.eval(), lambda: net(x).last_hidden_state


def bert():
    net = BertModel(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20)
    )
    ids, mask = torch.randint(1, 49, (2, 9)), torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    return net.eval(), lambda: net(ids, attention_mask=mask).last_hidden_state


def t5():
    net = T5EncoderModel(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=20, num_layers=2, num_heads=2))
    ids, mask = torch.randint(1, 49, (2, 9)), torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    return net.eval(), lambda: net(ids, attention_mask=mask).last_hidden_state


ARCHITECTURES = {f.__name__: f for f in (unet, sd3, flux, clip, vit, bert, t5)}
# self and cross attention of 2 down + 1 mid + 2 x 2 up transformers; joint + dual; double + single; layers
EXPECTED = {"unet": 2 * (1 + 1 + 2), "sd3": 3, "flux": 2, "clip": 2, "vit": 2, "bert": 2, "t5": 2}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
def test_every_architecture_is_seen_without_replacing_anything(name, grad):
    net, run = ARCHITECTURES[name]()
    with torch.set_grad_enabled(grad):
        plain = run()
        sites = find_sites(net, run)
        assert len(sites) == EXPECTED[name]
        sums, outs = [], {}

        def look(call):
            sums.append(call.probs().sum(-1))
            outs[call.site.path] = (call.probs().double() @ call.v.double(), call.attend())

        with AttentionSeam(net, sites, [Tap(observe=look)]) as seam, seam.forward():
            watched = run()
        assert torch.equal(watched, plain)
        assert all(torch.allclose(s, torch.ones_like(s)) for s in sums)
        for by_hand, kernel in outs.values():
            torch.testing.assert_close(by_hand.float(), kernel, rtol=0, atol=1e-5)
        with AttentionSeam(net, sites, [Tap(edit_probs=lambda c: c.probs())]) as seam, seam.forward():
            torch.testing.assert_close(run(), plain, rtol=1e-4, atol=1e-4)
        assert torch.equal(run(), plain)


def test_where_selects_by_kind_place_and_size():
    sites = [
        Site("down.attn1", "self", (8, 8), None, (0, 64), 2, "down.0", 0),
        Site("down.attn2", "cross", (8, 8), (0, 77), (0, 64), 2, "down.0", 1),
        Site("mid.attn2", "cross", (4, 4), (0, 77), (0, 16), 2, "mid", 2),
        Site("up.attn2", "cross", (8, 6), (0, 77), (0, 48), 2, "up.1", 3),
    ]
    pick = lambda **given: [s.index for s in sites if Where(**given)(s)]  # noqa: E731
    assert pick() == [0, 1, 2, 3] and pick(kinds=("cross",)) == [1, 2, 3] and pick(text=False) == [0]
    assert (
        pick(places=("up", "mid")) == [2, 3] and pick(places=("*.attn1",)) == [0] and pick(places=("down.0",)) == [0, 1]
    )
    assert pick(grid=(8, 6)) == [3] and pick(max_cells=48) == [2, 3] and pick(min_cells=48, kinds=("cross",)) == [1, 3]


# -- refusals ----------------------------------------------------------------------------------------------------------


def attach(net, run, **tap):
    with AttentionSeam(net, find_sites(net, run), [Tap(observe=lambda c: None, **tap)]) as seam, seam.forward():
        return run()


def test_attention_that_does_not_use_the_seam_is_named():
    from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor

    net, run = unet()
    sites = find_sites(net, run)
    for processor in (AttnProcessor(), SlicedAttnProcessor(2)):
        net.set_attn_processor(processor)
        with pytest.raises(NoMatch, match=f"{type(processor).__name__}.* ran without calling"):
            with AttentionSeam(net, sites, [Tap(observe=lambda c: None)]) as seam, seam.forward():
                run()
        with pytest.raises(NoMatch, match="never called scaled_dot_product_attention"):
            find_sites(net, run)


def test_fused_projections_still_reach_the_seam():
    for make in (unet, lambda: sd3(dual=()), flux):
        net, run = make()
        net.fuse_qkv_projections()
        plain = run()
        assert torch.equal(attach(net, run), plain)


def test_foreign_attention_backends_are_refused_and_native_ones_are_not():
    net, run = flux()
    sites = find_sites(net, run)
    processor = net.transformer_blocks[0].attn.processor
    processor._attention_backend = "flash"
    with pytest.raises(
        NotSupported, match="backend 'flash' at transformer_blocks.0.attn bypasses.*set_attention_backend"
    ):
        AttentionSeam(net, sites, [Tap(observe=print)]).__enter__()
    processor._attention_backend = None
    from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

    with attention_backend("flex"), pytest.raises(NotSupported, match="'flex'"):
        AttentionSeam(net, sites, [Tap(observe=print)]).__enter__()
    processor._attention_backend = AttentionBackendName._NATIVE_MATH
    with AttentionSeam(net, sites, [Tap(observe=lambda c: c.word_probs([0]))]) as seam, seam.forward():
        run()
    assert seam.coverage()["calls"] == 2


def test_compiled_modules_are_refused():
    net, run = clip()
    sites = find_sites(net, run)
    net.encoder.layers[1].compile(backend="eager")
    with pytest.raises(NotSupported, match="layers.1 is compiled"):
        AttentionSeam(net, sites, [Tap(observe=print)]).__enter__()
    AttentionSeam(net, sites[:1], [Tap(observe=print)]).__enter__().__exit__(None, None, None)
    with pytest.raises(NotSupported, match="compiled"):
        AttentionSeam(torch.compile(Net(), backend="eager"), [site("_orig_mod.a")], [Tap(observe=print)]).__enter__()


def test_cached_blocks_are_refused_until_the_cache_is_off():
    from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig

    broadcast = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )
    for config in (FirstBlockCacheConfig(threshold=0.1), broadcast):
        net, run = flux()
        sites, plain = find_sites(net, run), run()
        net.enable_cache(config)
        with pytest.raises(NotSupported, match="diffusers hook .* may skip attention.*disable_cache"):
            AttentionSeam(net, sites, [Tap(observe=print)]).__enter__()
        net.disable_cache()
        with AttentionSeam(net, sites, [Tap(observe=lambda c: None)]) as seam, seam.forward():
            assert torch.equal(run(), plain)


class _Stale(ModelHook):
    """Answers every call but the first with what it answered then, as caches do."""

    kept: Any = None

    def new_forward(self, module, *args, **kwargs):
        self.kept = self.fn_ref.original_forward(*args, **kwargs) if self.kept is None else self.kept
        return self.kept


@pytest.mark.parametrize("path", ["", "transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.norm"])
def test_a_cache_anywhere_is_refused(path):
    """Above an attention, below it, where it is computed in vain, and beside it."""
    net, run = flux()
    sites = find_sites(net, run)
    registry = HookRegistry.check_if_exists_or_initialize(net.get_submodule(path))
    registry.register_hook(_Stale(), "stale")
    run()
    with pytest.raises(NotSupported, match=f"'stale' on {path or 'FluxTransf'}.*may skip attention.*disable_cache"):
        AttentionSeam(net, sites[:1], [Tap(observe=print)]).__enter__()
    registry.remove_hook("stale")
    assert torch.equal(attach(net, run), run())


@pytest.mark.parametrize("how", ["forward", "module"])
def test_a_block_that_answers_from_memory_is_named(how):
    """As DeepCache does it: another forward of a block, or another block around it."""
    net, run = flux()
    sites = find_sites(net, run)
    block, kept = net.transformer_blocks[0], []

    def cached(*args, **kwargs):
        kept.append(kept[0] if kept else own(*args, **kwargs))
        return kept[-1]

    own = block.forward
    if how == "forward":
        block.forward = cached
    else:
        net.transformer_blocks[0] = Net()
        net.transformer_blocks[0].add_module("attn", block.attn)
        net.transformer_blocks[0].forward = cached
    with AttentionSeam(net, sites, [Tap(observe=lambda c: None)]) as seam:
        with seam.forward():
            run()
        with pytest.raises(NoMatch, match="transformer_blocks.0.attn did not run.*cache or a wrapper"), seam.forward():
            run()


def test_eager_transformers_attention_is_refused():
    net, run = clip()
    sites = find_sites(net, run)
    net.set_attn_implementation("eager")
    with pytest.raises(NotSupported, match=r"attention implementation 'eager'.*set_attn_implementation\('sdpa'\)"):
        AttentionSeam(net, sites, [Tap(observe=print)]).__enter__()


def test_gradient_checkpointing_is_refused_only_with_gradients():
    net, run = unet()
    sites = find_sites(net, run)
    net.enable_gradient_checkpointing()
    with AttentionSeam(net, sites, [Tap(observe=lambda c: None)]) as seam:
        with pytest.raises(NotSupported, match="gradient checkpointing"), seam.forward():
            run()
        with torch.no_grad(), seam.forward():
            run()


def test_nothing_is_kept_alive_after_detaching():
    import weakref

    args, _ = arguments("plain")
    net, kept = Net(), []
    through_seam(net, [Tap(observe=lambda c: kept.append(weakref.ref(c)))], args, {}, [site("a")])
    gc.collect()
    assert kept[0]() is None


# -- clips: frames or cells folded into the batch axis -----------------------------------------------------------------


def test_folded_frames_are_rows_of_their_sample():
    """Two samples of three frames at 2 x 5 cells: a picture layer sees rows (b f), a temporal layer rows (b h w)."""
    frames, grid, text = 3, (2, 5), 7
    picture = Site("a", "cross", grid, (0, text), (0, 10), K, "a", 0, frames)
    between = Site("b", "temporal", grid, None, (0, frames), K, "b", 1, frames)
    assert (picture.fold, between.fold, picture.cells) == (3, 10, 30)
    q, k = torch.randn(2, frames, K, 10, D), torch.randn(2, 1, K, text, D).expand(-1, frames, -1, -1, -1)
    folded, keys = q.flatten(0, 1), k.flatten(0, 1)
    across = q.permute(0, 3, 2, 1, 4).flatten(0, 1)  # (b n) k f d
    seen = {}

    def look(call):
        seen[call.site.path] = call.site.unfold(call.branch("cond").probs())

    net = Net()
    with AttentionSeam(net, [picture, between], [Tap(observe=look)]) as seam:
        with seam.forward(rows={"uncond": slice(0, 1), "cond": slice(1, 2)}):
            net.a(folded, keys, keys), net.b(across, across, across)
    probs, _ = explicit(q[1], k[1], k[1])  # frame by frame
    assert seen["a"].shape == (1, K, 30, text)
    torch.testing.assert_close(seen["a"][0], probs.transpose(0, 1).flatten(1, 2).float())
    probs, _ = explicit(across[10:], across[10:], across[10:])  # cell by cell: queries and keys are frames
    assert seen["b"].shape == (1, K, 30, frames)
    for f, cell in ((0, 0), (2, 9), (1, 4)):
        torch.testing.assert_close(seen["b"][0, :, f * 10 + cell], probs[cell, :, f].float())


def test_folding_that_does_not_fit_the_batch_is_refused():
    picture = Site("", "self", (2, 5), None, (0, 10), K, "a", 0, frames=3)
    q = torch.randn(4, K, 10, D)  # four rows are no two samples of three frames
    with pytest.raises(NotSupported, match="2 rows a sample, but 3 frames .* need 3"):
        through_seam(Bare(), [Tap(observe=print)], (q, q, q), {}, [picture], {"cond": slice(0, 2)})
    wrong = Site("", "temporal", (2, 5), None, (0, 4), K, "a", 0, frames=3)
    with pytest.raises(NotSupported, match="do not hold a grid of"):
        through_seam(Bare(), [Tap(observe=print)], (q, q, q), {}, [wrong])


# -- the public face of a call -----------------------------------------------------------------------------------------


def test_a_call_of_other_values_or_fewer_queries_is_a_call_of_its_own():
    q, k, v = qkv()
    call = Call(q, k, v, site=site(), module=nn.Identity())
    before = call.attend().clone()
    other = torch.randn_like(v)
    torch.testing.assert_close(call.with_values(other).attend(), F.scaled_dot_product_attention(q, k, other))
    some = call.of_queries(slice(3, 9))
    torch.testing.assert_close(some.attend(), before[:, :, 3:9])
    some.replace_probs(torch.zeros(B, K, 6, T))
    assert torch.equal(call.attend(), before) and call.q is q
    with pytest.raises(BadInput, match="expected"):
        call.replace_scores(torch.zeros(B, K, N, T + 1))


def test_nothing_but_the_call_touches_its_private_fields():
    private = {name for name in vars(Call(*qkv(), site=site(), module=nn.Identity())) if name[0] == "_"}
    private |= {name for name in vars(Call) if name[0] == "_" and name[1] != "_"}
    assert {"_probs", "_view"} <= private
    root = Path(sfumato.__file__).parent
    for path in sorted(root.rglob("*.py")):
        if path == root / "attention" / "call.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in private:
                owner = getattr(node.value, "id", None)
                assert owner in ("self", "cls"), f"{path}:{node.lineno} reaches into a Call: {node.attr}"
