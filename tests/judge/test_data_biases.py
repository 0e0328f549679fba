"""Data biases where the rules of the sets are known: pictures of two halves, a set that paints the left one red."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import sfumato
from sfumato.errors import BadInput, BadWeights, NotSupported, UnknownName
from sfumato.judge.data_biases import DataBiases, fit_projection, load_projection, pair_bias
from sfumato.models.nets.vector_ae import VectorAutoencoder
from sfumato.translation.networks import Network
from sfumato.translation.reading import CodeReader
from sfumato.translation.translator import FlowParams, fit_translator

FLOW = FlowParams(blocks=3, hidden=32, depth=1, steps=110, batch=96, lr=1e-2)
SIDE = 8


def halves(colours: torch.Tensor) -> torch.Tensor:
    left, right = colours.unflatten(1, (2, 3)).unbind(1)
    return torch.cat([each[:, :, None, None].expand(-1, -1, SIDE, SIDE // 2) for each in (left, right)], 3)


def colours_of(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[..., : SIDE // 2].mean((2, 3)), x[..., SIDE // 2 :].mean((2, 3))], 1)


NETWORK = Network("halves", "code", SIDE, lambda x: (colours_of(x), torch.full((len(x), 6), 0.02)), halves)
WORDS = {"left": ["dark", "light"], "right": ["dark", "light"]}


def drawn(n: int, seed: int, light: float = 0.5) -> torch.Tensor:
    """Colours (n 6): halves of mean -0.5 or 0.5, the left one light with a probability, the right one evenly."""
    rng = torch.Generator().manual_seed(seed)
    left = (torch.rand(n, 1, generator=rng) < light).float() - 0.5
    right = (torch.rand(n, 1, generator=rng) < 0.5).float() - 0.5
    return torch.cat([left.expand(-1, 3), right.expand(-1, 3)], 1) + 0.12 * torch.randn(n, 6, generator=rng)


def labels_of(colours: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"left": (colours[:, :3].mean(1) > 0).long(), "right": (colours[:, 3:].mean(1) > 0).long()}


@pytest.fixture(scope="module")
def found():
    """Neutral, biased (the left half is always light), tinted (0.3 more blue everywhere)."""
    tint = torch.tensor([0.0, 0.0, 0.3] * 2)
    sets = {"neutral": drawn(700, 0), "biased": drawn(700, 1, light=1.0), "tinted": drawn(700, 2) + tint}
    projection = fit_projection(NETWORK, {name: halves(each) for name, each in sets.items()}, FLOW)
    z = torch.cat(list(sets.values()))
    truth = [labels_of(each - (tint if name == "tinted" else 0)) for name, each in sets.items()]
    labels = {c: torch.cat([each[c] for each in truth]) for c in WORDS}
    return projection, sets, CodeReader.fitted(z, labels, steps=150, hidden=32)


def test_a_style_is_added_and_content_kept(found):
    projection, sets, _ = found
    x = sets["neutral"][:200]
    out = projection.codes(x, "neutral", "tinted")
    assert (out - x)[:, [2, 5]].mean() == pytest.approx(0.3, abs=0.06)
    assert (out - x)[:, [0, 1, 3, 4]].abs().mean() < 0.12
    back = projection.codes(out, "tinted", "neutral")
    assert torch.allclose(back, x, atol=1e-3)
    moved = projection.animate(halves(x[:2]), "neutral", "tinted", steps=3)
    assert torch.allclose(colours_of(moved[:, 2]), out[:2].clamp(-1, 1), atol=1e-4)
    assert torch.allclose(colours_of(moved[:, 0]), x[:2], atol=1e-5)


def test_the_report_tells_style_from_content(found):
    projection, sets, reader = found
    assert min(reader.accuracy.values()) > 0.9
    tint = pair_bias(projection, sets, "neutral", "tinted", reader, WORDS)
    bias = pair_bias(projection, sets, "neutral", "biased", reader, WORDS)
    assert tint.style > 0.04 and max(tint.changed.values()) < 0.12
    assert bias.changed["left"] > 0.35 and bias.after["left"]["light"] > 0.85 and bias.before["left"]["light"] < 0.6
    assert bias.own["left"]["light"] > 0.95 and bias.distance["left"] < 0.15
    assert bias.skews[0][:4] in {
        (
            "right",
            s,
            "left",
            t,
        )
        for s in ("dark", "light")
        for t in ("dark", "light")
    }
    assert any("content changes: left in" in line for line in bias.lines())


def test_what_a_set_has_nothing_of_is_named(found):
    projection, sets, reader = found
    bias = pair_bias(projection, sets, "neutral", "biased", reader, WORDS)
    assert bias.missing["left"]["dark"] > 0.8 > 0.2 > bias.missing["left"]["light"]
    assert any("left without counterpart: dark" in line for line in bias.lines())
    back = pair_bias(projection, sets, "biased", "neutral", reader, WORDS, projection.unseen["biased"])
    assert back.unusual < 0.05  # the neutral set has all that the biased one has, if less often
    ratio = projection.log_ratio(sets["neutral"], "neutral", "biased")
    assert torch.allclose(ratio, -projection.log_ratio(sets["neutral"], "biased", "neutral"))
    dark = reader.read(sets["neutral"])["left"] == WORDS["left"].index("dark")
    assert ratio[dark].median() > 1 > ratio[~dark].median()


def test_pictures_that_fitting_left_out_are_asked_for_counterparts(found, monkeypatch):
    projection, sets, reader = found
    assert sum(map(len, projection.unseen.values())) == min(500, sum(map(len, sets.values())) // 10)
    assert all(0 <= int(rows.min()) and int(rows.max()) < len(sets[name]) for name, rows in projection.unseen.items())
    asked = []

    def flagged(z, source, target):
        asked.append(z)
        return torch.ones(len(z), dtype=torch.bool)

    monkeypatch.setattr(projection, "without_counterpart", flagged)
    rows = projection.unseen["neutral"]
    bias = pair_bias(projection, sets, "neutral", "biased", reader, WORDS, rows)
    assert torch.equal(asked[0], sets["neutral"][rows]) and bias.unusual == 1.0


def test_rows_that_are_called_unseen_took_no_part_in_the_fit(monkeypatch):
    sets = {"one": halves(drawn(100, 5)), "two": halves(drawn(60, 6))}
    codes = {name: (torch.arange(len(x), dtype=torch.float)[:, None] + offset + torch.rand(len(x), 3), None)
             for (name, x), offset in zip(sets.items(), (0.0, 1000.0), strict=True)}  # fmt: skip
    kept = {}

    def watched(z, *args, **given):
        kept["fitted"] = z[: len(z) - max(2, len(z) // 10)]
        return fit_translator(z, *args, **given)

    monkeypatch.setattr("sfumato.judge.data_biases.projection.fit_translator", watched)
    projection = fit_projection(NETWORK, sets, FlowParams(**FLOW.model_dump() | {"steps": 2}), codes=codes)
    left = torch.cat([codes[name][0][rows] for name, rows in projection.unseen.items()])
    assert len(left) + len(kept["fitted"]) == 160
    assert not (left[:, None] == kept["fitted"][None]).all(2).any()


def test_two_samples_of_one_set_are_left_as_they_are():
    sets = {"one": halves(drawn(500, 5)), "two": halves(drawn(500, 6))}
    projection = fit_projection(NETWORK, sets, FlowParams(**FLOW.model_dump() | {"steps": 60}))
    x = drawn(200, 7)
    assert (projection.codes(x, "one", "two") - x).abs().mean() < 0.1


def test_one_residual_gives_aligned_pictures_of_every_set(found):
    projection = found[0]
    aligned = projection.aligned(40, seed=2)
    apart = colours_of(aligned["tinted"]) - colours_of(aligned["neutral"])
    assert apart[:, 2].mean() == pytest.approx(0.3, abs=0.1) and set(aligned) == {"neutral", "biased", "tinted"}


def test_files_hold_the_projection(found, tmp_path):
    projection, sets, _ = found
    again = load_projection(projection.save(tmp_path / "flow"), NETWORK)
    assert again.sets == projection.sets
    x = sets["neutral"][:5]
    assert torch.equal(again.codes(x, "neutral", "biased"), projection.codes(x, "neutral", "biased"))
    fit_translator(torch.randn(64, 4), steps=1, blocks=1).translator.save(tmp_path / "plain")
    with pytest.raises(BadWeights, match="names no data sets"):
        load_projection(tmp_path / "plain", NETWORK)


def test_sets_that_cannot_be_compared_are_refused(found):
    projection = found[0]
    with pytest.raises(BadInput, match="two data sets or more"):
        fit_projection(NETWORK, {"one": halves(drawn(50, 0))}, FLOW)
    with pytest.raises(BadInput, match="holds 10 pictures"):
        fit_projection(NETWORK, {"one": halves(drawn(50, 0)), "two": halves(drawn(10, 1))}, FLOW)
    with pytest.raises(UnknownName, match="neutral"):
        projection.codes(drawn(2, 0), "neutrl", "biased")
    with pytest.raises(BadInput, match="2 steps"):
        projection.animate(halves(drawn(2, 0)), "neutral", "biased", steps=1)


def folder(path: Path, n: int, **columns) -> Path:
    path.mkdir()
    rows = []
    for i in range(n):
        Image.new("RGB", (20, 20), (i % 7 * 30, 90, i % 3 * 80)).save(path / f"{i}.png")
        rows.append({"file_name": f"{i}.png", **{k: v(i) for k, v in columns.items()}})
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


def test_sets_are_judged_from_the_public_face(tmp_path):
    torch.manual_seed(0)
    VectorAutoencoder(16, (8, 8), 10).save_pretrained(tmp_path / "ae")
    by = f"data_biases:autoencoder={tmp_path / 'ae'},blocks=1,hidden=8,steps=2,batch=16,pictures=40"
    one = folder(tmp_path / "photos", 40, hue=lambda i: "ab"[i % 2], tag=lambda i: "only")
    two = folder(tmp_path / "paintings", 40, hue=lambda i: "abc"[i % 3], tag=lambda i: "mine")
    report = sfumato.judge(one, two, by=f"{by},concepts=[hue]", out=tmp_path / "out")
    assert [(pair.source, pair.target) for pair in report.pairs] == [("photos", "paintings"), ("paintings", "photos")]
    assert sum(report.pairs[0].after["hue"].values()) == pytest.approx(1)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"data_biases.json", "data_biases.png", "flow"}
    plain = sfumato.judge([one, two, "toybox:biased"], by=by)
    assert len(plain.pairs) == 6 and plain.pairs[0].changed == {}
    for sets, told, kind in (
        ([one, two], "no value of 'tag' in common", BadInput),
        ([one, one], "called 'photos'", BadInput),
        ([one], "two data sets or more", BadInput),
        ([one, folder(tmp_path / "few", 10)], "holds 10 pictures", BadInput),
        ([one, "toybox:baised"], "set of the toybox", UnknownName),
    ):
        with pytest.raises(kind, match=told):
            DataBiases(autoencoder=str(tmp_path / "ae"), concepts=["tag"] if "tag" in told else []).judge_sets(sets)
    with pytest.raises(BadInput, match="metrics cannot be given"):
        sfumato.judge(one, two, by=by, metrics=["frechet"])
    with pytest.raises(NotSupported, match="daam judges no pictures"):
        sfumato.judge(one, two, by="daam")
    with pytest.raises(BadInput, match="by a system"):
        sfumato.judge([one, two])
