"""What the recipes of moving shapes have in common: the video quickstart's model, prompts, rewards and judges."""

from __future__ import annotations

from typing import Any

from alignkit.rewards.loading import load_file
from alignkit.shipped import path

shared = load_file(path("recipes", "worlds", "shared.py"))

GENERATOR = "shipped:assets/shapes/generator"
CALL = {"height": 32, "width": 32, "num_frames": 9, "max_sequence_length": 8}
REWARD = (
    'video_reward(weights="shipped:assets/shapes/reward", base="shipped:assets/shapes/reward/base", '
    'media_fps=8, dtype="float32", batch_size=64)'
)
"""Look, motion and agreement with the prompt, as `shapes_reward` taught a tiny VideoReward."""
OFFLINE: dict[str, Any] = {
    "steps": 60,
    "draws": 2,
    "lr": 1e-3,
    "warmup": 5,
    "lr_schedule": "linear",
    "ema_decay": 0.8,
}
"""Equal for all methods that learn from one file."""
TRACKER = "shipped:recipes/shapes/tracker.py:Tracker"
PARTS = ("direction", "smoothness", "steadiness", "identity", "speed")
JUDGES = (f"{TRACKER}()", *(f'{TRACKER}(part="{part}")' for part in PARTS))
"""Never trained on: the tracker, and what it is made of."""


def task(**changes: Any) -> dict[str, Any]:
    """Fields of the video quickstart for another method's recipe; `changes` replace or add some."""
    return shared.task("video_quickstart", **changes)
