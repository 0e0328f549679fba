"""SaD and PaD against scipy's densities, discrete truth, planted imbalances; HCS against loops."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import gaussian_kde, spearmanr

from sfumato.bench.judge import judge_folder
from sfumato.errors import BadInput, NoMatch
from sfumato.judge.sad_pad import SadPad, attribute_embeddings, find_attributes, plots
from sfumato.metrics import sad_pad
from sfumato.metrics.sad_pad import Lattice, auroc, divergence, hcs, kl
from sfumato.models.readers import load_clip


def test_hcs_against_loops():
    rng = np.random.default_rng(0)
    x, a = rng.normal(size=(5, 7)) + 3, rng.normal(size=(4, 7)) - 2
    cx, ca = x[:3].mean(0), a.mean(0)
    got = hcs(x, a, cx, ca)
    for i in range(5):
        for k in range(4):
            u, v = x[i] - cx, a[k] - ca
            assert got[i, k] == pytest.approx(100 * u @ v / np.linalg.norm(u) / np.linalg.norm(v))
    assert got.min() < 0 < got.max()  # centring is what makes the sign mean something


def test_the_template_is_centred_away_except_in_the_reference(clip_folder):
    clip = load_clip(clip_folder)
    names = ["red", "blue", "cube"]
    written, centre = attribute_embeddings(clip, names, "a photo of {}")
    assert np.allclose(centre, written.mean(0)) and np.allclose(
        written, clip.text_features([f"a photo of {n}" for n in names])
    )
    same, code = attribute_embeddings(clip, names, "a photo of {}", reference=True)
    assert np.array_equal(same, written) and np.allclose(code, clip.text_features(names).mean(0))
    assert not np.allclose(code, centre)


# --- densities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [60, 1000])
def test_densities_are_scipys(n):
    rng = np.random.default_rng(n)
    line = np.concatenate([rng.normal(-3, 1, n // 2), rng.normal(4, 2, n // 2)])[:, None]
    lattice = Lattice(line, n ** (-1 / 5), 512)
    ours = lattice.density(lattice.total, np.cov(line.T))
    nodes = lattice.low[0] + lattice.step[0] * np.arange(512)
    theirs = gaussian_kde(line[:, 0])(nodes) * lattice.step[0]
    assert theirs.sum() > 0.999  # the mass inside the window
    assert np.abs(ours - theirs / theirs.sum()).max() < 0.01 * theirs.max()


def test_joint_densities_are_scipys():
    rng = np.random.default_rng(1)
    points = rng.normal(size=(300, 2)) @ np.array([[2.0, 1.5], [0.0, 0.5]])
    lattice = Lattice(points, 300 ** (-1 / 6), 96)
    ours = lattice.density(lattice.total, np.cov(points.T))
    axes = [lattice.low[k] + lattice.step[k] * np.arange(96) for k in range(2)]
    grid = np.stack([part.ravel() for part in np.meshgrid(*axes, indexing="ij")])
    theirs = gaussian_kde(points.T)(grid).reshape(96, 96)
    theirs /= theirs.sum()
    assert np.abs(ours - theirs).max() < 0.02 * theirs.max()
    assert kl(ours, theirs) < 1e-3


def test_the_figure_is_what_the_authors_print():
    """The mean over 10,000 grid points of p log(p / q), times 1e7, of scipy's densities on their window."""
    rng = np.random.default_rng(2)
    x, y = rng.normal(0, 5, 400), rng.normal(3, 6, 400)
    grid = np.linspace(-35, 35, 10_000)
    p, q = (gaussian_kde(side)(grid) * 70 / 10_000 + 1e-10 for side in (x, y))
    printed = (p * np.log(p / q)).mean() * 1e7
    got = divergence(x[:, None], y[:, None], ["a"], draws=0)
    assert got.sad == pytest.approx(printed, rel=0.03)


def test_constant_and_discrete_scores_have_densities():
    rng = np.random.default_rng(3)
    constant = np.column_stack([np.ones(50), rng.integers(0, 2, 50), rng.integers(0, 2, 50)]).astype(float)
    constant[:, 2] = constant[:, 1]  # a singular pair
    got = divergence(constant, constant, ["constant", "binary", "copy"], draws=5)
    assert got.sad == pytest.approx(0, abs=1e-6) and got.pad == pytest.approx(0, abs=1e-6)
    assert not any(each.shifted for each in got.attributes)


