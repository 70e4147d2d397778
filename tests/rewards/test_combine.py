from __future__ import annotations

import json
import math
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards import PerFrameMean, Weighted, in_micro_batches
from alignkit.rewards.deadline import deadline
from alignkit.rewards.threads import inherited
from alignkit.types import Prompt

PROMPTS = [Prompt("one", id=11), Prompt("two", id=12), Prompt("three", id=13), Prompt("four", id=14)]


def brightness_of(media, prompts):
    return media.mean(dim=(1, 2, 3))


def length(media, prompts):
    return [len(prompt) for prompt in prompts]


def not_for_two(media, prompts):
    return [None if prompt == "two" else 1.0 for prompt in prompts]


def nan_for_two(media, prompts):
    return [math.inf if prompt == "two" else 1.0 for prompt in prompts]


class FailingReward:
    """Raises on the batches that contain the prompt `three`."""

    name, kind, differentiable = "failing", "image", False

    def __call__(self, media, prompts):
        if "three" in prompts:
            raise ConnectionError("judge is down")
        return torch.ones(len(prompts))


@pytest.fixture
def media(rng: torch.Generator) -> torch.Tensor:
    return torch.rand(4, 3, 8, 8, generator=rng)


def test_the_total_is_the_weighted_sum_and_the_parts_stay_raw(media: torch.Tensor) -> None:
    scores = Weighted({brightness_of: 2.0, length: -0.5})(media, PROMPTS)
    bright, long = media.mean(dim=(1, 2, 3)), torch.tensor([3.0, 3.0, 5.0, 4.0])
    torch.testing.assert_close(scores.total, 2 * bright - 0.5 * long)
    torch.testing.assert_close(scores.parts["brightness_of"], bright)
    torch.testing.assert_close(scores.parts["length"], long)
    assert scores.failed == {"brightness_of": 0, "length": 0}


def test_one_reward_alone_has_weight_one(media: torch.Tensor) -> None:
    torch.testing.assert_close(Weighted(brightness_of)(media, PROMPTS).total, media.mean(dim=(1, 2, 3)))


def test_a_failure_stops_by_default_and_names_reward_and_prompt(media: torch.Tensor) -> None:
    with pytest.raises(RewardError, match=r"'failing' failed .*13 'three'.*ConnectionError: judge is down"):
        Weighted({brightness_of: 1, FailingReward(): 1})(media, PROMPTS)
    with pytest.raises(RewardError, match=r"'nan_for_two' returned inf for sample 1, prompt 12 'two'"):
        Weighted(nan_for_two)(media, PROMPTS)


def test_a_masked_failure_is_nan_and_counted_and_never_zero(media: torch.Tensor) -> None:
    rewards = Weighted({brightness_of: 1.0, nan_for_two: 1.0}, on_error="mask")
    scores = rewards(media, PROMPTS)
    assert scores.parts["nan_for_two"].isnan().tolist() == [False, True, False, False]
    assert scores.total.isnan().tolist() == [False, True, False, False]
    assert scores.parts["brightness_of"].isfinite().all()
    assert scores.failed == {"brightness_of": 0, "nan_for_two": 1}


def test_a_masked_exception_takes_only_that_reward_of_that_micro_batch(media: torch.Tensor, caplog) -> None:
    rewards = Weighted({FailingReward(): 1.0, length: 1.0}, on_error="mask")
    scores = in_micro_batches(rewards, media, PROMPTS, micro_batch=2)
    assert scores.parts["failing"].isnan().tolist() == [False, False, True, True]
    assert scores.parts["length"].tolist() == [3, 3, 5, 4]
    assert scores.failed["failing"] == 2 and rewards.failed["failing"] == 2
    assert "ConnectionError: judge is down" in rewards.tracebacks["failing"]
    rewards(media, PROMPTS)
    assert rewards.failed["failing"] == 6
    assert sum("'failing' failed" in message for message in caplog.messages) == 1


def test_a_sample_that_a_reward_does_not_apply_to_is_no_failure(media: torch.Tensor) -> None:
    scores = Weighted({length: 1.0, not_for_two: 10.0})(media, PROMPTS)
    assert scores.failed["not_for_two"] == 0
    assert scores.parts["not_for_two"].isnan().tolist() == [False, True, False, False]
    assert scores.total.tolist() == [13.0, 3.0, 15.0, 14.0]
    assert Weighted(not_for_two)(media, PROMPTS).total.isnan().tolist() == [False, True, False, False]


