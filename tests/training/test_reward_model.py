"""The training loop of reward models: what it learns, what it refuses, and that nothing of a run is lost."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from alignkit.cli import main
from alignkit.errors import AlignkitError, RecipeError
from alignkit.training import run
from alignkit.training.examples import ChoiceBatch, LabelBatch, PairBatch, ViewBatch, at_level
from alignkit.training.recipe_files import Source, load, reload
from alignkit.training.reward_losses import LOSSES, pair_accuracy, self_distillation
from alignkit.training.reward_model import RewardModel, RewardTraining
from alignkit.training.run_dir import RunDir
from alignkit.training.self_distillation import SelfDistilled
from alignkit.training.signals import StopFlag
from alignkit.types import Prompt

WIDTH = 4


class Scorer(nn.Module):
    """Scores vectors; with dropout, so that a resumed run must have the global generator back."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1))
        self.levels: list[torch.Tensor] = []

    def forward(self, media: torch.Tensor, prompts: object, sigma: torch.Tensor | None = None) -> torch.Tensor:
        if sigma is not None:
            self.levels.append(sigma)
        return self.net(media)[:, 0]

    def save(self, folder: Path) -> None:
        save_file(self.state_dict(), str(folder / "model.safetensors"))


class FirstCoordinate:
    """Of two vectors the one with the larger first number is preferred; `shuffled` prefers either at random."""

    def __init__(self, shuffled: bool = False) -> None:
        self.shuffled = shuffled

    def pairs(self, size: int, rng: torch.Generator) -> PairBatch:
        one, two = torch.randn(size, WIDTH, generator=rng), torch.randn(size, WIDTH, generator=rng)
        first = torch.rand(size, generator=rng) < 0.5 if self.shuffled else one[:, 0] > two[:, 0]
        first = first[:, None]
        return PairBatch(torch.where(first, one, two), torch.where(first, two, one), [Prompt("")] * size)

    def batch(self, size: int, rng: torch.Generator) -> PairBatch:
        return self.pairs(size, rng)

    def measure(self, scorer: nn.Module) -> dict[str, float]:
        held_out = FirstCoordinate().pairs(400, torch.Generator().manual_seed(9))
        return {"pair accuracy": pair_accuracy(scorer, held_out)}


def recipe(**fields: object) -> RewardModel:
    made = RewardModel(Scorer, FirstCoordinate, steps=60, lr=1e-2, eval_every=0, checkpoint_seconds=0.0, ema_decay=0.9)
    return dataclasses.replace(made, **fields)  # type: ignore[arg-type]


def summary(folder: Path) -> dict[str, float]:
    return json.loads((folder / "summary.json").read_text())["measures"]["pair accuracy"]


def session(made: RewardModel, folder: Path) -> RewardTraining:
    folder.mkdir(exist_ok=True)
    return RewardTraining(made, RunDir(folder), StopFlag())


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoints").glob("step-*"), key=lambda f: int(f.name.split("-")[1]))
    return load_file(str(newest / "state.safetensors"))


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


@pytest.mark.parametrize("loss", ["bradley_terry", "softmax_preference"])
def test_a_scorer_learns_what_pairs_prefer(loss: str, tmp_path: Path) -> None:
    run.start(recipe(loss=loss), tmp_path / "run")
    found = summary(tmp_path / "run")
    assert found["after"] > 0.9 > 0.75 > found["before"]


def test_with_shuffled_preferences_it_learns_nothing(tmp_path: Path) -> None:
    run.start(recipe(data=lambda: FirstCoordinate(shuffled=True)), tmp_path / "run")
    assert summary(tmp_path / "run")["after"] < 0.75


def test_a_run_leaves_model_summary_report_and_records(tmp_path: Path) -> None:
    run.start(recipe(steps=4, eval_every=2), tmp_path / "run")
    for name in ("model/model.safetensors", "report.html", "env.json", "recipe.json", "summary.json"):
        assert (tmp_path / "run" / name).is_file(), name
    assert [("heldout/pair accuracy" in line) for line in metrics(tmp_path / "run")] == [False, True, False, True]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "pair accuracy" in page and "held-out examples" in page
    assert "there are no pictures" not in page, "a reward model draws none"


