from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from alignkit.data import GroupSampler
from alignkit.errors import CheckpointError, RecipeError
from alignkit.types import Prompt


def prompts(count: int) -> list[Prompt]:
    return [Prompt("the same text", id=i) for i in range(count)]


def ids(sampler: GroupSampler, steps: int) -> list[list[int]]:
    return [[prompt.id for prompt in next(sampler)] for _ in range(steps)]


def flat(steps: Iterable[list[int]]) -> list[int]:
    return [one for step in steps for one in step]


def test_an_epoch_hands_out_every_prompt_once_and_epochs_differ_in_order() -> None:
    sampler = GroupSampler(prompts(12), 4, seed=0)
    first, second = ids(sampler, 3), ids(sampler, 3)
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(12))
    assert first != second


def test_a_step_never_holds_a_prompt_twice() -> None:
    sampler = GroupSampler(prompts(7), 3, seed=0)
    for step in ids(sampler, 50):
        assert len(set(step)) == 3


def test_prompts_left_over_in_one_epoch_come_in_others() -> None:
    assert set(flat(ids(GroupSampler(prompts(7), 3, seed=0), 20))) == set(range(7))


def test_the_seed_decides_the_sequence() -> None:
    one, same, other = (ids(GroupSampler(prompts(20), 5, seed=s), 8) for s in (1, 1, 2))
    assert one == same != other
    assert one[4:] != other[:4], "the next seed is not the next epoch"


def test_a_resumed_sampler_continues_as_if_it_had_not_stopped() -> None:
    sampler = GroupSampler(prompts(10), 3, seed=5)
    ids(sampler, 4)
    state = json.loads(json.dumps(sampler.state_dict()))
    expected = ids(sampler, 10)
    resumed = GroupSampler(prompts(10), 3, seed=5)
    resumed.load_state_dict(state)
    assert ids(resumed, 10) == expected


def test_reading_the_state_does_not_move_the_sampler() -> None:
    one, two = GroupSampler(prompts(10), 3, seed=5), GroupSampler(prompts(10), 3, seed=5)
    one.state_dict()
    assert ids(one, 3) == ids(two, 3)


def test_ranks_share_a_step_without_overlap_and_together_give_the_single_process() -> None:
    single = GroupSampler(prompts(13), 6, seed=2)
    ranks = [GroupSampler(prompts(13), 6, seed=2, rank=r, world_size=3) for r in range(3)]
    for expected in ids(single, 9):
        assert flat(ids(rank, 1)[0] for rank in ranks) == expected
    assert len({json.dumps(rank.state_dict()) for rank in ranks}) == 1


def test_prompts_that_changed_since_the_checkpoint_are_refused() -> None:
    state = GroupSampler(prompts(10), 3, seed=5).state_dict()
    changed = [*prompts(9), Prompt("another text", id=9)]
    with pytest.raises(CheckpointError, match="file was changed"):
        GroupSampler(changed, 3, seed=5).load_state_dict(state)


def test_a_folder_that_moved_is_no_change_of_the_prompts() -> None:
    one, two = ([Prompt("a", id=1, columns={"image": Path(root, "x.png")})] for root in ("/a", "/b"))
    GroupSampler(two, 1, seed=0).load_state_dict(GroupSampler(one, 1, seed=0).state_dict())


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (64, {"prompts_per_step": 50, "world_size": 8}, "prompts_per_step=50 .* 8 ranks; nearest: 48 or 56"),
        (64, {"prompts_per_step": 3, "world_size": 8}, "nearest: 8"),
        (4, {"prompts_per_step": 5}, "prompts_per_step=5 with 4 prompts; expected 1 to 4"),
        (4, {"prompts_per_step": 0}, "expected 1 to 4"),
        (4, {"prompts_per_step": 2, "rank": 2, "world_size": 2}, "rank=2"),
    ],
)
def test_a_step_that_cannot_be_made_is_refused_with_a_number_that_works(count, options, message) -> None:
    with pytest.raises(RecipeError, match=message):
        GroupSampler(prompts(count), seed=0, **options)


def test_prompts_with_the_same_id_are_refused() -> None:
    with pytest.raises(RecipeError, match="same id"):
        GroupSampler([Prompt("a", id=1), Prompt("b", id=1)], 1, seed=0)


def test_a_sampler_is_an_endless_iterator() -> None:
    for step, _ in enumerate(GroupSampler(prompts(2), 2, seed=0)):
        if step == 5:
            break
