"""The benchmark's clock and its memory counter measure what they say."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from alignkit.inference.guide import METHODS as guided_methods
from alignkit.inference.guide import method_of
from alignkit.policy import Policy
from alignkit.training.benchmark import ROUNDS, Clock, bench, lines, overhead, watched
from alignkit.training.benchmark_guidance import COLUMNS, GUIDANCE, Bed, Measured, measured
from alignkit.training.benchmark_guidance import rows as guided_rows
from alignkit.training.benchmark_methods import METHODS, VIEWS, observed, recipe_of, rows
from alignkit.training.benchmark_pipeline import TEXT_LENGTH, tiny_sd3
from alignkit.training.benchmark_video import COLUMNS as VIDEO_COLUMNS
from alignkit.training.benchmark_video import DECODERS, FRAMES, Clips
from alignkit.training.benchmark_video import measured as measured_video
from alignkit.training.benchmark_video import rows as video_rows
from alignkit.training.live_tensors import LiveTensors
from alignkit.training.recipe_files import TRAINERS

PAUSE = 0.03


class Slow(torch.autograd.Function):
    """The identity, with a backward that takes a while."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        time.sleep(PAUSE)
        return gradients[0]


class SlowDenoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(PAUSE)
        return Slow.apply(x * self.weight)  # type: ignore[return-value]


class InstantDecoder(nn.Module):
    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return x


def fake_run() -> Any:
    pipe = SimpleNamespace(transformer=SlowDenoiser(), vae=InstantDecoder())
    return SimpleNamespace(policy=SimpleNamespace(pipe=pipe), parameters=list(pipe.transformer.parameters()))


def test_only_the_denoisers_own_forward_and_backward_count_as_compute() -> None:
    run, clock = fake_run(), Clock()
    with watched(run, clock):
        output = run.policy.pipe.transformer(torch.ones(2))
        loss = Slow.apply(output).sum()  # type: ignore[union-attr]  # a slow backward that is not the denoiser's
        loss.backward()
        time.sleep(PAUSE)
        clock.close()
    assert PAUSE <= clock.seconds["denoiser_forward"] < 1.8 * PAUSE
    assert PAUSE <= clock.seconds["denoiser_backward"] < 1.8 * PAUSE


def test_two_backwards_are_two_intervals_and_what_lies_between_is_overhead() -> None:
    run, clock = fake_run(), Clock()
    with watched(run, clock):
        for _ in range(2):
            run.policy.pipe.transformer(torch.ones(2)).sum().backward()
            time.sleep(3 * PAUSE)
        clock.close()
    assert 2 * PAUSE <= clock.seconds["denoiser_backward"] < 3.6 * PAUSE


def test_the_watched_modules_are_as_before() -> None:
    run = fake_run()
    with watched(run, Clock()):
        pass
    assert "forward" not in vars(run.policy.pipe.transformer) and "decode" not in vars(run.policy.pipe.vae)
    run.policy.pipe.transformer(torch.ones(2)).sum().backward()


def test_overhead_is_the_share_of_time_that_is_no_compute() -> None:
    assert overhead({"denoiser_forward": 3.0, "decoder": 1.0, "total": 5.0}) == pytest.approx(0.2)


def test_live_tensors_counts_what_is_alive_at_once_and_shared_storage_once() -> None:
    weight = torch.zeros(1000)
    with LiveTensors([weight]) as live:
        assert live.now == 4000
        first = torch.ones(1000)
        view = first.view(10, 100)
        assert live.now == 8000
        del first, view
        assert live.now == 4000
        for _ in range(5):
            torch.ones(500)
    assert live.peak == 8000 and live.now == 4000


def test_activations_kept_for_a_backward_are_alive_until_it_is_done() -> None:
    weight = torch.ones(1000, requires_grad=True)
    with LiveTensors([weight]) as live:
        (weight.exp().exp().exp()).sum().backward()
        assert live.peak >= 4 * 4000
        assert live.now == 2 * 4000  # the weight and its gradient


def test_the_pipeline_of_the_benchmark_loads_plainly(tmp_path: Any) -> None:
    from diffusers import DiffusionPipeline

    tiny_sd3().save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    embeds = pipe.encode_prompt("a sign", None, None, max_sequence_length=TEXT_LENGTH)[0]
    assert embeds.shape[1] == 2 * TEXT_LENGTH and bool(embeds.isfinite().all())


class Weights:
    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        with torch.no_grad():
            yield


class Copies(nn.Module):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states