def test_the_saved_model_is_the_moving_average(tmp_path: Path) -> None:
    run.start(recipe(steps=5), tmp_path / "run")
    state, saved = final_state(tmp_path / "run"), load_file(str(tmp_path / "run" / "model" / "model.safetensors"))
    names = [name for name, _ in Scorer().named_parameters()]
    for index, name in enumerate(names):
        assert_close(saved[name], state[f"ema/{index}"], rtol=0, atol=0)
        assert not torch.equal(saved[name], state[f"weights/{name}"])


def test_a_run_stopped_and_resumed_equals_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "recipe.py"
    file.write_text(
        "from tests.training.test_reward_model import recipe as made\n\n\ndef recipe():\n    return made(steps=12)\n"
    )
    source = Source(file)
    run.start(load(source), tmp_path / "whole", source)
    whole_round = RewardTraining.round

    def stopping(self: RewardTraining, step: int) -> dict[str, float]:
        found = whole_round(self, step)
        if step == 6:
            self.flag.number = signal.SIGTERM
        return found

    with monkeypatch.context() as patch:
        patch.setattr(RewardTraining, "round", stopping)
        with pytest.raises(SystemExit) as stop:
            run.start(load(source), tmp_path / "stopped", source)
    assert stop.value.code == 128 + signal.SIGTERM
    torch.manual_seed(77)  # another process has another state of the global generator
    run.resume(tmp_path / "stopped")
    whole, resumed = final_state(tmp_path / "whole"), final_state(tmp_path / "stopped")
    assert whole.keys() == resumed.keys() and any(key.startswith("optimizer/") for key in whole)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "stopped")
    assert summary(tmp_path / "whole") == summary(tmp_path / "stopped")


def test_weights_that_two_layers_share_are_saved_once_and_come_back(tmp_path: Path) -> None:
    class Tied(Scorer):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.net[0]
            self.again_weight = self.net[3].weight

        def save(self, folder: Path) -> None:
            (folder / "nothing").touch()

    run.start(recipe(model=Tied, steps=2), tmp_path / "run")
    state = final_state(tmp_path / "run")
    fresh = session(recipe(model=Tied), tmp_path / "other")
    fresh.load(state, {})
    assert_close(fresh.scorer.state_dict()["again.weight"], state["weights/net.0.weight"])


class Student(SelfDistilled):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, 6), classes=6, momentum=0.5)
        self.steps: list[int] = []

    def after_step(self, step: int) -> None:
        super().after_step(step)
        self.steps.append(step)

    def save(self, folder: Path) -> None:
        save_file(self.state_dict(), str(folder / "model.safetensors"))


class Views:
    def batch(self, size: int, rng: torch.Generator) -> ViewBatch:
        x = torch.randn(size, WIDTH, generator=rng)
        return ViewBatch(tuple(x + 0.1 * torch.randn(x.shape, generator=rng) for _ in range(3)))

    def measure(self, scorer: nn.Module) -> dict[str, float]:
        return {"centre": float(scorer.get_buffer("centre").abs().sum())}


def test_a_teacher_follows_its_student_in_the_same_loop_and_is_in_the_checkpoint(tmp_path: Path) -> None:
    made = recipe(model=Student, data=Views, loss="self_distillation", steps=3, ema_decay=None)
    training = session(made, tmp_path / "run")
    before = {k: v.clone() for k, v in training.tensors().items()}
    logs = training.round(0)
    expected = (before["weights/student.weight"] + training.tensors()["weights/student.weight"]) / 2
    assert_close(training.tensors()["weights/teacher.weight"], expected)
    for step in (1, 2):
        training.round(step)
    after = training.tensors()
    for name in ("student.weight", "teacher.weight", "centre"):
        assert not torch.equal(before[f"weights/{name}"], after[f"weights/{name}"]), name
    assert {"train/class_entropy", "train/picture_entropy"} <= logs.keys()
    assert vars(training.scorer)["steps"] == [0, 1, 2]


def test_self_distillation_wants_a_model_with_a_teacher() -> None:
    views = ViewBatch((torch.zeros(2, WIDTH), torch.zeros(2, WIDTH)))
    with pytest.raises(RecipeError, match="teacher"):
        self_distillation(Scorer(), views, torch.Generator())


