"""The adversarial critic: its loss, what its head sees, and that it learns only what is there to learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards import critic as module
from alignkit.rewards.base import evaluate
from alignkit.rewards.critic import (
    CriticReward,
    Logits,
    critic_hinge,
    drawn_patches,
    fixed_patches,
    health,
    quantised,
    score,
)
from alignkit.rewards.features import Features
from alignkit.types import Prompt


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 32, 64, generator=generator(seed))


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return dict(CriticReward.tiny(tmp_path_factory.mktemp("critic")))


@pytest.fixture
def critic(options: dict[str, Any]) -> CriticReward:
    return CriticReward(**options)


def random_logits(count: int, seed: int) -> Logits:
    rng = generator(seed)
    return Logits(*(2 * torch.randn(count, *n, generator=rng, dtype=torch.float64) for n in ((), (5,))))


def test_the_loss_is_that_of_a_literal_transcription() -> None:
    real, fake = random_logits(3, seed=1), random_logits(4, seed=2)

    def side(r: list[float], f: list[float]) -> float:
        return 0.5 * (sum(max(0, 1 - x) for x in r) / len(r) + sum(max(0, 1 + x) for x in f) / len(f))

    expected = side(real.cls.tolist(), fake.cls.tolist())
    expected += 0.3 * side(real.patches.flatten().tolist(), fake.patches.flatten().tolist())
    assert critic_hinge(real, fake).item() == pytest.approx(expected, abs=1e-12)


def test_the_score_is_seven_tenths_class_token_and_three_tenths_patches() -> None:
    logits = random_logits(3, seed=1)
    expected = [0.7 * c + 0.3 * sum(p) / 5 for c, p in zip(logits.cls.tolist(), logits.patches.tolist(), strict=True)]
    torch.testing.assert_close(score(logits), torch.tensor(expected, dtype=torch.float64))


def test_health_is_accuracy_at_zero_and_the_gap_of_the_means() -> None:
    found = health(torch.tensor([1.0, -0.5]), torch.tensor([-1.0, -2.0, 0.5, -0.1]))
    assert found["accuracy"] == pytest.approx((1 / 2 + 3 / 4) / 2)
    assert found["gap"] == pytest.approx(0.25 + 0.65)


def test_drawn_patches_differ_between_images_and_come_from_the_generator_alone() -> None:
    first = drawn_patches(2, 100, 64, generator())
    assert torch.equal(first, drawn_patches(2, 100, 64, generator()))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, drawn_patches(2, 100, 64, generator(1)))
    assert all(len(set(row.tolist())) == 64 for row in first)
    assert drawn_patches(2, 10, 64, generator()).shape == (2, 10)


def test_scored_patches_are_the_same_for_every_image_and_spread_over_all() -> None:
    places = fixed_patches(3, 1369, 64)
    assert torch.equal(places[0], places[2]) and len(set(places[0].tolist())) == 64
    assert places[0].diff().unique().tolist() == [21, 22]
    assert fixed_patches(1, 10, 64)[0].tolist() == list(range(10))


def test_the_reward_of_an_image_is_the_same_at_every_call_and_in_every_batch(critic: CriticReward) -> None:
    media, prompts = images(3), [Prompt("a")] * 3
    reward: Any = critic
    together = evaluate(reward, media, prompts).scores
    assert torch.equal(together, evaluate(reward, media, prompts).scores)
    alone = torch.cat([critic(media[[i]], prompts[:1]) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_the_reward_is_the_score_of_the_head_on_normalised_features_of_the_quantised_image(
    critic: CriticReward,
) -> None:
    media = images(2)
    cls, patches = critic.extractor.network((media * 255).round() / 255)
    cls, patches = (t / t.norm(dim=-1, keepdim=True) for t in (cls, patches))
    patches = patches[:, [2, 6, 10, 14]]  # 4 of 16
    first, _, last = critic.network.layers
    head = [last(F.gelu(first(t))).squeeze(-1) for t in (cls, patches)]
    torch.testing.assert_close(critic(media, []), 0.7 * head[0] + 0.3 * head[1].mean(dim=1))


def seen_by_the_head(critic: CriticReward, run: Any) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    hook = critic.network.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach()))
    run()
    hook.remove()
    return seen


def test_training_and_scoring_feed_the_head_the_same_features_of_length_one(critic: CriticReward) -> None:
    media = images(2)
    training = seen_by_the_head(critic, lambda: critic.critic_loss(media, media, generator()))
    scoring = seen_by_the_head(critic, lambda: critic(media, []))
    for tokens in (*training, *scoring):
        torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(tokens.shape[:-1]))
    real_cls, _, fake_cls, _ = training
    assert torch.equal(real_cls, fake_cls) and torch.equal(real_cls, scoring[0])


def test_the_critic_cannot_tell_a_float_image_from_its_file_of_eight_bits(critic: CriticReward) -> None:
    media = images(2)
    stored = (media * 255).round() / 255
    assert torch.equal(critic(media, []), critic(stored, []))
    training = seen_by_the_head(critic, lambda: critic.critic_loss(stored, media, generator()))
    assert torch.equal(training[0], training[2])


def test_quantising_lets_gradients_through() -> None:
    media = torch.tensor([0.1234, 0.9], requires_grad=True)
    quantised(media).square().sum().backward()
    stored = (media.detach() * 255).round() / 255
    assert torch.equal(quantised(media).detach(), stored)
    torch.testing.assert_close(media.grad, 2 * stored)


def test_gradients_of_the_reward_reach_the_pixels_and_not_the_head(critic: CriticReward) -> None:
    media = images(2).requires_grad_()
    critic(media, []).sum().backward()
    assert media.grad is not None and media.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in critic.parameters())


def test_gradients_of_the_loss_reach_the_head_and_nothing_else(critic: CriticReward) -> None:
    real, fake = images(2).requires_grad_(), images(2, seed=1).requires_grad_()
    critic.critic_loss(real, fake, generator())[0].backward()
    assert real.grad is None and fake.grad is None
    assert all(parameter.grad is not None for parameter in critic.parameters())
    assert all(parameter.grad is None for parameter in critic.extractor.network.parameters())


def test_references_of_another_size_are_refused(critic: CriticReward) -> None:
    with pytest.raises(RewardError, match="learn the resolution"):
        critic.critic_loss(torch.rand(2, 3, 64, 64), images(2), generator())


class Blobs:
    """Features that are the pixels themselves, brought to length 1."""

    width = 12

    def features(self, media: torch.Tensor) -> Features:
        flat = F.normalize(media.flatten(1) - 0.5, dim=-1)
        return Features(flat, flat.unsqueeze(1).repeat(1, 3, 1))


def blobs(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two Gaussian blobs as images (count, 3, 2, 2): what is real has a brighter first row."""
    rng = generator(seed)
    real, fake = (0.5 + 0.1 * torch.randn(2, count, 3, 2, 2, generator=rng)).unbind(0)
    real[:, :, 0] += 0.15
    return real, fake


