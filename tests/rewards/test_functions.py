from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards import RewardFailure, as_reward, evaluate, load
from alignkit.types import Prompt

PROMPTS = [Prompt("one", id=11, columns={"target": "A"}), Prompt("two", id=12), Prompt("three", id=13)]


@pytest.fixture
def media(rng: torch.Generator) -> torch.Tensor:
    return torch.rand(3, 3, 8, 8, generator=rng)


def test_a_plain_function_gets_media_and_prompts_by_position(media: torch.Tensor) -> None:
    def redness(pictures, texts):
        assert [type(text) for text in texts] == [Prompt] * 3
        return pictures[:, 0].mean(dim=(1, 2))

    reward = as_reward(redness)
    assert (reward.name, reward.kind, reward.differentiable) == ("redness", "image", False)
    torch.testing.assert_close(reward(media, PROMPTS), media[:, 0].mean(dim=(1, 2)))


def test_a_function_declares_kind_and_gradients_by_attributes(media: torch.Tensor) -> None:
    def motion(media, prompts):
        return media.diff(dim=1).abs().mean(dim=(1, 2, 3, 4))

    motion.kind, motion.differentiable, motion.name = "video", True, "moves"
    reward = as_reward(motion)
    assert (reward.name, reward.kind, reward.differentiable) == ("moves", "video", True)


def test_a_function_in_the_style_of_trl_gets_columns_as_lists_by_keyword(media: torch.Tensor) -> None:
    seen = {}

    def trl(prompts, completions, target, **kwargs):
        seen.update(prompts=prompts, completions=completions, target=target, others=sorted(kwargs))
        return [1.0, None, 0.5]

    scores = as_reward(trl)(media, PROMPTS)
    assert seen["target"] == ["A", None, None]
    assert seen["prompts"] == PROMPTS and seen["completions"].shape == media.shape
    assert seen["others"] == ["images"]
    assert scores[0] == 1.0 and scores[2] == 0.5 and scores[1].isnan()


def test_prompts_before_images_is_called_by_keyword(media: torch.Tensor) -> None:
    def swapped(prompts, images):
        return [float(image.mean()) for image in images]

    torch.testing.assert_close(as_reward(swapped)(media, PROMPTS), media.mean(dim=(1, 2, 3)))


def test_a_function_whose_first_parameter_is_media_is_called_by_position_even_with_keywords() -> None:
    def reward(media, prompts, **kwargs):
        assert kwargs == {}
        return [float(len(prompt)) for prompt in prompts]

    torch.testing.assert_close(as_reward(reward)(torch.rand(2, 3, 4, 4), ["a", "bc"]), torch.tensor([1.0, 2.0]))


def test_a_missing_column_is_named_with_the_columns_found(media: torch.Tensor) -> None:
    def needs(images, prompts, answer):
        return [0.0] * len(prompts)

    with pytest.raises(RewardError, match=r"'answer'.*columns found: target"):
        as_reward(needs)(media, PROMPTS)


def test_a_function_that_takes_one_argument_is_refused_when_it_is_loaded() -> None:
    with pytest.raises(RecipeError, match=r"expected \(media, prompts\)"):
        as_reward(lambda pictures: pictures.mean())


@pytest.mark.parametrize(
    "answer",
    [
        [0.0, 1, True],
        (0.0, 1.0, 1.0),
        np.array([0, 1, 1]),
        np.array([0, 1, 1], dtype=np.float64)[::-1][::-1],
        torch.tensor([0, 1, 1]),
        torch.tensor([0, 1, 1], dtype=torch.float64),
        torch.tensor([False, True, True]),
        [torch.tensor(0.0), torch.tensor([1.0]), np.float64(1)],
        [np.float32(0), np.int64(1), np.bool_(True)],
    ],
    ids=str,
)
def test_numbers_of_any_type_become_float32(answer, media: torch.Tensor) -> None:
    scores = evaluate(as_reward(lambda m, p: answer), media, PROMPTS).scores
    torch.testing.assert_close(scores, torch.tensor([0.0, 1.0, 1.0]), check_dtype=True)


def test_one_number_is_the_score_of_one_sample_and_not_of_three(media: torch.Tensor) -> None:
    reward = as_reward(lambda m, p: np.float64(0.25))
    assert evaluate(reward, media[:1], PROMPTS[:1]).scores.tolist() == [0.25]
    with pytest.raises(RewardError, match=r"\(\); expected \(3,\)"):
        evaluate(reward, media, PROMPTS)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([0.0, 1.0], "returned 2 scores; expected 3"),
        ([0.0, "high", 1.0], "str 'high' for sample 1"),
        (np.array(["a", "b", "c"]), "str 'a' for sample 0"),
        ("0.5", "returned str"),
        (torch.zeros(3, 1), r"shape \(3, 1\); expected \(3,\)"),
        ([[0.0], [1.0], [1.0]], "list '\\[0.0\\]' for sample 0"),
        ({"score": [0.0, 1.0, 1.0]}, "returned dict"),
        (torch.zeros(3, dtype=torch.complex64), "complex"),
        (None, "returned NoneType"),
    ],
    ids=str,
)
def test_any_other_answer_is_refused_naming_reward_and_index(answer, message: str, media: torch.Tensor) -> None:
    def odd(media, prompts):
        return answer

    with pytest.raises(RewardError, match=rf"reward 'odd' .*{message}"):
        evaluate(as_reward(odd), media, PROMPTS)