def test_the_two_sides_of_a_pair_get_the_same_noise_and_level() -> None:
    pairs = FirstCoordinate().pairs(6, torch.Generator().manual_seed(0))
    noisy = pairs.noised(0.2, 0.8, torch.Generator().manual_seed(1))
    assert noisy.sigma is not None and bool(((noisy.sigma >= 0.2) & (noisy.sigma < 0.8)).all())
    assert len(set(noisy.sigma.tolist())) == 6
    scale = noisy.sigma[:, None]
    added = [n - (1 - scale) * x for n, x in ((noisy.winners, pairs.winners), (noisy.losers, pairs.losers))]
    assert_close(added[0], added[1])
    assert float(added[0].abs().mean()) > 0.1


def test_the_pictures_of_one_prompt_get_the_same_noise_and_labelled_ones_their_own() -> None:
    rng = torch.Generator().manual_seed(0)
    choice = ChoiceBatch(torch.zeros(3, 2, WIDTH), [Prompt("")] * 3, torch.tensor([[1.0, 0.0]] * 3)).noised(
        0.5, 0.9, rng
    )
    assert_close(choice.media[:, 0], choice.media[:, 1])
    label = LabelBatch(torch.zeros(3, WIDTH), [Prompt("")] * 3, torch.ones(3)).noised(0.5, 0.9, rng)
    assert len({row[0] for row in label.media.tolist()}) == 3


def test_noisy_examples_keep_sigma_one_at_noise_and_zero_at_data() -> None:
    x0, eps = torch.ones(2, 3), torch.full((2, 3), 5.0)
    assert_close(at_level(x0, eps, torch.tensor([0.0, 1.0])), torch.stack([x0[0], eps[0]]))


def test_a_scorer_of_noisy_examples_is_handed_their_level(tmp_path: Path) -> None:
    training = session(recipe(noise=(0.1, 0.6)), tmp_path / "run")
    training.round(0)
    (sigma,) = vars(training.scorer)["levels"]
    assert sigma.shape == (64,) and bool((sigma[:32] == sigma[32:]).all())
    assert bool(((sigma >= 0.1) & (sigma < 0.6)).all())


def test_yes_no_labels_and_choices_among_several_are_learnt_from() -> None:
    rng, scorer = torch.Generator().manual_seed(0), Scorer().eval()
    media = torch.randn(5, WIDTH, generator=rng)
    logits = scorer(media, ()).detach()
    loss, logs = LOSSES["yes_no"](scorer, LabelBatch(media, [Prompt("")] * 5, (logits > 0).float()), rng)
    assert logs["accuracy"] == 1.0 and loss.item() == pytest.approx(float(torch.log1p((-logits.abs()).exp()).mean()))
    best = scorer(media.repeat(2, 1), ()).reshape(2, 5).argmax(dim=1)
    choice = ChoiceBatch(media.repeat(2, 1, 1), [Prompt("")] * 2, torch.eye(5)[best])
    loss, logs = LOSSES["softmax_preference"](scorer, choice, rng)
    assert logs["accuracy"] == 1.0 and loss.requires_grad


def test_a_tie_is_half_and_half_under_softmax_and_refused_by_bradley_terry() -> None:
    same = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    pairs = PairBatch(same, same.clone(), [Prompt("")] * 3, ties=torch.ones(3, dtype=torch.bool))
    loss, _ = LOSSES["softmax_preference"](Scorer().eval(), pairs, torch.Generator())
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(RecipeError, match="softmax_preference"):
        LOSSES["bradley_terry"](Scorer(), pairs, torch.Generator())


def test_a_model_that_scores_all_alike_has_no_pair_accuracy() -> None:
    class Constant(nn.Module):
        def forward(self, media: torch.Tensor, prompts: object) -> torch.Tensor:
            return torch.zeros(len(media))

    assert pair_accuracy(Constant(), FirstCoordinate().pairs(10, torch.Generator().manual_seed(0))) == 0.0


