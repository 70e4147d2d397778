"""A head on the generator's own first blocks: its files, what it refuses, and one forward for several dimensions."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from alignkit.errors import RecipeError, RewardError
from alignkit.policy import LoRA, Policy
from alignkit.rewards import MissingWeights, Weighted, load
from alignkit.rewards.base import Binds, NoiseAware, Prepares, Reward
from alignkit.rewards.noise_aware import NoiseAwareReward, write_random
from alignkit.rewards.noisy_head import Head, HeadConfig, NoisyScorer, level_embedding
from tests.policy.zoo import PROMPTS, ZOO, shared

CONFIG = HeadConfig("StableDiffusion3Pipeline", ("legibility", "colour"), width=16, depth=1, blocks="own", hidden=8)


def conditioned(policy: Policy, name: str = "sd3") -> Any:
    return policy.condition(list(PROMPTS), num_steps=3, **ZOO[name].call, **next(iter(ZOO[name].variants.values())))


def latents_of(policy: Policy, cond: Any) -> torch.Tensor:
    return policy.initial_latents(cond, torch.Generator().manual_seed(0))


def rewards_of(folder: Path, policy: Policy) -> list[NoiseAwareReward]:
    return [NoiseAwareReward(str(folder), name).bind(policy) for name in ("legibility", "colour")]


@pytest.fixture(params=["own", "shared"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_random(tmp_path, Policy(shared("sd3")), dataclasses.replace(CONFIG, blocks=request.param))
    return tmp_path


def test_a_saved_head_scores_as_it_did_and_only_for_its_dimension(folder: Path) -> None:
    policy = Policy(shared("sd3"))
    cond = conditioned(policy)
    x, sigma = latents_of(policy, cond), torch.tensor([0.3, 0.8])
    scorer = NoisyScorer.of(HeadConfig.read(folder / "config.json"), policy)
    scorer.fill(load_file(folder / "model.safetensors"), folder)
    expected = scorer.scores(policy, x, sigma, cond)
    first, second = rewards_of(folder, policy)
    assert isinstance(first, NoiseAware) and isinstance(first, Reward) and isinstance(first, Binds)
    assert (first.name, second.name, first.noise_aware, first.kind) == ("legibility", "colour", True, "latent")
    assert_close(torch.stack([first(x, sigma, cond), second(x, sigma, cond)], dim=1), expected)
    assert expected.shape == (2, 2) and expected.unique().numel() == 4


def test_gradients_reach_the_latents_and_no_weight(folder: Path) -> None:
    policy = Policy(shared("sd3"))
    cond = conditioned(policy)
    x = latents_of(policy, cond).requires_grad_()
    reward = rewards_of(folder, policy)[0]
    reward(x, torch.tensor([0.3, 0.8]), cond).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.flatten(1).abs().amax(dim=1).gt(0).all()
    assert not any(p.requires_grad for p in reward._scorer.parameters())


def test_dimensions_of_one_folder_share_a_head_and_a_forward(folder: Path) -> None:
    policy = Policy(shared("sd3"))
    cond, sigma = conditioned(policy), torch.tensor([0.3, 0.8])
    x = latents_of(policy, cond)
    first, second = rewards_of(folder, policy)
    assert first._scorer is second._scorer
    calls: list[int] = []
    hook = first._scorer.head.register_forward_hook(lambda *_: calls.append(1))
    first(x, sigma, cond)
    second(x, sigma.clone(), cond)
    assert len(calls) == 1
    first(x, sigma / 2, cond)
    second(x, sigma / 2, conditioned(policy))
    second(x.clone(), sigma / 2, cond)
    assert len(calls) == 4, "another level, another conditioning, another tensor"
    x.add_(1)
    first(x, sigma / 2, cond)
    assert len(calls) == 5, "the tensor was changed in place"
    hook.remove()


def test_scores_without_gradient_are_not_given_where_a_gradient_is_asked_for(folder: Path) -> None:
    policy = Policy(shared("sd3"))
    cond, sigma = conditioned(policy), torch.tensor([0.3, 0.8])
    x = latents_of(policy, cond).requires_grad_()
    first, second = rewards_of(folder, policy)
    with torch.no_grad():
        first(x, sigma, cond)
    (one,) = torch.autograd.grad(first(x, sigma, cond).sum(), x)
    (other,) = torch.autograd.grad(second(x, sigma, cond).sum(), x)  # the shared graph is spent by now
    assert not torch.allclose(one, other)


def test_the_score_of_a_sample_does_not_depend_on_its_batch(folder: Path) -> None:
    policy = Policy(shared("sd3"))
    cond, sigma = conditioned(policy), torch.tensor([0.3, 0.8])
    x = latents_of(policy, cond)
    reward = rewards_of(folder, policy)[0]
    alone = torch.cat([reward(x[i : i + 1], sigma[i : i + 1], cond[[i]]) for i in range(2)])
    assert_close(reward(x, sigma, cond), alone, rtol=1e-5, atol=1e-5)
    assert reward(x[:0], sigma[:0], cond).shape == (0,)


def test_adapters_that_are_trained_do_not_change_the_scores(folder: Path) -> None:
    with Policy(ZOO["sd3"].build(), train=LoRA(rank=2)) as policy:
        cond, sigma = conditioned(policy), torch.tensor([0.3, 0.8])
        x, reward = latents_of(policy, cond), rewards_of(folder, policy)[0]
        before = reward(x, sigma, cond).clone()
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.fill_(0.1)
        assert_close(reward(x.clone(), sigma, cond), before)


def test_weighted_rewards_score_clean_latents_by_it(folder: Path) -> None:
    policy = Policy(shared("sd3"))
    cond = conditioned(policy)
    x = latents_of(policy, cond)
    both = Weighted({f"noise_aware(weights={str(folder)!r}, dimension='colour')": 2.0})
    both.bind(policy)
    found = both(torch.zeros(2, 3, 8, 8), cond.prompts, x, cond)
    assert_close(found.total, 2 * rewards_of(folder, policy)[1](x, torch.zeros(2), cond))


def test_the_head_reads_only_the_last_tokens_where_it_was_told_to(tmp_path: Path) -> None:
    policy = Policy(shared("sd3"))
    cond, sigma = conditioned(policy), torch.tensor([0.3, 0.8])
    x = latents_of(policy, cond)
    config = dataclasses.replace(CONFIG, blocks="shared", tokens=5)
    torch.manual_seed(0)
    scorer = NoisyScorer.of(config, policy)
    tokens = policy.features(x, policy.timestep_of(sigma), cond, 1)
    assert_close(scorer.scores(policy, x, sigma, cond), scorer.head(tokens[:, -5:], sigma))
    assert not torch.allclose(scorer.scores(policy, x, sigma, cond), scorer.head(tokens, sigma))


def test_the_head_is_query_attention_over_tokens() -> None:
    """Against the same written out with loops over samples, dimensions and queries."""
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, queries=2, heads=1)
    head, tokens, sigma = Head(config).double(), torch.randn(2, 5, 16, dtype=torch.float64), torch.tensor([0.2, 0.7])
    head.level.float()
    found = head(tokens, sigma)
    for b in range(2):
        level = head.level(level_embedding(sigma[b : b + 1]))[0].double()
        x = head.enter(head.norm(tokens[b])) + level
        x = head.ready(x + head.inner(x))
        keys, values = head.keys(x), head.values(x)
        for d in range(2):
            read = [F.softmax(keys @ q / math.sqrt(8), dim=0) @ values for q in head.queries[d]]
            inner = F.gelu(torch.cat(read) @ head.first[d] + head.bias[d] + level)
            assert_close(found[b, d], inner @ head.last[d])


def test_noise_levels_are_embedded_apart() -> None:
    found = level_embedding(torch.linspace(0, 1, 101))
    distance = torch.cdist(found, found) + 10 * torch.eye(101)
    assert distance.min() > 0.1
    assert_close(found[0], torch.tensor([0.0] * 64 + [1.0] * 64))


# files and refusals


def test_of_its_own_blocks_only_what_was_trained_is_kept(tmp_path: Path) -> None:
    policy = Policy(shared("sd3"))
    cond, sigma = conditioned(policy), torch.tensor([0.3, 0.8])
    scorer = NoisyScorer.of(CONFIG, policy)
    for name, value in scorer.named_parameters():
        value.requires_grad_("norm1." not in name)
    with torch.no_grad():
        for value in scorer.parameters():
            value.add_(0.1 * value.requires_grad)
    scorer.save(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert not any("norm1." in name for name in saved) and any(name.startswith("blocks.0.attn") for name in saved)
    assert {value.dtype for value in saved.values()} == {torch.float16}
    x = latents_of(policy, cond)
    again = NoisyScorer.load(tmp_path, policy).scores(policy, x, sigma, cond)
    assert_close(again, scorer.scores(policy, x, sigma, cond), rtol=1e-2, atol=1e-2)


def test_a_head_of_clean_latents_is_not_noise_aware(tmp_path: Path) -> None:
    write_random(tmp_path, Policy(shared("sd3")), dataclasses.replace(CONFIG, noise=None))
    assert not NoiseAwareReward(str(tmp_path), "colour").noise_aware


def test_another_pipeline_is_refused_with_both_classes(folder: Path) -> None:
    with pytest.raises(RecipeError, match="blocks of StableDiffusion3Pipeline, and the generator is a QwenImage"):
        NoiseAwareReward(str(folder), "colour").bind(Policy(shared("qwen_image")))


def test_what_shows_no_features_is_refused(folder: Path) -> None:
    with pytest.raises(RecipeError, match="reads hidden states of a generator; object shows none"):
        NoiseAwareReward(str(folder), "colour").bind(object())


def test_tokens_of_another_width_are_refused(tmp_path: Path) -> None:
    policy = Policy(shared("sd3"))
    cond = conditioned(policy)
    write_random(tmp_path, policy, dataclasses.replace(CONFIG, blocks="shared", width=12))
    with pytest.raises(RewardError, match="width 16, and this head was trained on 12"):
        NoiseAwareReward(str(tmp_path), "colour").bind(policy)(latents_of(policy, cond), torch.zeros(2), cond)


def test_a_dimension_that_the_head_does_not_judge_is_refused_with_those_it_does(folder: Path) -> None:
    reward = load(f"noise_aware(weights={str(folder)!r}, dimension='beauty')")
    assert isinstance(reward, Prepares)
    with pytest.raises(RecipeError, match="judges legibility, colour"):
        reward.prepare()
    with pytest.raises(RecipeError, match="dimension=''"):
        NoiseAwareReward(str(folder)).prepare()


def test_a_head_without_a_generator_says_how_to_give_it_one(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"bind\(policy\)"):
        NoiseAwareReward(str(folder), "colour")(torch.zeros(1, 4, 4, 4), torch.zeros(1), None)


def test_missing_and_spoilt_files_are_named(folder: Path) -> None:
    policy = Policy(shared("sd3"))
    state = load_file(folder / "model.safetensors")
    save_file(state | {"head.last": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(RewardError, match=r"'head.last' has shape \(3,\), expected \(2, 8\)"):
        NoiseAwareReward(str(folder), "colour").bind(policy)
    save_file({n: v for n, v in state.items() if n != "head.last"}, folder / "model.safetensors")
    with pytest.raises(RewardError, match=r"'head.last' has shape None"):
        NoiseAwareReward(str(folder), "colour").bind(policy)
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingWeights, match=r"lack model\.safetensors"):
        NoiseAwareReward(str(folder), "colour").prepare()


@pytest.mark.parametrize("change", [{"format": 2}, {"surprise": 1}])
def test_another_format_is_refused(folder: Path, change: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | change), "utf-8")
    with pytest.raises(RewardError, match="no head of noised latents of format 1"):
        NoiseAwareReward(str(folder), "colour").prepare()


@pytest.mark.parametrize("change", [{"dimensions": ()}, {"dimensions": ("a", "a")}, {"blocks": "mine"}, {"heads": 3}])
def test_a_config_that_cannot_work_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(change))):
        dataclasses.replace(CONFIG, **change)
