from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignkit.evaluation.monitors import Statistic, fell, findings
from alignkit.evaluation.record import Change, read_run

STEADY = {"rewards": {"ocr": {"before": 0.6, "after": 0.9}}, "judges": {"color": {"before": 0.98, "after": 0.97}}}


def said(tmp_path: Path, summary: dict, metrics: list[dict] | None = None, statistics: dict | None = None) -> str:
    """The sentences about a run with this summary."""
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    rows = [json.dumps({"step": i} | row) for i, row in enumerate(metrics or [])]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    return " ".join(finding.text for finding in findings(read_run(tmp_path), statistics or {}))


def test_nothing_is_said_about_a_run_that_only_improved(tmp_path: Path) -> None:
    assert said(tmp_path, STEADY, [{"policy/ratio_first_dev": 1e-7, "policy/ratio_max_dev": 0.2}]) == ""


def test_a_judge_that_falls_while_the_reward_rises_is_called_reward_hacking(tmp_path: Path) -> None:
    summary = STEADY | {"judges": {"color": {"before": 0.97, "after": 0.72}}}
    assert "judge color, never trained on, fell from 0.970 to 0.720" in said(tmp_path, summary)
    assert "(ocr): a sign of reward hacking" in said(tmp_path, summary)
    unchanged = summary | {"rewards": {"ocr": {"before": 0.6, "after": 0.6}}}
    assert "hacking" not in said(tmp_path, unchanged)


def test_the_part_of_diversity_that_fell_is_named(tmp_path: Path) -> None:
    parts = {"position": {"before": 0.02, "after": 0.01}, "shape": {"before": 0.8, "after": 0.79}}
    text = said(tmp_path, STEADY | {"diversity": {"before": 0.13, "after": 0.12, "parts": parts}})
    assert "the parts that fell: position (50%)" in text and "shape" not in text


def test_a_fall_that_vanished_failures_explain_is_not_severe(tmp_path: Path) -> None:
    parts = {"shape": {"before": 0.8, "after": 0.4}}
    all_samples = {"before": 0.13, "after": 0.07, "parts": parts}
    summary = {"diversity": all_samples, "diversity_right": {"before": 0.07, "after": 0.07, "parts": {}}}
    (tmp_path / "summary.json").write_text(json.dumps(STEADY | summary))
    (finding,) = [f for f in findings(read_run(tmp_path), {}) if "iversity" in f.text]
    assert finding.text.startswith("Diversity of all samples") and not finding.severe
    (tmp_path / "summary.json").write_text(json.dumps(STEADY | {"diversity_right": all_samples}))
    (finding,) = [f for f in findings(read_run(tmp_path), {}) if "iversity" in f.text]
    assert finding.text.startswith("Among samples that are right") and finding.severe


def test_guidance_that_does_as_well_as_training_is_said(tmp_path: Path) -> None:
    assert "Guidance alone" in said(tmp_path, STEADY | {"baselines": {"guidance": {"ocr": 0.92}}})
    assert "Guidance alone" not in said(tmp_path, STEADY | {"baselines": {"guidance": {"ocr": 0.8}}})


def test_a_fall_with_the_pipelines_own_scheduler_is_said(tmp_path: Path) -> None:
    summary = STEADY | {"own_scheduler": {"ocr": {"before": 0.6, "after": 0.4}}}
    assert "own scheduler ocr fell" in said(tmp_path, summary)


def test_the_distance_to_the_base_is_said_and_a_loss_on_data_that_rose_by_a_tenth_is_severe(tmp_path: Path) -> None:
    kl = {"kl": {"before": 0.0, "after": 22.53}}
    assert said(tmp_path, STEADY | {"distances": kl}) == (
        "The aligned sampler is 22.5 nats from the base (KL of sampled paths)."
    )
    quiet, loud = ({"data_loss": {"before": 0.5, "after": after}} for after in (0.54, 0.56))
    assert said(tmp_path, STEADY | {"distances": quiet}) == ""
    text = said(tmp_path, STEADY | {"distances": loud})
    assert "rose by 12% from 0.500 to 0.560" in text
    assert findings(read_run(tmp_path), {})[0].severe


def test_a_ratio_that_is_off_before_any_update_is_said(tmp_path: Path) -> None:
    rows = [{"policy/ratio_first_dev": 1e-7}, {"policy/ratio_first_dev": 5e-3}]
    assert "max |ratio - 1| reached 5.0e-03" in said(tmp_path, STEADY, rows)


def test_values_that_are_not_finite_and_idle_groups_are_said(tmp_path: Path) -> None:
    rows = [{"policy/kl": float("nan")}, {"policy/kl": 0.1, "groups/zero_std_fraction": 0.9}]
    text = said(tmp_path, STEADY, rows)
    assert "policy/kl (1)" in text and "90% of the groups had no spread" in text


def test_images_that_leave_the_range_of_the_base_are_said(tmp_path: Path) -> None:
    base, dark = {"brightness": Statistic(0.5, 0.05)}, {"brightness": Statistic(0.2, 0.05)}
    assert "brightness 0.500 to 0.200" in said(tmp_path, STEADY, statistics={"base": base, "aligned": dark})
    near = {"brightness": Statistic(0.45, 0.05)}
    assert said(tmp_path, STEADY, statistics={"base": base, "aligned": near}) == ""


@pytest.mark.parametrize(
    "before, after, alarm", [(1.0, 0.49, True), (1.0, 0.51, False), (0.5, 2.0, False), (0.01, 0.001, False)]
)
def test_motion_that_fell_by_more_than_half_is_said_unless_there_was_none(
    tmp_path: Path, before: float, after: float, alarm: bool
) -> None:
    base, last = ({"flow": Statistic(flow, 10.0)} for flow in (before, after))
    text = said(tmp_path, STEADY, statistics={"base": base, "aligned": last})
    assert ("Motion fell to 49%: from 1.000 pixels per frame of “base” to 0.490 of “aligned”" in text) is alarm
    assert said(tmp_path, STEADY, statistics={"base": base}) == ""
    assert said(tmp_path, STEADY, statistics={"base": base, "aligned": {}}) == ""


@pytest.mark.parametrize(
    "before, after, expected",
    [(1.0, 0.97, False), (1.0, 0.96, True), (20.0, 19.9, False), (-1.0, -2.0, True), (0.5, None, False)],
)
def test_a_fall_counts_from_three_percent(before: float, after: float | None, expected: bool) -> None:
    assert fell(Change(before, after)) is expected