def held_out_accuracy(shuffled: bool) -> dict[str, float]:
    critic = CriticReward(hidden=16)
    vars(critic)["extractor"] = Blobs()
    optimizer, rng = torch.optim.Adam(critic.parameters(), lr=1e-2), generator(7)
    for step in range(80):
        real, fake = blobs(32, seed=step)
        if shuffled:
            both = torch.cat([real, fake])[torch.randperm(64, generator=rng)]
            real, fake = both[:32], both[32:]
        loss, _ = critic.critic_loss(real, fake, rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        critic.update_average()
    real, fake = blobs(500, seed=1000)
    return health(critic(real, []), critic(fake, []))


def test_the_critic_learns_to_tell_two_blobs_apart() -> None:
    found = held_out_accuracy(shuffled=False)
    assert found["accuracy"] > 0.9 and found["gap"] > 1


def test_the_critic_learns_nothing_from_shuffled_labels() -> None:
    found = held_out_accuracy(shuffled=True)
    assert found["accuracy"] < 0.65 and found["gap"] < 0.3


def step(critic: CriticReward, lr: float = 0.1) -> None:
    optimizer = torch.optim.SGD(critic.parameters(), lr=lr)
    critic.critic_loss(images(2), images(2, seed=1), generator())[0].backward()
    optimizer.step()
    optimizer.zero_grad()


def test_the_average_moves_by_its_decay_and_scores_by_itself(critic: CriticReward) -> None:
    before = critic.state()
    step(critic)
    assert torch.equal(critic.average(images(2), []), CriticReward.by(critic, critic.averaged, images(2)))
    assert not torch.equal(critic.average(images(2), []), critic(images(2), []))
    critic.update_average()
    after = critic.state()
    key = "layers.0.weight"
    expected = 0.99 * before[f"average.{key}"] + 0.01 * after[f"head.{key}"]
    torch.testing.assert_close(after[f"average.{key}"], expected)
    assert critic.average.name == "critic_average"


def test_a_loaded_state_scores_as_before_and_keeps_the_parameters(options: dict[str, Any]) -> None:
    trained, fresh = CriticReward(**options), CriticReward(**options)
    step(trained)
    trained.update_average()
    parameters = fresh.parameters()
    fresh.load(trained.state())
    media = images(2)
    assert torch.equal(fresh(media, []), trained(media, []))
    assert torch.equal(fresh.average(media, []), trained.average(media, []))
    assert all(a is b for a, b in zip(parameters, fresh.parameters(), strict=True))


def test_a_state_is_a_copy(critic: CriticReward) -> None:
    state = critic.state()
    step(critic)
    assert not torch.equal(state["head.layers.0.weight"], critic.state()["head.layers.0.weight"])


def test_a_saved_state_is_a_head_file(options: dict[str, Any], tmp_path: Path) -> None:
    trained = CriticReward(**options)
    step(trained)
    trained.update_average()
    save_file(trained.state(), tmp_path / "critic.safetensors")
    again = CriticReward(**{**options, "head": str(tmp_path / "critic.safetensors")})
    assert torch.equal(again(images(2), []), trained(images(2), []))
    assert torch.equal(again.average(images(2), []), trained.average(images(2), []))


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_a_head_in_the_published_classes_layout_is_read(ending: str, options: dict[str, Any], tmp_path: Path) -> None:
    state = {name: value + 1 for name, value in CriticReward(**options).network.state_dict().items()}
    assert set(state) == {"layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias"}
    path = tmp_path / f"head{ending}"
    if ending == ".pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    critic = CriticReward(**{**options, "head": str(path)})
    torch.testing.assert_close(critic.network.state_dict(), state)
    torch.testing.assert_close(critic.averaged.state_dict(), state)


def test_a_head_saved_as_a_checkpoint_is_opened_and_one_that_holds_code_is_refused(
    options: dict[str, Any], tmp_path: Path
) -> None:
    state = {name: value + 1 for name, value in CriticReward(**options).network.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "head.pth")
    critic = CriticReward(**{**options, "head": str(tmp_path / "head.pth")})
    torch.testing.assert_close(critic.network.state_dict(), state)
    torch.save(critic.network, tmp_path / "head.pth")
    with pytest.raises(RewardError, match="more than tensors"):
        CriticReward(**{**options, "head": str(tmp_path / "head.pth")}).prepare()


def test_a_head_of_another_width_or_without_a_layer_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RewardError, match="no head of this critic.*check `hidden`"):
        CriticReward(**{**options, "hidden": 32}).prepare()
    critic = CriticReward(**options)
    state = critic.state()
    del state["average.layers.2.bias"]
    with pytest.raises(RewardError, match=r"'layers.2.bias' has shape none"):
        critic.load(state)


def test_a_new_head_depends_on_its_seed_alone(options: dict[str, Any]) -> None:
    new = {**options, "head": ""}
    torch.manual_seed(1)
    first = CriticReward(**new)(images(2), [])
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(first, CriticReward(**new)(images(2), []))
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first, CriticReward(**new, seed=5)(images(2), []))


def test_impossible_options_are_refused() -> None:
    with pytest.raises(RecipeError, match="patches=0"):
        CriticReward(patches=0)
    with pytest.raises(RecipeError, match=r"ema_decay=1.0"):
        CriticReward(ema_decay=1.0)


def test_the_published_sizes_are_the_defaults() -> None:
    assert CriticReward().patches == 64 and CriticReward().hidden == 512 and CriticReward().size == (518, 518)
    assert (module.CLS_SHARE, module.PATCH_WEIGHT) == (0.7, 0.3)
