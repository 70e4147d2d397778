"""A tiny model on disk and a recipe that trains it in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from alignkit.flow.transition import Noise
from alignkit.policy import LoRA
from alignkit.training.grpo import GRPO
from tests.policy.zoo import ZOO

REWARD = """
def brightness(media, prompts):
    return media.mean(dim=(1, 2, 3))
"""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "sd3"
    ZOO["sd3"].build().save_pretrained(folder)
    return folder


@pytest.fixture()
def tiny_recipe(tiny_model: Path, tmp_path: Path) -> GRPO:
    """Two optimizer steps a round on four prompts; the reward comes from a file, so that the run can be reloaded."""
    (tmp_path / "prompts.txt").write_text("\n".join(f"a red cat {i}" for i in range(12)))
    (tmp_path / "reward.py").write_text(REWARD)
    entry = ZOO["sd3"]
    return GRPO(
        model=str(tiny_model),
        prompts=str(tmp_path / "prompts.txt"),
        rewards={f"{tmp_path / 'reward.py'}:brightness": 1.0},
        call={**entry.call, **entry.variants["unguided"]},
        num_steps=4,
        steps=4,
        lr=1e-2,
        prompts_per_step=2,
        group_size=3,
        updates=2,
        train=LoRA(rank=2, alpha=4.0),
        plan="window",
        window=2,
        noise=Noise("flow_sde", 0.7),
        clip=1e-3,
        kl_beta=0.01,
        ema_decay=0.5,
        eval_every=0,
        checkpoint_seconds=0.0,
        sample_prompts=1,
        diversity_prompts=0,
    )