def test_auroc_against_pairs():
    rng = np.random.default_rng(4)
    scores, truth = rng.integers(0, 5, 40).astype(float), rng.integers(0, 2, 40).astype(float)
    yes, no = scores[truth == 1], scores[truth == 0]
    slow = np.mean([(a > b) + 0.5 * (a == b) for a in yes for b in no])
    assert auroc(scores, truth) == pytest.approx(slow)
    truth[3] = np.nan
    assert auroc(np.delete(scores, 3), np.delete(truth, 3)) == auroc(scores, truth)
    assert auroc(scores, np.ones(40)) is None


# --- planted truth ---------------------------------------------------------------------------------------------------

COLORS = ("red", "green", "blue")
SHAPES = ("cube", "ball", "cone")


def drawn(n, seed, red=1 / 3, tied=False):
    """0/1 scores with a little noise of n toys: (n, 6) for three colours and three shapes, independent or tied."""
    rng = np.random.default_rng(seed)
    rest = (1 - red) / 2
    color = rng.choice(3, n, p=(red, rest, rest))
    shape = rng.choice(3, n)
    if tied:  # the same marginals, but every red toy is a cube as far as there are cubes
        order = np.argsort(np.where(color == 0, 0, 1), kind="stable")
        shape = np.sort(rng.permutation(np.arange(n) % 3))
        tied_shape = np.empty(n, int)
        tied_shape[order] = shape
        shape = tied_shape
    rows = np.concatenate([np.eye(3)[color], np.eye(3)[shape]], 1)
    return rows + 0.1 * rng.normal(size=rows.shape)


NAMES = [*COLORS, *SHAPES]


def test_a_planted_imbalance_is_ranked_first_with_its_sign():
    real = drawn(600, 0)
    sads = []
    for red in (1 / 3, 0.45, 0.6, 0.75):
        got = divergence(real, drawn(600, 1, red), NAMES, pairs=False, draws=30)
        sads.append(got.sad)
        if red > 0.4:
            first = got.attributes[0]
            assert first.name == "red" and first.shifted and first.gap.low > 0 and got.sad > got.sad_null
            assert {each.name for each in got.attributes if each.gap.high < 0} >= {"green", "blue"}
        else:
            assert got.sad < got.sad_null * 1.3
    assert sads == sorted(sads)


def test_the_ranking_is_that_of_the_exact_divergences():
    rng = np.random.default_rng(5)
    shares, others = rng.uniform(0.2, 0.8, 8), rng.uniform(0.2, 0.8, 8)
    real, fake = ((rng.random((3000, 8)) < p) + 0.1 * rng.normal(size=(3000, 8)) for p in (shares, others))
    exact = shares * np.log(shares / others) + (1 - shares) * np.log((1 - shares) / (1 - others))
    names = [str(k) for k in range(8)]
    got = {each.name: each.kl for each in divergence(real, fake, names, pairs=False, draws=0).attributes}
    assert spearmanr([got[name] for name in names], exact).statistic >= 0.9
    assert [got[name] for name in names] == pytest.approx(1000 * exact, rel=0.35, abs=12)


def test_pairs_see_what_single_attributes_cannot():
    real, fake = drawn(600, 0), drawn(600, 1, tied=True)
    got = divergence(real, fake, NAMES, draws=30)
    assert not any(each.shifted for each in got.attributes if each.kl > 3 * each.null)
    first = got.pairs[0]
    assert {first.first, first.second} == {"red", "cube"} and first.shifted and first.p < 0.05
    assert got.pad > 5 * got.pad_null or first.excess > 5 * first.null
    # colours among themselves are combined as ever
    assert all(not pair.excess > 3 * pair.null for pair in got.pairs if {pair.first, pair.second} <= set(COLORS))


def test_a_shifted_attribute_does_not_light_up_its_pairs():
    got = divergence(drawn(600, 0), drawn(600, 1, 0.7), NAMES, draws=20)
    shapes = [pair for pair in got.pairs if pair.first == "red" and pair.second in SHAPES]
    for pair in shapes:  # independent: the pair's divergence is what its two attributes say
        assert pair.kl > 100 and pair.excess < 0.25 * pair.kl


