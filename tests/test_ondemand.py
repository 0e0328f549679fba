"""Arrays made row by row: what is read is right, nothing is made twice, and stopping loses nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sfumato.ondemand import PART, Spec, Store


class Squares:
    """Makes i and i squared, and remembers what it was asked for."""

    def __init__(self, folder: Path, n: int):
        self.calls: list[np.ndarray] = []
        specs = {
            "plain": Spec(folder / "out" / "plain.npy", (), np.int64),
            "square": Spec(folder / "out" / "square.npy", (2,), np.float32),
        }
        self.store = Store(n, specs, folder / "out.unfinished", self.make)

    def make(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        self.calls.append(rows)
        return {"plain": rows, "square": np.stack([rows.astype(np.float32) ** 2] * 2, 1)}

    @property
    def made(self) -> list[int]:
        return np.concatenate(self.calls).tolist() if self.calls else []


def test_rows_are_made_once_when_they_are_read(tmp_path: Path) -> None:
    n = 2 * PART + 10
    squares = Squares(tmp_path, n)
    rows = squares.store.rows("square")
    assert len(rows) == n and rows.shape == (n, 2) and rows.dtype == np.float32 and not squares.calls
    wanted = np.array([130, 3, 100, 3])
    assert (rows[wanted] == wanted[:, None] ** 2.0).all()
    # the wanted ones, filled up with the next that are missing; the last part has its own size
    assert [len(call) for call in squares.calls] == [PART, 10]
    assert {3, 100} <= set(squares.calls[0].tolist()) and sorted(squares.calls[1].tolist()) == list(range(2 * PART, n))
    assert rows[5].tolist() == [25, 25] and rows[0:4, 1].tolist() == [0, 1, 4, 9] and rows[-1, 0] == (n - 1) ** 2
    assert len(squares.calls) == 2
    assert not (tmp_path / "out").exists()
    assert (np.asarray(rows)[:, 0] == np.arange(n) ** 2.0).all()
    assert sorted(squares.made) == list(range(n))  # each once
    assert (np.load(tmp_path / "out" / "plain.npy") == np.arange(n)).all() and not (
        tmp_path / "out.unfinished"
    ).exists()
    again = Squares(tmp_path, n)
    assert not again.store.missing.any() and isinstance(again.store.arrays["plain"], np.memmap) and not again.calls


def test_stopping_loses_nothing_and_others_see_what_is_made(tmp_path: Path) -> None:
    n = 3 * PART
    first, beside = Squares(tmp_path, n), Squares(tmp_path, n)
    first.store.rows("plain")[np.arange(PART)]
    assert (beside.store.rows("plain")[np.arange(PART)] == np.arange(PART)).all() and not beside.calls
    second = Squares(tmp_path, n)  # as after a stop
    told: list[tuple[int, int]] = []
    second.store.fill(lambda *at: told.append(at))
    assert sorted(second.made) == list(range(PART, n)) and told[-1] == (n, n)
    assert (beside.store.rows("plain")[:] == np.arange(n)).all() and not beside.calls


def test_a_failure_leaves_rows_missing_and_another_size_starts_anew(tmp_path: Path) -> None:
    squares = Squares(tmp_path, 10)

    def fail(rows: np.ndarray) -> dict[str, np.ndarray]:
        raise RuntimeError("no")

    squares.store.make = fail
    with pytest.raises(RuntimeError):
        squares.store.rows("plain")[2]
    assert squares.store.missing.all()
    longer = Squares(tmp_path, 12)
    assert longer.store.rows("plain")[11] == 11 and len(longer.calls[0]) == 12


def test_nothing_else_missing_is_filled_with_repetitions(tmp_path: Path) -> None:
    squares = Squares(tmp_path, PART + 1)
    squares.store.rows("plain")[1 : PART + 1]
    assert [len(call) for call in squares.calls] == [PART, 1]
    assert (squares.store.rows("plain")[:] == np.arange(PART + 1)).all()
