"""Weights on disk, options in specs, tiny stand-ins."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file

from alignkit.errors import RecipeError
from alignkit.rewards import Files, MissingWeights, Weighted, describe, evaluate, load
from alignkit.rewards.loading import split_options, split_specs, tiny, with_options
from alignkit.rewards.weights import frozen, locate, on, present

HUB = "nobody/has-such-weights"


@dataclass(frozen=True, eq=False)
class Remote:
    """A reward whose one weight is on the hub."""

    weights: str = HUB
    factor: float = 1.0
    name: str = "remote"
    kind: ClassVar[str] = "image"
    differentiable: ClassVar[bool] = False

    def files(self) -> tuple[Files, ...]:
        return (Files(self.weights, ("scale.safetensors",)),)

    @classmethod
    def tiny(cls, folder: Path) -> dict[str, Any]:
        save_file({"scale": torch.tensor([2.0])}, folder / "scale.safetensors")
        return {"weights": str(folder)}

    def prepare(self) -> None:
        locate(*self.files())

    def __call__(self, media: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        scale = load_tensors(locate(*self.files()) / "scale.safetensors")["scale"]
        return media.mean(dim=(1, 2, 3)) * scale * self.factor


SPEC = f"{__file__}:Remote"
MEDIA = torch.full((2, 3, 4, 4), 0.25)


def test_weights_that_are_nowhere_name_the_hub_id_and_the_command() -> None:
    with pytest.raises(MissingWeights, match=rf"{HUB}.*alignkit fetch"):
        locate(Files(HUB, ("scale.safetensors",)))
    assert not present(Files(HUB, ("*",)))


def test_missing_weights_stop_a_run_even_where_failures_are_masked() -> None:
    rewards = Weighted({Remote(): 1.0}, on_error="mask")
    with pytest.raises(MissingWeights, match=HUB):
        rewards(MEDIA, ["a", "b"])
    with pytest.raises(MissingWeights, match=HUB):
        rewards.prepare()


def test_a_local_folder_without_the_files_says_which_are_lacking(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(MissingWeights, match=r"lack \*\.safetensors\|\*\.bin"):
        locate(Files(str(tmp_path), ("config.json", "*.safetensors|*.bin")))


def test_either_of_two_patterns_is_enough(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    assert locate(Files(str(tmp_path), ("*.safetensors|*.bin",))) == tmp_path


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/place", "a/b/c", "only-one-word"])
def test_what_can_be_no_hub_id_is_a_missing_file(source: str) -> None:
    with pytest.raises(MissingWeights, match="no such file or folder"):
        locate(Files(source, ()))


def test_shipped_files_are_found_by_their_prefix() -> None:
    assert locate(Files("shipped:assets/signs", ("world.json",))).name == "signs"


def test_options_stand_behind_a_name() -> None:
    assert split_options('dino(references="a:b, c", top=2)') == ("dino", {"references": "a:b, c", "top": 2})
    assert split_options("file.py:name") == ("file.py:name", {})
    assert with_options('x(a=1, b="c")', {"a": 2}) == "x(a=2, b='c')"


@pytest.mark.parametrize(
    "spec", ["ocr(detect=maybe)", "ocr(True)", "ocr(**{})", "ocr(detect=)", "ocr(threads=1) + (2)"]
)
def test_options_that_are_no_literals_by_name_are_refused_with_an_example(spec: str) -> None:
    with pytest.raises(RecipeError, match=r"Python literals by name"):
        load(spec)


def test_an_option_that_the_class_does_not_take_is_refused() -> None:
    with pytest.raises(RecipeError, match="colour"):
        load("ocr(colour=1)")


def test_specs_in_a_list_are_separated_by_commas_outside_parentheses_and_quotes() -> None:
    assert split_specs('ocr, b(x=1,y="(,"), c.py:d') == ["ocr", 'b(x=1,y="(,")', "c.py:d"]


def test_a_spec_with_options_makes_the_reward_with_them(tmp_path: Path) -> None:
    Remote.tiny(tmp_path)
    reward = load(f"{SPEC}(factor=3.0, weights={str(tmp_path)!r})")
    torch.testing.assert_close(evaluate(reward, MEDIA, ["a", "b"]).scores, torch.full((2,), 1.5))
    assert describe(reward)["options"] == {"weights": str(tmp_path), "factor": 3.0}


def test_tiny_replaces_weights_of_the_hub_and_keeps_the_other_options(tmp_path: Path) -> None:
    spec = tiny(f"{SPEC}(factor=3.0)", tmp_path)
    assert isinstance(spec, str)
    torch.testing.assert_close(evaluate(load(spec), MEDIA, ["a", "b"]).scores, torch.full((2,), 1.5))
    replaced = tiny(Remote(factor=2.0), tmp_path)
    assert isinstance(replaced, Remote)
    torch.testing.assert_close(evaluate(replaced, MEDIA, ["a", "b"]).scores, torch.full((2,), 1.0))


def test_tiny_leaves_rewards_that_need_nothing_from_the_hub(tmp_path: Path) -> None:
    Remote.tiny(tmp_path)
    local = f"{SPEC}(weights={str(tmp_path)!r})"
    assert tiny(local, tmp_path / "made") == local
    assert tiny("brightness", tmp_path / "made") == "brightness"


def test_a_frozen_network_has_no_gradients_of_its_own_and_follows_the_media() -> None:
    module = frozen(torch.nn.Linear(2, 2), "bfloat16")
    assert not module.training
    assert all(not p.requires_grad and p.dtype == torch.bfloat16 for p in module.parameters())
    assert on(module, torch.device("meta")).weight.device.type == "meta"
    with pytest.raises(RecipeError, match="bfloat16"):
        frozen(torch.nn.Linear(2, 2), "int3")


class Turning(torch.nn.Module):
    """Frequencies that are computed and not saved, statistics that are saved, a scale and a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.full((2,), 1 / 3), persistent=False)
        self.register_buffer("statistics", torch.full((2,), 1 / 3))
        self.scale = torch.nn.Parameter(torch.tensor(1 / 3))
        self.matrix = torch.nn.Parameter(torch.full((2, 2), 1 / 3))


