"""Alignment of two prompts: against brute force, on the token axes of every text encoder, and where it must refuse."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from sfumato.errors import BadInput, NoMatch
from sfumato.text.align import align, best_mode, equaliser, gate, global_alignment
from sfumato.text.words import Words
from tests.tiny import tiny_model

KINDS = ["sd", "sd2", "sdxl", "sd3", "sd3clip", "flux"]
ONE_TO_ONE = ("a red cube on the left", "a blue ball on the left")  # one token for one, in every tokenizer
LONGER = ("a red cube, and a cat", "a green cube, and a dog")  # "green" is four tokens in CLIP
SHORTER = LONGER[::-1]


def words_of(kind):
    model = tiny_model(kind)
    return Words(model), model.text_length


def longest_common_subsequence(a, b):
    """Brute force: the largest set of increasing pairs of equal elements."""
    for size in range(min(len(a), len(b)), 0, -1):
        for i in itertools.combinations(range(len(a)), size):
            for j in itertools.combinations(range(len(b)), size):
                if all(a[x] == b[y] for x, y in zip(i, j, strict=True)):
                    return size
    return 0


def test_global_alignment_is_a_longest_common_subsequence():
    rng = random.Random(0)
    for _ in range(60):
        a, b = ([rng.randrange(4) for _ in range(rng.randrange(7))] for _ in range(2))
        partners = global_alignment(a, b)
        pairs = [(i, j) for j, i in enumerate(partners) if i is not None]
        assert len(pairs) == longest_common_subsequence(a, b)
        assert all(a[i] == b[j] for i, j in pairs)
        assert all(x[0] < y[0] and x[1] < y[1] for x, y in itertools.pairwise(pairs))


def test_of_equally_good_alignments_the_first_target_is_taken():
    assert global_alignment("ab", "abb") == [0, 1, None]
    assert global_alignment("abc", "") == [] and global_alignment("", "ab") == [None, None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["replace", "refine"])
def test_the_same_prompt_stands_for_itself(kind, mode):
    words, length = words_of(kind)
    assert align(words, LONGER[0], LONGER[0], mode, length).identity


@pytest.mark.parametrize("kind", KINDS)
def test_swaps_of_one_token_for_one_are_the_identity(kind):
    words, length = words_of(kind)
    assert align(words, *ONE_TO_ONE, "replace", length).identity


def naive_replacement(words, source, target, length):
    """Column by column, from scratch: which source tokens a target token is made of, by walking both token lists."""
    matrix = torch.zeros(length, length)
    covered = torch.zeros(length, dtype=torch.bool)
    one, other = words.read(source), words.read(target)
    for stream in words.streams:
        if covered[stream.offset]:
            continue
        covered[stream.offset : stream.offset + stream.length] = True
        ours, theirs = one.streams[stream.name], other.streams[stream.name]

        def sequence(reading, read, name=stream.name):
            """Runs of token positions: one run per word, one per token that is in no word."""
            owner = {p: k for k, word in enumerate(reading.all()) for p in word.tokens[name]}
            runs = [[p] for p in read.special["<start>"]]
            last = None
            for p in range(read.first, read.first + len(read.spans)):
                if p in owner and owner[p] == last:
                    runs[-1].append(p)
                else:
                    runs.append([p])
                last = owner.get(p)
            return runs + [[p] for p in read.special["<end>"]] + [[p] for p in read.special["<pad>"]]

        a, b = sequence(one, ours), sequence(other, theirs)
        for k, run in enumerate(a):
            to = b[k] if k < len(b) else b[-1]
            for x, i in enumerate(run):
                for y, j in enumerate(to):
                    matrix[i, j] = float(x == y) if len(run) == len(to) else 1 / len(to)
    for p in range(length):
        if not covered[p]:
            matrix[p, p] = 1.0
    return matrix


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompts", [LONGER, SHORTER, ("green, big", "cube, small"), ONE_TO_ONE])
def test_replacement_equals_the_walk_over_both_prompts_and_loses_nothing(kind, prompts):
    words, length = words_of(kind)
    found = align(words, *prompts, "replace", length)
    torch.testing.assert_close(found.matrix, naive_replacement(words, *prompts, length))
    torch.testing.assert_close(found.matrix.sum(1), torch.ones(length))  # each token's attention arrives somewhere
    assert found.taken.all()


def test_columns_of_a_longer_word_share_the_sum():
    words, length = words_of("sd")
    source, target = words.read(LONGER[0]), words.read(LONGER[1])
    red, green = (words.one(p, w).positions for p, w in zip(LONGER, ("red", "green"), strict=True))
    assert (len(red), len(green)) == (1, 4)
    forward = align(words, *LONGER, "replace", length).matrix
    assert forward[red[0], list(green)].tolist() == [0.25] * 4
    back = align(words, *SHORTER, "replace", length).matrix
    assert back[list(green), red[0]].tolist() == [1.0] * 4
    # the tail, where the original goes by absolute position: the end is the end, also behind a longer word
    for name in ("<start>", "<end>"):
        i, j = (r.special()[name].positions[0] for r in (source, target))
        assert forward[i, j] == 1 and forward[:, j].sum() == 1
    cats = words.one(LONGER[0], "cat").positions[0], words.one(LONGER[1], "dog").positions[0]
    assert cats[0] != cats[1] and forward[cats] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_refinement_equals_brute_force_on_ids(kind):
    words, length = words_of(kind)
    source, target = "a cube on a ball", "a small cube on a red ball, left"
    found = align(words, source, target, "refine", length)
    one, other = words.read(source), words.read(target)
    for stream in words.streams:
        a, b = one.streams[stream.name], other.streams[stream.name]
        ids = [
            stream.tokenizer(stream.prepare(p)).input_ids[r.first - stream.offset :][: len(r.spans)]
            for p, r in ((source, a), (target, b))
        ]
        block = found.matrix[a.first : a.first + len(a.spans), b.first : b.first + len(b.spans)]
        assert int(block.sum()) == longest_common_subsequence(*ids) and set(block.unique().tolist()) <= {0.0, 1.0}
        taken = found.taken[b.first : b.first + len(b.spans)]
        assert torch.equal(taken, block.sum(0))
    for word in ("a#1", "cube", "ball", "on"):
        for i, j in zip(one.one(word).positions, other.one(word.replace("a#1", "a#1")).positions, strict=True):
            assert found.matrix[i, j] == 1
    for word in ("small", "red", "left"):
        positions = list(other.one(word).positions)
        assert not found.taken[positions].any() and not found.matrix[:, positions].any()


def test_filling_goes_on_side_by_side():
    words, length = words_of("sd")
    source, target = "a cube", "a red cube on a ball"
    found = align(words, source, target, "refine", length)
    ours, theirs = (words.read(p).special()["<pad>"].positions for p in (source, target))
    assert all(found.matrix[i, j] == 1 for i, j in zip(ours, theirs, strict=False))
    shorter = align(words, target, source, "refine", length)
    extra = list(ours[len(theirs) :])
    assert extra and not shorter.taken[extra].any()
    replaced = align(words, "green cube", "red cube", "replace", length)  # the target has more filling: it gets nothing
    extra = list(words.read("red cube").special()["<pad>"].positions)[-3:]
    assert replaced.taken[extra].all() and not replaced.matrix[:, extra].any()


@pytest.mark.parametrize("chunks", [0, 2])
def test_prompts_longer_than_a_window_lose_nothing(chunks):
    model = tiny_model("sd3", own_length=True)
    with model.in_chunks(chunks):
        words, length = Words(model), model.text_length
        long = "green " * 25 + "cube"  # 101 tokens, of which one window of CLIP reads 75; T5 reads them all
        found = align(words, long, long.replace("green", "red"), "replace", length)
        torch.testing.assert_close(found.matrix.sum(1), torch.ones(length))
        back = align(words, long.replace("green", "red"), long, "replace", length)
        torch.testing.assert_close(back.matrix.sum(1), torch.ones(length))


def test_the_mode_follows_the_number_of_words():
    words, length = words_of("sd")
    read = words.read
    assert best_mode(read("a red cube"), read("a green cube")) == "replace"
    assert best_mode(read("a cube"), read("a green cube")) == "refine"
    assert best_mode(read("!"), read("?")) == "refine"
    with pytest.raises(BadInput, match="equally many words.*has 2.*has 3.*refine"):
        align(words, "a cube", "a green cube", "replace", length)


def test_equaliser_and_gate():
    words, _ = words_of("sd")
    reading = words.read("a green cube and a cube")
    factors = equaliser(reading, {"cube": 3.0, "green": -2.0, "cube#2": 0.5}, 77)
    first, second = (span.positions[0] for span in reading.find("cube"))
    green = list(reading.one("green").positions)
    assert factors[first] == 3 and factors[second] == 0.5 and factors[green].tolist() == [-2.0] * 4
    assert factors.sum() == 77 - 6 + 3 + 0.5 - 8
    alpha = gate(reading, (0.0, 0.8), {"green": (0.2, 1.0)}, 77)
    on = torch.stack([alpha(i / 50) for i in range(50)])
    assert on[:, first].sum() == 40 and on[:40, first].all()
    assert on[:, green].sum() == 4 * 40 and on[10:, green].all()
    for broken in (
        lambda: equaliser(reading, {"cubes": 2.0}, 77),
        lambda: gate(reading, (0, 1), {"cubes": (0, 1)}, 77),
    ):
        with pytest.raises(NoMatch, match="Did you mean 'cube'"):
            broken()
