from __future__ import annotations

import pytest
import torch

from alignkit.errors import RecipeError
from alignkit.objectives.buffer import SelectiveBuffer


def test_only_groups_with_a_signal_are_kept_and_the_oldest_leave_first() -> None:
    buffer: SelectiveBuffer[str] = SelectiveBuffer(capacity=3, rounds=9)
    buffer.add(["a", "flat", "b"], [0.5, 0.0, 0.2], step=0)
    buffer.add(["c", "d"], [0.1, 0.9], step=1)
    assert [k.item for k in buffer.kept] == ["b", "c", "d"]
    assert [k.step for k in buffer.kept] == [0, 1, 1]


def test_a_group_older_than_the_bound_is_never_used() -> None:
    buffer: SelectiveBuffer[str] = SelectiveBuffer(capacity=8, rounds=2)
    buffer.add(["old"], [1.0], step=0)
    rng = torch.Generator().manual_seed(0)
    assert [k.item for k in buffer.draw(1, 2, rng)] == ["old"]
    assert buffer.draw(1, 3, rng) == []
    buffer.add(["new"], [1.0], step=3)
    assert [k.item for k in buffer.kept] == ["new"]


def test_groups_are_drawn_without_repetition_in_proportion_to_their_advantage() -> None:
    buffer: SelectiveBuffer[int] = SelectiveBuffer(capacity=8, rounds=2)
    buffer.add([0, 1, 2], [1.0, 2.0, 5.0], step=0)
    rng = torch.Generator().manual_seed(0)
    counts = [0, 0, 0]
    for _ in range(4000):
        counts[buffer.draw(1, 1, rng)[0].item] += 1
    for count, share in zip(counts, (0.125, 0.25, 0.625)):
        assert count / 4000 == pytest.approx(share, abs=0.02)
    assert sorted(k.item for k in buffer.draw(9, 1, rng)) == [0, 1, 2]


def test_a_buffer_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match="0 groups for 3 rounds"):
        SelectiveBuffer(0, 3)
