"""Every method of guidance for two steps on tiny pipelines of many families, through `alignkit.guide`.

Denoiser calls are counted twice: by the method's own account, and by hooks on the pipeline's real denoisers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import alignkit
from alignkit.inference.gradients import DPS, NRG
from alignkit.inference.guide import Guided
from alignkit.inference.method import BestOfN, Method
from alignkit.inference.particles import DAS, FK
from alignkit.inference.reno import ReNO
from alignkit.inference.search import Search
from alignkit.policy import Policy
from alignkit.policy.adapters import denoisers
from alignkit.rewards.noise_aware import NoiseAwareReward, write_random
from alignkit.rewards.noisy_head import HeadConfig
from tests.policy.test_untouched import portrait
from tests.policy.zoo import PROMPTS, ZOO, shared

STEPS = 2
FAMILIES = (
    *("sd15", "sdxl", "sd3", "flux", "qwen_image", "pixart", "sana", "z_image"),
    *("wan_t2v", "ltx_t2v", "hunyuan_video", "cogvideox_t2v"),
)
BELOW_NOISE = ("sd15", "sdxl")
"""Grids that begin below noise level 1, where guidance by gradients acts at the first step too."""


@dataclass
class Watched:
    """Mean pixel, differentiable; what came and what gradient went back is kept."""

    kind: str
    name: str = "mean"
    differentiable: bool = True
    gradients: list[Tensor] = field(default_factory=list)

    def __call__(self, media: Tensor, prompts: Sequence[str]) -> Tensor:
        if media.requires_grad:
            media.register_hook(self.gradients.append)
        return media.flatten(1).mean(1)


@dataclass
class WatchedLatents:
    """Minus the mean square of the latents, at any noise level."""

    name: str = "small"
    kind: str = "latent"
    differentiable: bool = True
    noise_aware: bool = True
    gradients: list[Tensor] = field(default_factory=list)
    levels: list[Tensor] = field(default_factory=list)

    def __call__(self, latents: Tensor, sigma: Tensor, cond: Any) -> Tensor:
        self.levels.append(sigma)
        if latents.requires_grad:
            latents.register_hook(self.gradients.append)
        return -latents.flatten(1).square().mean(1)


@dataclass(frozen=True)
class Case:
    """One method with a budget that it spends, whether it follows gradients, and the fewest steps in which it does."""

    method: Method
    budget: float
    follows: bool = False
    steps: int = STEPS


# The first step of DAS and the last are not shifted; a grid of one step is not finite on Qwen-Image and LTX.
CASES: Mapping[str, Case] = {
    "best_of_n": Case(BestOfN(), 2),
    "nrg": Case(NRG(weight=10.0), 2, follows=True),
    "dps, x0": Case(DPS(weight=10.0, averages=2, gradient_batch=1), 1, follows=True),
    "dps, denoiser": Case(DPS(weight=10.0, through="denoiser"), 2, follows=True),
    "fk": Case(FK(), 2),
    "das": Case(DAS(), 2, follows=True, steps=3),
    "search, noise": Case(Search(over="noise"), 3),
    "search, paths": Case(Search(over="paths"), 3),
    "search, drafts": Case(Search(over="drafts", draft_steps=2), 2, steps=4),
    "reno": Case(ReNO(checkpoint=False), 2, follows=True),
}


def test_every_method_is_here() -> None:
    from alignkit.inference.guide import METHODS

    assert {case.method.name for case in CASES.values()} == METHODS.keys()


@contextmanager
def counted(pipe: Any) -> Iterator[list[int]]:
    """Context: the batch rows of every denoiser call that ran to its end, but for those with which a policy finds the
    pipeline's grid and first latents."""
    rows: list[int] = []
    own = {name: vars(Policy)[name] for name in ("condition", "initial_latents")}

    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        latents = args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else "sample"]
        rows.append(len(latents))

    def aside(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count = len(rows)
            found = function(*args, **kwargs)
            del rows[count:]
            return found

        return call

    hooks = [part.register_forward_hook(note, with_kwargs=True) for part in denoisers(pipe).values()]
    try:
        for name, function in own.items():
            setattr(Policy, name, aside(function))
        yield rows
    finally:
        for name, function in own.items():
            setattr(Policy, name, function)
        for hook in hooks:
            hook.remove()


def call_of(family: str) -> dict[str, Any]:
    """The pipeline's keywords, its guidance on."""
    return {**ZOO[family].call, **next(iter(ZOO[family].variants.values()))}


def drawn(family: str, case: Case, reward: Any) -> tuple[Guided, int]:
    """What `alignkit.guide` gives, and the rows that went through the denoiser."""
    pipe = shared(family)
    rng = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    options: dict[str, Any] = {"num_steps": case.steps, "seed": 5, "batch": 4, **call_of(family)}
    with counted(pipe) as rows:
        found = alignkit.guide(pipe, PROMPTS, reward, case.method, case.budget, rng, **options)
    return found, sum(rows)


@functools.cache
def plain(family: str) -> tuple[Guided, int]:
    """Unguided samples of the same noise."""
    return drawn(family, Case(BestOfN(), 1), Watched("video" if ZOO[family].video else "image"))


@functools.cache
def before(family: str) -> dict[str, Any]:
    """The pipeline as it was before anything ran; the encoders' first call is behind it."""
    plain(family)
    return portrait(shared(family))


def planned(family: str, case: Case) -> dict[str, int]:
    """What the method says that both prompts will cost. It counts on a grid that begins at noise level 1, whose first
    step is singular; elsewhere guidance by gradients has one guided step more, which a third step also has."""
    calls = case.method.calls(case.steps, case.budget)
    if family in BELOW_NOISE and isinstance(case.method, NRG | DPS):
        samples = calls.decodes - calls.decode_gradients
        longer = case.method.calls(case.steps + 1, case.budget)
        calls = replace(longer, denoiser=longer.denoiser - samples)
    return asdict(calls * len(PROMPTS))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CASES)
