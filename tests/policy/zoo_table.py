"""The README's table of pipelines, made from one run of the conformance test."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Sequence

import pytest

from tests.policy.zoo import ZOO

COLUMNS = {
    "every step bit for bit": "test_every_step_equals_the_pipelines_own",
    "guidance off": "test_unguided_is_the_pipelines_own_without_guidance",
    "own initial latents": "test_initial_latents_are_what_the_pipelines_loop_starts_from",
    "own decoding": "test_decoding_is_the_pipelines_own",
    "gradients": "test_gradients_reach_the_denoiser_and_the_latents",
    "ratio 1": "test_a_recorded_step_scored_again_has_ratio_one",
    "left as it was": "test_the_pipeline_is_the_same_afterwards",
}


class Outcomes:
    """A pytest plugin that collects, per (test, zoo entry), whether all its cases passed."""

    def __init__(self) -> None:
        self.passed: dict[tuple[str, str], bool] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        match = re.search(r"::(\w+)\[(\w+)(?:-\w+)?\]$", report.nodeid)
        if match is None or (report.when != "call" and report.passed):
            return
        key = (match[1], match[2])
        self.passed[key] = self.passed.get(key, True) and report.passed


def markdown(arguments: Sequence[str] = ()) -> str:
    """Run the conformance test (`arguments` go to pytest); a cell is yes, no, or empty where it does not apply."""
    outcomes = Outcomes()
    with contextlib.redirect_stdout(sys.stderr):  # standard output is the table alone
        pytest.main(["-q", "--no-header", "tests/policy/test_conformance.py", *arguments], plugins=[outcomes])
    lines = [" | ".join(["pipeline", "class", "compared", *COLUMNS]), " | ".join(["---"] * (3 + len(COLUMNS)))]
    for name, entry in ZOO.items():
        marks = [outcomes.passed.get((test, name)) for test in COLUMNS.values()]
        words = ["" if mark is None else "yes" if mark else "**no**" for mark in marks]
        own = entry.build.__annotations__["return"]
        lines.append(" | ".join([entry.family, f"`{own}`", ", ".join(entry.variants).replace("_", " "), *words]))
    return "\n".join(f"| {line} |" for line in lines)