def test_a_weight_of_zero_reports_and_has_no_say(media: torch.Tensor) -> None:
    scores = Weighted({length: 1.0, nan_for_two: 0.0}, on_error="mask")(media, PROMPTS)
    assert scores.total.tolist() == [3.0, 3.0, 5.0, 4.0]
    assert scores.parts["nan_for_two"].isnan().sum() == 1


def test_a_broken_contract_stops_even_where_failures_are_masked(media: torch.Tensor) -> None:
    with pytest.raises(RewardError, match="expected 4"):
        Weighted(lambda m, p: [0.0], on_error="mask")(media, PROMPTS)


def test_micro_batches_give_what_one_batch_gives(media: torch.Tensor) -> None:
    rewards = Weighted({brightness_of: 1.0, length: 2.0})
    torch.testing.assert_close(
        in_micro_batches(rewards, media, PROMPTS, micro_batch=3).total, rewards(media, PROMPTS).total
    )


def test_gradients_reach_the_media_through_the_total(media: torch.Tensor) -> None:
    rewards = Weighted({"brightness": 3.0, length: 0.0})
    assert rewards.differentiable
    leaf = media.requires_grad_()
    rewards(leaf, PROMPTS).total.sum().backward()
    assert leaf.grad is not None and leaf.grad[:, 1].unique().item() == pytest.approx(3 * 0.587 / 64)


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        ({}, {}, "no rewards"),
        ({length: math.nan}, {}, "weight of reward 'length' is nan"),
        ({length: "1"}, {}, "weight of reward 'length' is '1'"),
        ({length: 1.0}, {"on_error": "ignore"}, "on_error='ignore'"),
        ({"brightness": 1.0, "alignkit.rewards.statistics:Brightness": 1.0}, {}, "two rewards are called"),
    ],
    ids=["nothing", "nan", "text", "policy", "twice"],
)
def test_a_combination_that_cannot_work_is_refused(rewards, options, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Weighted(rewards, **options)


def test_prompts_are_checked_before_there_are_images() -> None:
    rewards = Weighted({"ocr": 1.0, length: 0.1})
    rewards.check_prompts(['a sign "YES"'])
    with pytest.raises(RewardError, match=r"prompt 7 .* names no text"):
        rewards.check_prompts([Prompt("a sign", id=7)])


def test_the_record_lists_parts_with_weights() -> None:
    record = json.loads(json.dumps(Weighted({"ocr": 1.0, length: 0.5}).describe()))
    assert [(part["name"], part["weight"]) for part in record["rewards"]] == [("ocr", 1.0), ("length", 0.5)]
    assert record["rewards"][0]["engine"] == "rapidocr" and record["rewards"][0]["version"]


def test_the_mean_over_frames_is_the_mean_of_the_frames_scores(rng: torch.Generator) -> None:
    video = torch.rand(2, 5, 3, 8, 8, generator=rng)
    reward = PerFrameMean(brightness_of)
    assert (reward.name, reward.kind) == ("brightness_of_per_frame", "video")
    torch.testing.assert_close(reward(video, ["a", "b"]), video.mean(dim=(1, 2, 3, 4)))
    torch.testing.assert_close(Weighted(reward)(video, ["a", "b"]).total, video.mean(dim=(1, 2, 3, 4)))


def test_frames_keep_the_prompt_of_their_video(rng: torch.Generator) -> None:
    video = torch.rand(2, 3, 3, 8, 8, generator=rng)
    assert PerFrameMean(length)(video, ["a", "four"]).tolist() == [1.0, 4.0]
    scores = Weighted(PerFrameMean(not_for_two))(video, ["two", "one"])
    assert scores.total.isnan().tolist() == [True, False] and scores.failed == {"not_for_two_per_frame": 0}


def test_a_video_reward_has_no_mean_over_frames() -> None:
    with pytest.raises(RecipeError, match="scores video media"):
        PerFrameMean(PerFrameMean(length))


def hangs(media, prompts):
    try:
        time.sleep(60)
    except Exception:  # noqa: BLE001 - what careless rewards do
        return [0.0] * len(prompts)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGALRM")
def test_a_reward_that_hangs_is_interrupted_and_treated_as_failed(media: torch.Tensor) -> None:
    started = time.monotonic()
    scores = Weighted({hangs: 1.0, length: 1.0}, on_error="mask", timeout=0.2)(media, PROMPTS)
    assert time.monotonic() - started < 5
    assert scores.parts["hangs"].isnan().all() and scores.parts["length"].isfinite().all()
    with pytest.raises(RewardError, match=r"'hangs', prompts 11, .*no answer within 0.2 s"):
        Weighted(hangs, timeout=0.2)(media, PROMPTS)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGALRM")
def test_a_deadline_puts_the_previous_timer_back() -> None:
    previous = signal.signal(signal.SIGALRM, signal.SIG_IGN)
    remaining = signal.setitimer(signal.ITIMER_REAL, 50)
    try:
        with deadline(5):
            assert signal.getitimer(signal.ITIMER_REAL)[0] <= 5
        assert 49 < signal.getitimer(signal.ITIMER_REAL)[0] <= 50
        assert signal.getsignal(signal.SIGALRM) is signal.SIG_IGN
    finally:
        signal.setitimer(signal.ITIMER_REAL, *remaining)
        signal.signal(signal.SIGALRM, previous)


def test_a_deadline_of_zero_is_refused() -> None:
    with pytest.raises(RecipeError, match="timeout=0"), deadline(0):
        pass


class LatentMean:
    """Scores latents."""

    name, kind, differentiable = "latent_mean", "latent", False

    def __call__(self, media, prompts):
        return media.flatten(1).mean(dim=1)


def test_a_latent_reward_gets_the_latents_and_does_not_apply_without_them(media: torch.Tensor) -> None:
    rewards, latents = Weighted({LatentMean(): 1.0, length: 1.0}), torch.arange(8.0).reshape(4, 2)
    scores = rewards(media, PROMPTS, latents)
    torch.testing.assert_close(scores.parts["latent_mean"], torch.tensor([0.5, 2.5, 4.5, 6.5]))
    without = rewards(media, PROMPTS)
    assert without.parts["latent_mean"].isnan().all() and without.total.tolist() == [3.0, 3.0, 5.0, 4.0]
    assert without.failed["latent_mean"] == 0


def test_judges_are_added_with_weight_zero_beside_the_same_loaded_rewards() -> None:
    trained = Weighted({brightness_of: 2.0})
    both = trained.and_judges([length])
    assert both.weights == {"brightness_of": 2.0, "length": 0.0}
    assert both.rewards["brightness_of"] is trained.rewards["brightness_of"]


def in_a_thread(work):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def counts_forever(media, prompts):
    while True:
        time.sleep(0.01)


def test_a_reward_that_hangs_in_another_thread_is_stopped_there_too(media: torch.Tensor) -> None:
    rewards = Weighted({counts_forever: 1.0, length: 1.0}, on_error="mask", timeout=0.2)
    scores = in_a_thread(lambda: rewards(media, PROMPTS))
    assert scores.parts["counts_forever"].isnan().all() and scores.parts["length"].isfinite().all()
    assert not [thread for thread in threading.enumerate() if thread.name == "alignkit-reward-call"]


def test_a_call_that_cannot_be_stopped_is_left_behind_and_the_reward_is_not_called_again(
    media: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignkit.rewards.deadline.GRACE", 0.05)
    calls, release = [], threading.Event()

    def blocks(media, prompts):
        calls.append(len(prompts))
        release.wait(10)
        return [1.0] * len(prompts)

    rewards = Weighted({blocks: 1.0}, on_error="mask", timeout=0.1)
    first = in_a_thread(lambda: rewards(media, PROMPTS))
    second = in_a_thread(lambda: rewards(media, PROMPTS))
    assert first.total.isnan().all() and second.total.isnan().all()
    assert calls == [4]
    assert "still in the call" in rewards.tracebacks["blocks"]
    release.set()
    for thread in threading.enumerate():
        if thread.name == "alignkit-reward-call":
            thread.join()
    assert in_a_thread(lambda: rewards(media, PROMPTS)).total.tolist() == [1.0] * 4


def test_what_torch_keeps_per_thread_goes_with_the_work() -> None:
    seen = {}

    def work():
        seen.update(gradient=torch.is_grad_enabled(), cast=(torch.ones(2, 2) @ torch.ones(2, 2)).dtype)

    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        carried = inherited(work)
    in_a_thread(carried)
    assert seen == {"gradient": False, "cast": torch.bfloat16}
    in_a_thread(work)
    assert seen == {"gradient": True, "cast": torch.float32}


def test_a_reward_that_draws_from_the_global_generator_is_refused_where_that_is_watched(media: torch.Tensor) -> None:
    def draws(media, prompts):
        return torch.rand(len(prompts))

    rewards = Weighted({draws: 1.0, length: 1.0})
    rewards(media, PROMPTS)
    rewards.watched = True
    with pytest.raises(RecipeError, match=r"'draws' draws from torch's global generator"):
        rewards(media, PROMPTS)