def test_gradients_survive_a_list_of_tensors(media: torch.Tensor) -> None:
    def listed(media, prompts):
        return [image.mean() for image in media]

    listed.differentiable = True
    leaf = media.clone().requires_grad_()
    as_reward(listed)(leaf, PROMPTS).sum().backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, torch.full_like(media, 1 / (3 * 8 * 8)))


def test_a_reward_that_promises_gradients_and_detaches_is_found(media: torch.Tensor) -> None:
    def detached(media, prompts):
        return media.detach().mean(dim=(1, 2, 3))

    detached.differentiable = True
    with pytest.raises(RewardError, match="differentiable=True but its scores carry no gradient"):
        evaluate(as_reward(detached), media.requires_grad_(), PROMPTS)


def test_a_reward_that_is_not_differentiable_builds_no_graph(media: torch.Tensor) -> None:
    scores = evaluate(as_reward(lambda m, p: m.mean(dim=(1, 2, 3))), media.requires_grad_(), PROMPTS).scores
    assert not scores.requires_grad


@pytest.mark.parametrize("write", [lambda m: m.mul_(2), lambda m: m.numpy().__setitem__((0, 0, 0, 0), 0.5)])
def test_a_reward_that_writes_into_its_media_is_found(write, media: torch.Tensor) -> None:
    def scribbles(media, prompts):
        write(media)
        return [0.0] * len(prompts)

    with pytest.raises(RewardError, match="'scribbles' changed the media"):
        evaluate(as_reward(scribbles), media, PROMPTS)


def test_writing_into_inference_tensors_is_found_too() -> None:
    with torch.inference_mode():
        media = torch.full((2, 3, 4, 4), 0.5)
        with pytest.raises(RewardError, match="changed the media"):
            evaluate(as_reward(lambda m, p: m.mul_(0.5).mean(dim=(1, 2, 3))), media, ["a", "b"])


@pytest.mark.parametrize(
    ("media", "message"),
    [
        (torch.zeros(2, 4, 3, 8, 8), r"scores images .*given video.*PerFrameMean\('lambda_\w*'\)"),
        (torch.zeros(2, 1, 8, 8), r"given \(2, 1, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "media / 255"),
        (torch.zeros(3, 3, 8, 8), "3 samples and 2 prompts"),
    ],
)
def test_wrong_media_are_refused(media: torch.Tensor, message: str) -> None:
    def lambda_(media, prompts):
        return [0.0] * len(prompts)

    with pytest.raises(RewardError, match=message):
        evaluate(as_reward(lambda_), media, ["a", "b"])


def test_one_text_instead_of_a_list_of_prompts_is_refused() -> None:
    with pytest.raises(RewardError, match="expected a list"):
        evaluate(as_reward(lambda m, p: [0.0]), torch.zeros(1, 3, 4, 4), "a")


def test_an_exception_of_the_users_code_is_named_and_kept_as_cause(media: torch.Tensor) -> None:
    def fails(media, prompts):
        raise KeyError("lost")

    with pytest.raises(RewardFailure, match=r"'fails' failed on 3 samples \(prompts 11 'one'.*KeyError") as caught:
        evaluate(as_reward(fails), media, PROMPTS)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(("attribute", "value"), [("kind", "audio"), ("differentiable", "yes"), ("name", "")])
def test_a_declaration_of_the_wrong_kind_is_refused(attribute: str, value: str) -> None:
    def reward(media, prompts):
        return [0.0]

    setattr(reward, attribute, value)
    with pytest.raises(RecipeError, match=attribute):
        as_reward(reward)


def test_what_is_not_callable_is_no_reward() -> None:
    with pytest.raises(RecipeError, match="given float"):
        load(0.5)  # type: ignore[arg-type]


def test_none_is_not_applicable_and_nan_is_a_failure(media: torch.Tensor) -> None:
    evaluation = evaluate(as_reward(lambda m, p: [None, math.nan, 1.0]), media, PROMPTS)
    assert evaluation.applicable.tolist() == [False, True, True]
    assert evaluation.failed.tolist() == [False, True, False]


def test_a_reward_of_latents_takes_any_shape() -> None:
    def small(latents, prompts):
        return -latents.flatten(1).norm(dim=1)

    small.kind = "latent"
    assert as_reward(small)(torch.ones(2, 16, 4), ["a", "b"]).tolist() == [-8.0, -8.0]
