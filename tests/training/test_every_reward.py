"""Every reward of the table goes through `alignkit plan` and `alignkit run --tiny`, those of the hub as well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignkit import shipped
from alignkit.cli import main
from alignkit.rewards import TABLE
from alignkit.rewards.catalogue import record_of
from alignkit.rewards.tesseract import available
from tests.policy.zoo import ZOO

SPECS = {
    "dino_style": 'dino_style(references="shipped:assets/signs")',
    "per_frame_mean": 'per_frame_mean(reward="brightness")',
    "sign_color": "sign_color",
    "solace": 'solace(call={"height": 24, "width": 64}, probes=2, sigmas=(0.5,))',
    "segmental": 'segmental(reward="pickscore", segments=2)',
}
"""How a reward that needs options is written; the others are their names."""

COLUMNS: dict[str, Any] = {
    "include": [{"class": "dog", "count": 2}],
    "boxes": [{"label": "dog", "box": [0.0, 0.0, 0.5, 1.0]}],
    "reference": "reference.png",
}
RECIPE = """
from alignkit import GRPO, LoRA, Noise

def recipe():
    return GRPO(
        model={model!r}, prompts={prompts!r}, eval_prompts={prompts!r}, rewards={rewards!r}, call={call!r},
        num_steps=3, group_size=2, prompts_per_step=2, plan="window", window=1, noise=Noise("flow_sde", 0.7),
        train=LoRA(rank=2, alpha=2.0), clip=1e-3,
    )
"""


def kinds() -> dict[str, list[str]]:
    """Names by what they score; a reward made of others scores images by default. One that guides scores none."""
    records = {name: record_of(name)["kind"] for name in TABLE}
    video = [name for name, kind in records.items() if kind == "video"]
    absent = [] if available() else ["tesseract"]
    return {"video": video, "image": [name for name in TABLE if name not in [*video, *absent, "noise_aware"]]}


def written(folder: Path, model: str, call: dict[str, Any], names: list[str], columns: dict[str, Any]) -> Path:
    rows = [{"prompt": f'a blue sign that says "{word}"', **columns} for word in ("CAT", "DOG")]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    (folder / "reference.png").write_bytes(shipped.path("assets", "signs", "quickstart.png").read_bytes())
    rewards = {SPECS.get(name, name): 1.0 for name in names}
    file = folder / "every.py"
    prompts = str(folder / "prompts.jsonl")
    file.write_text(RECIPE.format(model=model, prompts=prompts, rewards=rewards, call=call), encoding="utf-8")
    return file


def tried(recipe: Path, names: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    planned = {reward["name"]: reward for reward in record["rewards"]}
    remote = {name for name in names if record_of(name)["weights"]}
    assert remote <= {name for name, reward in planned.items() if not all(reward["weights"].values())}
    assert main(["run", str(recipe), "--tiny", "--out", str(folder / "run")]) == 0
    first = json.loads((folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert {f"reward/{name}" for name in planned} <= set(first), "every reward scored the rollouts"


def test_every_image_reward_is_planned_and_runs_tiny(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(shipped.path("assets", "signs", "generator"))
    names = kinds()["image"]
    recipe = written(tmp_path, model, {"height": 24, "width": 64, "true_cfg_scale": 1.0}, names, COLUMNS)
    tried(recipe, names, tmp_path, capsys)


def test_every_video_reward_is_planned_and_runs_tiny(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = ZOO["wan_t2v"]
    entry.build().save_pretrained(tmp_path / "wan")
    names = kinds()["video"]
    recipe = written(tmp_path, str(tmp_path / "wan"), {**entry.call, **entry.variants["unguided"]}, names, COLUMNS)
    tried(recipe, names, tmp_path, capsys)