def test_chance_alone_is_called_chance():
    hits = []
    for seed in range(6):
        got = divergence(drawn(150, seed), drawn(100, 100 + seed), NAMES, pairs=False, draws=40)
        hits += [each.shifted for each in got.attributes]
    assert np.mean(hits) <= 0.2  # 5 % expected of 36


def test_divergence_is_reproducible_and_refuses():
    real, fake = drawn(60, 0), drawn(40, 1)
    one, two = (divergence(real, fake, NAMES, draws=5, seed=3).to_json() for _ in range(2))
    assert one == two and one != divergence(real, fake, NAMES, draws=5, seed=4).to_json()
    with pytest.raises(BadInput, match="at least 20 pictures on each side; got 19 and 40"):
        divergence(real[:19], fake, NAMES)
    with pytest.raises(BadInput, match="2 attributes, but scores of 6"):
        divergence(real, fake, ["a", "b"])
    with pytest.raises(BadInput, match="not finite"):
        divergence(real * np.nan, fake, NAMES)


def test_unreadable_attributes_come_last():
    rng = np.random.default_rng(6)
    real, fake = rng.normal(size=(200, 2)), rng.normal(size=(200, 2)) + [3, 0.5]
    mentions = np.column_stack([rng.integers(0, 2, 200), real[:, 1] > 0]).astype(float)
    got = divergence(real, fake, ["noise", "read"], pairs=False, draws=5, mentions=mentions)
    assert [each.name for each in got.attributes] == ["read", "noise"]
    assert got.attributes[0].auroc == 1 and not got.attributes[1].readable


# --- attributes, parameters, folders ---------------------------------------------------------------------------------


def test_attributes_are_found_in_captions():
    captions = ["a red striped cube on the grass", "a blue ball on the grass", "a red ball on the grass",
                "a green cone"] * 3  # fmt: skip
    assert find_attributes(captions, 4) == ["grass", "ball", "red", "blue"]
    assert "striped" in find_attributes(captions) and "the" not in find_attributes(captions)
    with pytest.raises(NoMatch, match="no attribute occurs"):
        find_attributes(["of the"] * 3)


def test_parameters():
    assert SadPad().params.template == "a photo of {}"
    for wrong in ("no place", "{} and {}", "{x} {}"):
        with pytest.raises(BadInput, match="template of sad_pad"):
            SadPad(template=wrong)


def test_plots_are_pictures():
    got = divergence(drawn(60, 0), drawn(40, 1), NAMES, draws=3)
    drawn_plots = plots(got)
    assert set(drawn_plots) == {"attributes", "densities", "pairs"}
    assert all(min(image.size) > 50 and len(image.getcolors(1 << 20)) > 3 for image in drawn_plots.values())
    assert set(plots(divergence(drawn(60, 0), drawn(40, 1), NAMES, pairs=False, draws=0))) == {
        "attributes",
        "densities",
    }


def test_two_folders(renders, others, clip_folder, tmp_path):
    options = {"metrics": ["attributes"], "clip": str(clip_folder), "draws": 3}
    report = judge_folder(others, renders, attributes=["red", "blue", "cube"], out=tmp_path / "out", **options)
    stored = report.data["sad_pad"]
    assert {each["name"] for each in stored["attributes"]} == {"red", "blue", "cube"} and len(stored["pairs"]) == 3
    assert (stored["real"], stored["fake"]) == (40, 30) and all(
        each["auroc"] is not None for each in stored["attributes"]
    )
    assert (tmp_path / "out" / "report-attributes.png").is_file() and report["SaD"] > 0 and report["PaD"] > 0
    oracle = judge_folder(others, renders, attributes=["red", "blue", "cube"], oracle=True, **options)
    assert all(each["auroc"] is None for each in oracle.data["sad_pad"]["attributes"])
    with pytest.raises(NoMatch, match="attribute 'zebra' occurs in no caption .* frequent there: .*--no-captions"):
        judge_folder(others, renders, attributes=["red", "zebra"], **options)
    with pytest.raises(BadInput, match="no toy is described by 'zebra'"):
        judge_folder(others, renders, attributes=["zebra"], oracle=True, captions=False, **options)
    found = judge_folder(others, renders, attributes=["captions"], pairs=False, **options)
    assert "red" in {each["name"] for each in found.data["sad_pad"]["attributes"]}
    assert sad_pad.SCALE == 1000
