"""The command line as a user meets it: commands, overrides, exit codes, and that mistakes are named in one line."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from alignkit.cli import build_parser, main
from alignkit.policy import LoRA
from tests.policy.zoo import ZOO

COMMANDS = ["run", "resume", "plan", "sample", "score", "pairs", "fetch", "rewards", "report", "doctor", "bench"]

FIELDS = """
adam_betas advantage advantage_clip attention branch_width branches call checkpoint_seconds clip clip_high critic data
data_anchor data_beta data_samples decode.batch decode.framewise decode.slicing decode.tiling diversity_prompts
diversity_samples diversity_shaping dppo_threshold ema_decay eval_batch eval_curve_prompts eval_every eval_limit
eval_prompts eval_steps gradient_checkpointing group_size guidance_baseline init_lora judges keep_checkpoints
kl_adaptive kl_beta kl_form kl_prompts kl_share kl_steps lr lr_schedule max_grad_norm micro_batch model noise.kind
noise.level noise.scaled num_steps objective old.decay old.delay old.every old.kl old.ramp on_error plan plan_steps
precision prompts prompts_per_step ratio_norm reduce reference replay replay_rounds reward_device reward_timeout
rewards.ocr rewards_beside rollout_batch sample_prompts sample_with seed shared_noise slide slide_every step_weights
steps time_limit tracker train.alpha train.rank train.seed train.targets train_guidance transform transform_quantile
transform_samples transform_scales updates velocity_beta warmup weight_decay window window_decay window_first
window_last
"""

RECIPE = """
from alignkit.policy import LoRA
from alignkit.training.grpo import GRPO

def mean(media, prompts):
    return media.mean(dim=(1, 2, 3))

def recipe():
    return GRPO(
        model={model!r}, prompts={prompts!r}, rewards={{mean: 1.0, "brightness": 0.5}},
        call={{"height": 32, "width": 32, "guidance_scale": 1.0, "max_sequence_length": 16}},
        num_steps=3, steps=1, prompts_per_step=1, group_size=2, train=LoRA(rank=2, alpha=4.0),
        eval_every=0, diversity_prompts=0, eval_limit=1,
    )

def guided():
    import dataclasses
    return dataclasses.replace(recipe(), call={{**recipe().call, "guidance_scale": 4.0}})
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny SD 3 (`model`), prompts, and a recipe with a variant."""
    folder = tmp_path_factory.mktemp("cli")
    ZOO["sd3"].build().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("".join(f"a red cat {i}\n" for i in range(6)), encoding="utf-8")
    text = RECIPE.format(model=str(folder / "model"), prompts=str(folder / "prompts.txt"))
    (folder / "small.py").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a command that succeeds prints."""
    assert main(argv) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], status: int, *argv: str) -> str:
    """The one line with which a command refuses."""
    assert main(argv) == status
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("alignkit: ")
    return lines[0]


# the interface