def test_frequencies_that_no_file_holds_and_scales_are_not_rounded_to_the_dtype_of_the_weights() -> None:
    inner = Turning()
    module = frozen(torch.nn.Sequential(inner), "bfloat16")
    torch.testing.assert_close(inner.frequencies, torch.full((2,), 1 / 3), rtol=0, atol=0)
    torch.testing.assert_close(inner.scale.data, torch.tensor(1 / 3), rtol=0, atol=0)
    assert {inner.statistics.dtype, inner.matrix.dtype} == {torch.bfloat16}
    assert module.state_dict().keys() == {"0.statistics", "0.scale", "0.matrix"}
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert on(module, torch.device("meta")) is module and inner.frequencies.device.type == "meta"


def test_tiny_keeps_the_judge_that_a_win_rate_was_given(tmp_path: Path) -> None:
    spec = tiny('win_rate(judge="unified_reward_pair", batch=2)', tmp_path)
    place, options = split_options(spec)
    assert (place, options["batch"]) == ("win_rate", 2)
    assert split_options(options["judge"])[0] == "unified_reward_pair"
    assert Path(split_options(options["judge"])[1]["weights"]).is_dir()


def test_a_file_that_ships_is_found_by_its_prefix() -> None:
    reward = load("shipped:recipes/signs/fonts.py:serif")
    assert reward.name == "serif" and describe(reward)["sha256"]


def test_weights_in_several_files_of_which_one_is_missing_are_not_here(tmp_path: Path) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {"a": names[0], "b": names[1]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (tmp_path / names[0]).write_bytes(b"")
    files = Files(str(tmp_path), ("model*.safetensors",))
    with pytest.raises(MissingWeights, match=names[1]):
        locate(files)
    assert not present(files)
    assert present(Files(str(tmp_path), ("*.index.json",))), "weights that are not asked for are not missed"
    (tmp_path / names[1]).write_bytes(b"")
    assert present(files)
