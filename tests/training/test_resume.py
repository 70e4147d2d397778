"""Nothing is lost: commits are atomic, a resumed run is the uninterrupted one, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alignkit.errors import CheckpointError
from alignkit.training import checkpoint
from alignkit.training.grpo import GRPO
from alignkit.training.run import Run, resume, start
from alignkit.training.signals import Interrupted


def final_state(run: Path) -> dict[str, torch.Tensor]:
    newest = max((run / "checkpoints").glob("step-*"), key=lambda f: int(f.name.split("-")[1]))
    return load_file(str(newest / "state.safetensors"))


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def interrupted_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The run is asked to stop in the middle of round `step`, after its rollouts."""
    collect = Run.collect

    def stopping(self: Run, number: int):
        made = collect(self, number)
        if number == step:
            self.flag.number = signal.SIGTERM
            self.flag.poll()
        return made

    monkeypatch.setattr(Run, "collect", stopping)


def test_a_run_stopped_in_a_round_and_resumed_equals_the_uninterrupted_run_bit_for_bit(
    tiny_recipe: GRPO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(tiny_recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupted_at(patch, 2)
        with pytest.raises(SystemExit) as stop:
            start(tiny_recipe, tmp_path / "stopped")
    assert stop.value.code == 128 + signal.SIGTERM
    resume(tmp_path / "stopped")
    whole, resumed = final_state(tmp_path / "whole"), final_state(tmp_path / "stopped")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "stopped")
    summaries = [json.loads((tmp_path / run / "summary.json").read_text()) for run in ("whole", "stopped")]
    assert summaries[0]["rewards"] == summaries[1]["rewards"]


def test_a_truncated_newest_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.commit(tmp_path, step, {"w": torch.full((4,), float(step))}, {"step": step}, keep=2)
    file = tmp_path / "step-2" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    said: list[str] = []
    found = checkpoint.newest(tmp_path, said.append)
    assert found is not None and found.step == 1
    assert "step-2" in said[0] and "falling back" in said[0]


def test_a_checkpoint_without_its_commit_marker_is_ignored(tmp_path: Path) -> None:
    checkpoint.commit(tmp_path, 1, {"w": torch.ones(1)}, {}, keep=2)
    (tmp_path / "step-1" / checkpoint.COMMIT).unlink()
    assert checkpoint.newest(tmp_path, lambda sentence: None) is None


def test_a_full_disk_leaves_the_previous_checkpoint_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.commit(tmp_path, 1, {"w": torch.ones(1)}, {"step": 1}, keep=2)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match="earlier checkpoints are intact"):
        checkpoint.commit(tmp_path, 2, {"w": torch.ones(1)}, {"step": 2}, keep=2)
    assert [f.name for f in tmp_path.iterdir()] == ["step-1"]
    found = checkpoint.newest(tmp_path, lambda sentence: None)
    assert found is not None and found.step == 1


def test_only_the_newest_commits_are_kept(tmp_path: Path) -> None:
    for step in range(5):
        checkpoint.commit(tmp_path, step, {"w": torch.ones(1)}, {}, keep=2)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step-3", "step-4"]


def test_a_run_into_an_existing_run_refuses_and_names_resume(tiny_recipe: GRPO, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text("{}")
    with pytest.raises(CheckpointError, match="alignkit resume"):
        start(tiny_recipe, tmp_path / "run")


def test_two_processes_cannot_hold_one_run_directory(tmp_path: Path) -> None:
    code = f"import alignkit.training.checkpoint as c\nwith c.lock(__import__('pathlib').Path({str(tmp_path)!r})): pass"
    with checkpoint.lock(tmp_path):
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert other.returncode != 0 and "another process is running" in other.stderr
    with checkpoint.lock(tmp_path):
        pass


def test_resuming_without_a_commit_starts_from_step_0_and_says_so(
    tiny_recipe: GRPO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = dataclasses.replace(tiny_recipe, steps=1)

    def stop(self: Run, *args: object, **kwargs: object) -> None:
        raise Interrupted(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "assess", stop)
        with pytest.raises(SystemExit) as left:
            start(recipe, tmp_path / "run")
    assert left.value.code == 130
    resume(tmp_path / "run")
    assert "starting from step 0" in capsys.readouterr().out
    assert (tmp_path / "run" / "summary.json").is_file()


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals; Windows sends other ones")
def test_sigterm_to_a_real_process_commits_and_leaves_with_its_code(tiny_recipe: GRPO, tmp_path: Path) -> None:
    recipe = tmp_path / "slow.py"
    fields = {f.name: getattr(tiny_recipe, f.name) for f in dataclasses.fields(tiny_recipe)} | {"steps": 500}
    body = ", ".join(f"{name}={value!r}" for name, value in fields.items())
    recipe.write_text(
        "from alignkit.flow.transition import Noise\nfrom alignkit.policy import LoRA\n"
        "from alignkit.policy.memory import Decode\n"
        "from alignkit.training.follow import Follow\n"
        f"from alignkit.training.grpo import GRPO\n\n\ndef recipe():\n    return GRPO({body})\n"
    )
    code = (
        "from pathlib import Path\nfrom alignkit.training import recipe_files as f, run\n"
        f"s = f.find({str(recipe)!r})\nrun.start(f.load(s), Path({str(tmp_path / 'run')!r}), s)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 90
        while not list((tmp_path / "run" / "checkpoints").glob("step-[1-9]*")) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "alignkit resume" in said
    assert checkpoint.newest(tmp_path / "run" / "checkpoints", lambda sentence: None) is not None