def test_denoiser_calls_are_counted_by_whose_weights_ran() -> None:
    policy: Any = SimpleNamespace(weights=Weights())
    denoiser = Copies()
    with observed(policy, denoiser) as seen:
        denoiser(hidden_states=torch.zeros(4, 1))
        with policy.weights.using("reference"), policy.weights.using("old"):
            denoiser(hidden_states=torch.zeros(2, 1))
        with policy.weights.using("reference"):
            denoiser(hidden_states=torch.zeros(3, 1))
        with torch.no_grad():
            denoiser(hidden_states=torch.zeros(5, 1))
    assert seen.rows == {"training": 4, "old": 2, "reference": 3, "current": 5}
    assert seen.calls.total() == 4 and len(seen.arguments["hidden_states"]) == 4
    assert "using" not in vars(policy.weights) and "forward" not in vars(denoiser)


def test_every_method_of_the_benchmark_trains_as_many_views(tmp_path: Path) -> None:
    from alignkit.training.costs import views_of

    for method in METHODS:
        recipe = recipe_of(method, tmp_path)
        recipe.validate()
        assert views_of(recipe) == VIEWS
    others = {"RewardModel", "Comparison", "InstructVideo"}  # the last is its sampler and its decoder, not its views
    assert {kind.__name__ for kind, _ in METHODS.values()} == TRAINERS.keys() - others


def test_every_method_of_guidance_is_measured_as_it_comes() -> None:
    chosen = {name: method_of(one.method) for name, one in GUIDANCE.items()}
    assert {method.name for method in chosen.values()} == guided_methods.keys()
    assert all(chosen[name] == method_of(name) for name in ("best_of_n", "nrg", "dps", "fk", "das"))


def test_a_guided_image_is_measured_beside_an_unguided_one(tmp_path: Path) -> None:
    with Policy(tiny_sd3()) as policy:
        bed = Bed.of(policy, tmp_path)
        best = measured("best", Measured("best_of_n", steps=1, budget=3.0), bed, pairs=1)
        noisy = measured("nrg", Measured("nrg(sigma_singular=1.0)", steps=2, noisy=True), bed, pairs=1)
    assert best["denoiser_calls"] == 3 and noisy["denoiser_calls"] == 1
    assert 1.5 < best["ratio"] < 6 and noisy["ratio"] > 1
    assert 1 < best["memory_ratio_without_weights"] < 1.5 < noisy["memory_ratio_without_weights"]
    assert 1 < noisy["memory_ratio"] < noisy["memory_ratio_without_weights"]
    (line,) = guided_rows([noisy])
    assert len(line) == len(COLUMNS) and line[:2] == ["nrg", "1"]


def test_the_gradient_of_the_middle_frame_needs_less_memory_than_that_of_all_frames() -> None:
    found = measured_video("Wan", 9)
    assert found["framewise"] is None and 0.3 < found["slicing"] < 1
    assert found["gradient_of_the_middle"] < 0.85 and found["gradient_of_the_middle"] < found["gradient_of_segments"]
    assert found["gradient_bytes"] > 2 * found["whole_bytes"]
    (line,) = video_rows([found])
    assert len(line) == len(VIDEO_COLUMNS) and line[:2] == ["Wan", "9"] and line[4] == "-"


@pytest.mark.parametrize("name", DECODERS)
def test_the_decoders_of_the_video_benchmark_are_causal_and_as_long_as_they_say(name: str) -> None:
    clips = Clips.of(DECODERS[name]().eval(), 9)
    with torch.no_grad():
        assert clips.decoded().shape == (2, 3, 9, 32, 32)
    assert [clips.latents_for(frames) for frames in (1, 5, 6, 9)] == [1, 2, 3, 3]


@pytest.mark.slow
def test_overhead_is_at_most_a_tenth_at_batch_8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUNDS, 1, 1)
    record = bench()
    assert record["overhead"] <= 0.10
    assert 0.5 < record["memory_ratio"] < 1.5
    assert dict(lines(record))["overhead, batch 8"].endswith("%")
    assert [one["method"] for one in record["guidance"]] == list(GUIDANCE)
    assert len(record["video"]) == len(DECODERS) * len(FRAMES)
    found = {one["method"]: one for one in record["methods"]}
    assert found.keys() == METHODS.keys() and len(list(rows(record["methods"]))) == len(METHODS)
    assert found["Flow-DPO"]["rows"] == {"training": 8, "reference": 8}
    assert found["CRD"]["rows"] == {"training": 16, "reference": 16, "old": 16}
    assert 1 < found["Flow-RWR"]["ratio"] < found["CRD"]["ratio"] < 3