def test_the_help_names_every_command_and_loads_no_torch() -> None:
    code = (
        "import sys\nfrom alignkit.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert not {'torch', 'tyro', 'diffusers', 'numpy'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


def test_the_commands_are_these() -> None:
    (commands,) = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    assert list(commands.choices) == COMMANDS


def test_the_fields_of_a_recipe_are_these() -> None:
    from alignkit.training.grpo import GRPO
    from alignkit.training.overrides import fields

    assert sorted(fields(GRPO(model="m", prompts="p", rewards={"ocr": 1.0}))) == sorted(FIELDS.split())


def test_a_mistake_is_one_line_without_a_traceback_and_exits_with_2(here: Path) -> None:
    command = [sys.executable, "-m", "alignkit", "report", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0 and "nothing has no recipe.json" in done.stderr


# overrides


@pytest.mark.parametrize(
    ("option", "nearest"),
    [
        ("--learning-rat", "--lr"),
        ("--grup-size", "--group-size"),
        ("--train.rnk", "--train.rank"),
        ("--call.heigth", "--call.height"),
        ("--noise.lvel", "--noise.level"),
        ("--train.rank.deep", "--train.rank"),
    ],
)
def test_an_unknown_field_at_any_depth_names_the_nearest_and_writes_nothing(
    place: Path, here: Path, capsys: pytest.CaptureFixture[str], option: str, nearest: str
) -> None:
    message = refused(capsys, 2, "run", str(place / "small.py"), option, "3")
    assert option in message and f"did you mean {nearest}?" in message
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("option", "value", "kind"), [("--lr", "fast", "FLOAT"), ("--steps", "1.5", "INT"), ("--train.rank", "a", "INT")]
)
def test_a_value_of_the_wrong_type_is_refused_with_the_field_and_its_type(
    place: Path, here: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, kind: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["run", str(place / "small.py"), option, value])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert option in message and kind in message and value in message
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--group-size", "1"], "group_size=1"),
        (["--plan", "explicit", "--plan-steps", "7"], "[7] do not run"),
        (["--updates", "3"], "updates=3 does not split prompts_per_step=1"),
        (["--noise.level", "0"], "needs noise to score"),
    ],
)
def test_contradicting_settings_are_refused_by_plan_with_the_reason(
    place: Path, here: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert words in refused(capsys, 2, "plan", str(place / "small.py"), *options)


def test_an_unknown_recipe_names_where_it_looked(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no recipe 'quikstart'" in refused(capsys, 2, "run", "quikstart")


def test_a_recipes_own_help_lists_its_fields_with_their_values(
    place: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["run", str(place / "small.py"), "--help"])
    assert not stop.value.code
    shown = capsys.readouterr().out
    assert "--train.rank" in shown and "--rewards.brightness" in shown


# runs


def test_a_run_refuses_a_folder_that_holds_one_and_names_resume(
    place: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "old").mkdir()
    (here / "old" / "recipe.json").write_text("{}", encoding="utf-8")
    assert "alignkit resume old" in refused(capsys, 1, "run", str(place / "small.py"), "--out", "old")


def test_resuming_what_is_no_run_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no readable recipe.json" in refused(capsys, 1, "resume", "nothing")


def test_a_recipe_runs_with_its_overrides_and_is_repeated_from_its_copies(
    place: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(place / "small.py"), "--lr", "1e-3", "--rewards.brightness", "0.25"]) == 0
    first = json.loads((here / "runs" / "small" / "recipe.json").read_text(encoding="utf-8"))
    assert first["recipe"]["lr"] == 1e-3
    assert [pair for pair in first["recipe"]["rewards"]["pairs"] if pair[0] == "brightness"] == [["brightness", 0.25]]
    repeat = ["run", "runs/small/recipe.json", "--out", "again"]
    assert main(repeat) == 0
    second = json.loads((here / "again" / "recipe.json").read_text(encoding="utf-8"))
    assert second["recipe"] == first["recipe"]
    metrics = [(here / run / "metrics.jsonl").read_text(encoding="utf-8") for run in ("runs/small", "again")]
    rewards = [[json.loads(line)["reward/total"] for line in text.splitlines()] for text in metrics]
    assert rewards[0] == rewards[1]


def test_tiny_runs_two_steps_on_random_weights(place: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(place / "small.py"), "--steps", "50", "--tiny", "--out", "t"]) == 0
    summary = json.loads((here / "t" / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 2
    own = (place / "model" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert (here / "t" / "model" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() != own


def test_report_writes_the_page_again(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "r").mkdir()
    assert "no recipe.json" in refused(capsys, 2, "report", "r")
    record = {"recipe": {"class": "GRPO"}, "files": {}}
    (here / "r" / "recipe.json").write_text(json.dumps(record), encoding="utf-8")
    assert printed(capsys, "report", "r").strip().endswith("report.html")
    assert (here / "r" / "report.html").is_file()


# records


def test_plan_prints_a_record_in_which_what_was_not_measured_is_null(
    place: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads(printed(capsys, "plan", f"{place / 'small.py'}:guided", "--json"))
    assert record["round"]["samples"] == 2
    assert record["round"]["rows"] == {
        "sampling": 12,
        "editing": 0,
        "training": 8,
        "reference": 0,
        "old": 0,
        "data": 0,
        "total": 20,
    }
    assert record["measured"] is None and record["memory_bytes"]["activations"] is None
    assert not list(here.iterdir())


def test_rewards_prints_every_name_with_its_status(capsys: pytest.CaptureFixture[str]) -> None:
    from alignkit.rewards import TABLE

    records = json.loads(printed(capsys, "rewards", "--json"))
    assert [r["name"] for r in records] == list(TABLE)
    (brightness,) = [r for r in records if r["name"] == "brightness"]
    assert brightness["status"] == "ready" and brightness["differentiable"] is True


def test_doctor_prints_versions_devices_and_the_kernels_that_ran(capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads(printed(capsys, "doctor", "--json"))
    assert torch.__version__.startswith(record["versions"]["torch"])
    assert record["devices"][-1]["device"] == "cpu"
    (native,) = [one for one in record["attention"] if one["backend"] == "native"]
    assert native["forward"] and native["backward"] and native["kernels"]


@pytest.mark.parametrize(
    ("torch_version", "vision_version", "needs", "words"),
    [
        ("2.15.0", "0.30.0", ["torch==2.15.0", "numpy"], None),
        ("2.15.0+cu132", "0.30.0+cu132", ["torch==2.15.0"], None),
        ("2.13.0+cpu", "0.30.0", ["numpy", "torch==2.15.0"], "this torchvision needs torch 2.15.0"),
        ("2.15.0+cpu", "0.30.0+cu132", ["torch==2.15.0"], "builds for different devices (cpu and cu132)"),
        ("2.15.0", None, [], None),
    ],
)
def test_a_torchvision_of_another_torch_is_told_before_anything_is_imported(
    torch_version: str, vision_version: str | None, needs: list[str], words: str | None
) -> None:
    from alignkit.evaluation.doctor import torchvision_fault

    fault = torchvision_fault(torch_version, vision_version, needs)
    assert (fault is None) if words is None else (fault is not None and words in fault)


# pictures


def test_score_gives_each_picture_its_own_number(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in (("dark", 0), ("light", 255)):
        Image.new("RGB", (16, 16), (value,) * 3).save(here / f"{name}.png")
    found = printed(capsys, "score", "brightness", "dark.png", "light.png", "--prompt", "x", "--json")
    assert [row["scores"]["brightness"] for row in json.loads(found)] == pytest.approx([0.0, 1.0])
    (read,) = json.loads(printed(capsys, "score", "ocr,brightness", "dark.png", "--prompt", 'says "A"', "--json"))
    assert read["engines"]["ocr"].startswith("rapidocr ") and set(read["engines"]) == {"ocr"}
    lines = printed(capsys, "score", "brightness", "dark.png", "--prompt", "x").splitlines()
    assert lines == ["image\tbrightness\tprompt", "dark.png\t0.0000\tx"]


def test_score_refuses_missing_pictures_and_a_wrong_number_of_prompts(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no image or video gone.png" in refused(capsys, 2, "score", "brightness", "gone.png", "--prompt", "x")
    (here / "p.txt").write_text("one\ntwo\n", encoding="utf-8")
    message = refused(capsys, 2, "score", "brightness", "a.png", "--prompts", "p.txt")
    assert "1 images and 2 prompts" in message


SMALL = ["--steps", "2", "--set", "height=32", "width=32", "max_sequence_length=16"]


def test_sample_draws_the_same_picture_for_the_same_seed_whatever_the_number(
    place: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed(capsys, "sample", str(place / "model"), "a red cat", "--num", "2", "--seed", "5", "--out", "a", *SMALL)
    printed(capsys, "sample", str(place / "model"), "a red cat", "--num", "1", "--seed", "6", "--out", "b", *SMALL)
    assert (here / "a" / "001-seed6.png").read_bytes() == (here / "b" / "000-seed6.png").read_bytes()
    assert (here / "a" / "000-seed5.png").read_bytes() != (here / "a" / "001-seed6.png").read_bytes()
    with Image.open(here / "a" / "sheet.png") as sheet:
        assert sheet.width > 2 * 32


def test_samples_do_not_depend_on_how_they_are_batched(place: Path) -> None:
    from alignkit.inference.sampling import open_pipeline, sample

    pipe, call = open_pipeline(str(place / "model"), device="cpu"), {"height": 32, "width": 32}
    whole, single = (
        sample(pipe, ["a cat", "a dog"], num=2, steps=1, seed=3, call=call, batch=batch) for batch in (4, 1)
    )
    assert [(one.prompt, one.seed) for one in single] == [("a cat", 3), ("a cat", 4), ("a dog", 3), ("a dog", 4)]
    for a, b in zip(whole, single, strict=True):
        torch.testing.assert_close(a.media, b.media, rtol=0, atol=1e-4)


def test_sample_refuses_a_keyword_that_the_pipeline_has_not(
    place: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "has no keyword 'heigth'" in refused(capsys, 2, "sample", str(place / "model"), "x", "--set", "heigth=3")


def test_sample_loads_a_lora_at_its_scale_and_refuses_one_that_matches_nothing(place: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from alignkit.errors import RecipeError
    from alignkit.inference.sampling import add_loras, open_pipeline, sample
    from alignkit.policy import Policy
    from alignkit.policy.lora_files import save_lora

    pipe = open_pipeline(str(place / "model"), device="cpu")
    with Policy(pipe, train=LoRA(rank=2, alpha=8.0)) as policy:
        rng = torch.Generator().manual_seed(1)
        for parameter in policy.parameters():
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=rng)
        save_lora(policy, tmp_path / "lora")

    def draw() -> torch.Tensor:
        call = {"height": 32, "width": 32, "max_sequence_length": 16}
        return sample(pipe, ["a cat"], num=1, steps=2, seed=0, call=call)[0].media

    plain = draw()
    assert add_loras(pipe, [(str(tmp_path / "lora"), 1.0)]) == {str(tmp_path / "lora"): 19}
    full = draw()
    pipe.unload_lora_weights()
    add_loras(pipe, [(str(tmp_path / "lora"), 0.0)])
    assert not torch.equal(full, plain)
    torch.testing.assert_close(draw(), plain)
    pipe.unload_lora_weights()
    strange = {f"base_model.model.blocks.0.q.lora_{x}.weight": torch.zeros(2, 2) for x in "AB"}
    save_file(strange, str(tmp_path / "strange.safetensors"))
    with pytest.raises(RecipeError, match="0 tensors of the LoRA"):
        add_loras(pipe, [(str(tmp_path / "strange.safetensors"), 1.0)])


GUIDED = ["--guide", "best_of_n", "--budget", "3", "--reward", "brightness=2", "--judge", "jpeg_compressibility"]


def test_guided_samples_are_drawn_beside_unguided_ones_from_the_same_noise(
    place: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", str(place / "model"), "a red cat", "a dog", "--num", "2", "--seed", "5", *SMALL, *GUIDED]
    shown = printed(capsys, *command, "--out", "g").splitlines()
    assert [line.split("\t")[:2] for line in shown if line.startswith(("unguided\t", "best_of_n\t"))][:2] == [
        ["unguided", "2 (1 x 2)"],
        ["best_of_n", "6 (3 x 2)"],
    ]
    header = next(line.split("\t") for line in shown if line.startswith("\t"))
    assert header[1:4] == ["brightness", "jpeg_compressibility (judge)", "weighted total"]
    found = json.loads((here / "g" / "sheet.json").read_text(encoding="utf-8"))
    plain, best = found["methods"]
    assert [plain["budget_used"], best["budget_used"]] == [1, 3] and best["total"] > plain["total"]
    assert best["total"] == pytest.approx(2 * best["rewards"]["brightness"])
    assert [(one["prompt"], one["seed"]) for one in best["samples"]] == [
        ("a red cat", 5),
        ("a red cat", 6),
        ("a dog", 5),
        ("a dog", 6),
    ]
    assert len(list((here / "g").glob("0*.png"))) == 4
    with Image.open(here / "g" / "000-seed5.png") as picture, Image.open(here / "g" / "sheet.png") as sheet:
        bright = torch.tensor(list(picture.convert("L").tobytes())).float().mean() / 255
        assert sheet.height > 4 * picture.height
    assert float(bright) == pytest.approx(best["samples"][0]["rewards"]["brightness"], abs=0.02)
    printed(capsys, *command[:2], "a dog", *command[4:], "--out", "alone.png")
    alone = json.loads((here / "alone.json").read_text(encoding="utf-8"))["methods"][1]["samples"]
    assert [one["total"] for one in alone] == pytest.approx([one["total"] for one in best["samples"][2:]], abs=1e-4)
    assert not (here / "000-seed5.png").exists()


def test_the_plan_of_guided_samples_loads_and_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = printed(capsys, "sample", "nowhere", "a cat", "--num", "3", "--steps", "10", *GUIDED, "--plan")
    assert "best_of_n\t30 (3 x 10)\t0\t0\t0\t3\t0\t1" in shown
    assert "3 samples with each of 2, one before to warm up: 130 denoiser calls in all" in shown
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--guide", "best_of_m", "--reward", "brightness"], "nearest: 'best_of_n'"),
        (["--guide", "best_of_n(size=3)", "--reward", "brightness"], "no option 'size'"),
        (["--guide", "best_of_n"], "add --reward SPEC"),
        (["--reward", "brightness"], "--reward goes with --guide METHOD"),
        (["--budget", "2"], "--budget goes with --guide METHOD"),
        (["--guide", "best_of_n", "--reward", "brightnes"], "did you mean 'brightness'"),
        (["--guide", "best_of_n", "--reward", "brightness", "--budget", "0.5"], "budget=0.5"),
        (["--guide", "best_of_n", "--reward", "brightness", "--batch", "0"], "--batch 0 must be at least 1"),
        (["--guide", "nrg", "--reward", "brightness", "--plan"], "'nrg' asks its rewards about noised latents"),
        (["--guide", "dps", "--reward", "ocr", "--plan"], "ocr gives none"),
        (["--guide", 'fk(noise="a")', "--reward", "ocr", "--plan"], "noise='a'"),
    ],
)
def test_what_does_not_guide_is_refused_before_anything_is_loaded(
    here: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert words in refused(capsys, 2, "sample", "nowhere", "a cat", *options)


def test_guided_samples_refuse_a_keyword_that_the_pipeline_has_not(
    place: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(place / "model"), "x", "--steps", "2", *GUIDED, "--set", "heigth=3"]) == 2
    assert "heigth" in capsys.readouterr().err
    assert not list(here.iterdir())


def test_guidance_goes_together_with_a_lora(place: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from alignkit.inference.sampling import open_pipeline
    from alignkit.policy import Policy
    from alignkit.policy.lora_files import save_lora

    with Policy(open_pipeline(str(place / "model"), device="cpu"), train=LoRA(rank=2, alpha=8.0)) as policy:
        rng = torch.Generator().manual_seed(1)
        for parameter in policy.parameters():
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=rng)
        save_lora(policy, here / "lora")
    totals = {}
    for lora in ("lora:1.0", "lora:0.0", None):
        chosen = [] if lora is None else ["--lora", lora]
        out = f"{lora}.png".replace(":", "-")
        printed(capsys, "sample", str(place / "model"), "a cat", "--num", "1", *SMALL, *GUIDED, *chosen, "--out", out)
        found = json.loads((here / out).with_suffix(".json").read_text(encoding="utf-8"))
        totals[lora] = [row["total"] for row in found["methods"]]
    assert totals["lora:0.0"] == pytest.approx(totals[None], abs=1e-5)
    assert all(abs(a - b) > 1e-4 for a, b in zip(totals["lora:1.0"], totals[None], strict=True))


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [("a.safetensors:0.8", "a.safetensors", 0.8), ("runs/x/lora", "runs/x/lora", 1.0), ("C:\\a\\b", "C:\\a\\b", 1.0)],
)
def test_a_lora_is_a_path_and_a_scale(text: str, path: str, scale: float) -> None:
    from alignkit.inference.sampling import parse_lora

    assert parse_lora(text) == (path, scale)


@pytest.mark.parametrize(
    ("text", "value"),
    [("a=3", 3), ("a=0.5", 0.5), ("a=True", True), ("a=None", None), ("a=[1, 2]", [1, 2]), ("a=b=c", "b=c")],
)
def test_a_setting_is_json_or_text(text: str, value: object) -> None:
    from alignkit.inference.sampling import parse_setting

    assert parse_setting(text) == ("a", value)