def test_a_method_runs_two_steps_and_costs_what_it_says(name: str, family: str) -> None:
    case, entry, own = CASES[name], ZOO[family], before(family)
    reward = WatchedLatents() if isinstance(case.method, NRG) else Watched("video" if entry.video else "image")
    found, rows = drawn(family, case, reward)
    unguided, plain_rows = plain(family)

    assert found.media.shape == unguided.media.shape and found.media.ndim == (5 if entry.video else 4)
    assert float(found.media.min()) >= 0 and float(found.media.max()) <= 1
    assert bool(found.rewards.isfinite().all()) and found.parts[reward.name].shape == (len(PROMPTS),)
    assert bool(reward.gradients) == case.follows
    for gradient in reward.gradients:
        assert bool(gradient.isfinite().all()) and bool((gradient.flatten(1).abs().amax(1) > 0).all())
    if isinstance(case.method, NRG | DPS):
        assert not torch.equal(found.latents, unguided.latents)
    if isinstance(case.method, ReNO):
        assert found.trace["noise_norm"][0] != found.trace["noise_norm"][1]

    spent = found.trace["spent"]
    assert spent == planned(family, case)
    assert spent["denoiser"] <= case.budget * case.steps * len(PROMPTS)
    assert rows == spent["denoiser"] * plain_rows // (STEPS * len(PROMPTS))
    assert found.trace["budget_used"] == spent["denoiser"] / (case.steps * len(PROMPTS))
    after = portrait(shared(family))
    assert [key for key in own | after if own.get(key) != after.get(key)] == []  # their values are too long to show


@pytest.mark.parametrize("family", FAMILIES)
def test_a_noise_aware_reward_is_asked_at_the_level_of_each_step_and_at_last_at_0(family: str) -> None:
    reward = WatchedLatents()
    drawn(family, CASES["nrg"], reward)
    assert all(len(one) == 4 and bool((one == one[0]).all()) for one in reward.levels)
    levels = [float(one[0]) for one in reward.levels]
    assert len(levels) == (3 if family in BELOW_NOISE else 2)
    assert levels[0] < 0.999 and levels == sorted(levels, reverse=True) and levels[-1] == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_on_the_generators_own_blocks_guides_it(family: str, tmp_path: Path) -> None:
    own, pipe = before(family), shared(family)
    with Policy(pipe) as policy, torch.no_grad():
        cond = policy.condition(PROMPTS, num_steps=STEPS, seed=5, **call_of(family))
        x = policy.initial_latents(cond, torch.Generator().manual_seed(0))
        width = policy.features(x, cond.timesteps[0], cond, 1).shape[-1]
        config = HeadConfig(type(pipe).__name__, ("legible", "colour"), width, depth=1, hidden=16, queries=1, heads=2)
        write_random(tmp_path, policy, config)
    rewards = {NoiseAwareReward(str(tmp_path), "legible"): 1.0, NoiseAwareReward(str(tmp_path), "colour"): -0.5}
    found, _ = drawn(family, CASES["nrg"], rewards)
    torch.testing.assert_close(found.rewards, found.parts["legible"] - 0.5 * found.parts["colour"])
    assert len(found.trace["guidance"]) == (2 if family in BELOW_NOISE else 1)
    assert all(0 < step["change"] < float("inf") for step in found.trace["guidance"])
    assert not torch.equal(found.latents, plain(family)[0].latents)
    after = portrait(pipe)
    assert [key for key in own | after if own.get(key) != after.get(key)] == []
