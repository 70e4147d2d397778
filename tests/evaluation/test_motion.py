from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from alignkit.evaluation.motion import PAIRS, bands, course, evenly_lit, measures
from alignkit.rewards.pixels import LUMA
from tests.evaluation.synthetic_video_run import disc


def bytes_of(clip: torch.Tensor) -> torch.Tensor:
    return (clip * 255).round().byte()


def numbers(clip: torch.Tensor) -> dict[str, float]:
    return measures(course(bytes_of(clip)))


def test_a_faster_disc_has_more_flow_and_a_still_one_has_none() -> None:
    flow = [numbers(disc((speed, 0.0), texture=0.0))["flow"] for speed in (0.0, 0.5, 1.0, 2.0)]
    assert flow[0] == 0 and flow == sorted(flow) and flow[3] > 2 * flow[1]


def test_flicker_is_no_motion() -> None:
    steady, flickering = (numbers(disc((1.5, 0.0), flicker, texture=0.0)) for flicker in (0.0, 0.6))
    assert flickering["flow"] == pytest.approx(steady["flow"], rel=0.15)
    assert flickering["frame_difference"] > 2 * steady["frame_difference"]
    assert steady["flicker"] < 0.002 and flickering["flicker"] > 0.03


def test_flicker_is_the_mean_jump_of_the_mean_luminance() -> None:
    frames = bytes_of(torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    light = sum(weight * frames[:, i].double().mean(dim=(1, 2)) / 255 for i, weight in enumerate(LUMA))
    assert isinstance(light, torch.Tensor)
    found = course(frames)
    torch.testing.assert_close(found.brightness.double(), light[1:], rtol=0, atol=1e-6)
    expected = (light[1:] - light[:-1]).abs()
    torch.testing.assert_close(found.flicker.double(), expected, rtol=0, atol=1e-6)
    assert measures(found)["flicker"] == pytest.approx(float(expected.mean()), abs=1e-6)


def test_the_second_frame_gets_the_light_of_the_first_and_a_flat_one_stays_finite() -> None:
    rng = torch.Generator().manual_seed(1)
    first = torch.rand(1, 6, 6, generator=rng)
    pair = torch.stack([first, 0.4 * first + 0.1], dim=1)
    torch.testing.assert_close(evenly_lit(pair)[:, 1], first)
    flat = evenly_lit(torch.stack([torch.full((1, 6, 6), 0.5), torch.full((1, 6, 6), 0.1)], dim=1))
    torch.testing.assert_close(flat, torch.full((1, 2, 6, 6), 0.5))


def test_of_a_long_clip_pairs_from_all_over_it_are_compared() -> None:
    frames = torch.zeros(100, 3, 16, 16, dtype=torch.uint8)
    frames[99] = 200
    found = course(frames)
    assert len(found.steps) == PAIRS and (found.steps[0], found.steps[-1]) == (0, 98)
    assert float(found.change[-1]) > 0.5 and float(found.change[:-1].max()) == 0


def test_large_clips_are_looked_at_piece_by_piece_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = bytes_of(disc((1.0, 0.5)))
    whole = course(frames)
    monkeypatch.setattr("alignkit.evaluation.motion.PIXELS", 2 * frames[0].numel())
    pieces = course(frames)
    assert pieces.steps == whole.steps
    torch.testing.assert_close(pieces.flow, whole.flow)
    torch.testing.assert_close(pieces.brightness, whole.brightness)


def test_a_band_is_mean_and_deviation_over_the_clips_of_the_usual_length() -> None:
    one = course(bytes_of(disc((0.5, 0.0))))
    two = replace(one, flow=one.flow + 0.25, brightness=one.brightness + 0.125)
    short = course(bytes_of(disc((2.0, 0.0))[:4]))
    found = bands([short, one, two])
    assert found["flow"].steps == tuple(float(k) for k in range(1, 9))
    torch.testing.assert_close(found["flow"].mean, tuple((one.flow.double() + 0.125).tolist()))
    torch.testing.assert_close(found["flow"].std, (0.125,) * 8, rtol=0, atol=1e-6)
    centred = one.brightness - one.brightness.mean()  # another shade of the whole clip is no flicker
    torch.testing.assert_close(found["brightness"].mean, tuple(centred.tolist()), rtol=0, atol=1e-6)
    torch.testing.assert_close(found["brightness"].std, (0.0,) * 8, rtol=0, atol=1e-6)
    assert bands([]) == {}