def test_a_loss_of_the_users_own_and_specs_with_options_come_from_files(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from tests.training.test_reward_model import FirstCoordinate, Scorer\n\n\n"
        "def loss(model, batch, rng):\n    return model(batch.losers, ()).square().mean(), {'mine': 3.0}\n"
    )
    (tmp_path / "recipe.py").write_text(
        "from alignkit.training.reward_model import RewardModel\n\n\ndef recipe():\n"
        f"    at = {str(tmp_path / 'mine.py')!r}\n"
        "    return RewardModel(f'{at}:Scorer', f'{at}:FirstCoordinate(shuffled=True)', f'{at}:loss', steps=2)\n"
    )
    source = Source(tmp_path / "recipe.py")
    run.start(load(source), tmp_path / "run", source)
    assert metrics(tmp_path / "run")[0]["train/mine"] == 3.0
    (tmp_path / "mine.py").unlink()  # the run directory keeps its own copy
    again, _ = reload(tmp_path / "run")
    assert isinstance(again, RewardModel)
    assert again.data == f"{tmp_path / 'run' / 'code' / 'mine.py'}:FirstCoordinate(shuffled=True)"
    run.start(again, tmp_path / "again")


def test_callables_of_a_recipe_file_survive_the_record(tmp_path: Path) -> None:
    file = tmp_path / "recipe.py"
    file.write_text(
        "from tests.training.test_reward_model import recipe as made\n\n\ndef recipe():\n    return made(steps=1)\n"
    )
    run.start(load(Source(file)), tmp_path / "run", Source(file))
    again, _ = reload(tmp_path / "run")
    assert isinstance(again, RewardModel) and callable(again.model) and again.steps == 1


def test_the_command_line_runs_overrides_and_resumes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "recipe.py", tmp_path / "run"
    file.write_text(
        "from tests.training.test_reward_model import recipe as made\n\n\ndef recipe():\n    return made()\n"
    )
    overrides = ["--steps", "2", "--lr", "1e-3", "--loss", "softmax_preference"]
    assert main(["run", str(file), *overrides, "--out", str(out)]) == 0
    record = json.loads((out / "recipe.json").read_text())["recipe"]
    assert [record[name] for name in ("class", "steps", "lr", "loss")] == ["RewardModel", 2, 1e-3, "softmax_preference"]
    assert main(["resume", str(out)]) == 0
    assert "resuming at step 2" in capsys.readouterr().out
    assert main(["run", str(file), "--learning-rate", "1"]) == 2
    assert "did you mean --lr" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path: Path) -> None:
    def broken(model: nn.Module, batch: PairBatch, rng: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        return model(batch.winners, ()).mean() * float("nan"), {}

    training = session(recipe(loss=broken), tmp_path / "run")
    before = [p.detach().clone() for p in training.parameters]
    with pytest.raises(AlignkitError, match="step 3"):
        training.round(3)
    assert all(torch.equal(a, b) for a, b in zip(before, training.parameters))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"noise": (0.2, 1.0)}, "below|< 1"),
        ({"loss": "bradley_tery"}, "nearest: 'bradley_terry'"),
        ({"lr": 0.0}, "above 0"),
        ({"batch": 0}, "at least 1"),
        ({"ema_decay": 1.0}, "between 0 and 1"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_made(
    fields: dict[str, object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=words):
        run.start(recipe(**fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": lambda: 3}, "save"),
        ({"model": lambda: Scorer().requires_grad_(False)}, "nothing to train"),
        ({"data": lambda: 3}, "measure"),
        ({"model": "nowhere.py:x"}, "there is no file"),
        ({"model": "alignkit.types:Promt"}, "nearest: 'Prompt'"),
        ({"model": "no_such_module:x"}, "cannot be imported"),
    ],
)
def test_models_and_data_of_another_kind_are_refused_with_a_sentence(
    fields: dict[str, object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=words):
        session(recipe(**fields), tmp_path / "run")


def test_the_learning_rate_warms_up_and_falls_as_the_schedule_says() -> None:
    made = recipe(lr=1.0, warmup=4, steps=8, lr_schedule="cosine")
    assert [round(made.lr_at(step), 4) for step in (0, 3, 4)] == [0.25, round(0.5 * (1 + 0.38268), 4), 0.5]
    assert dataclasses.replace(made, lr_schedule="linear").lr_at(4) == 0.5
