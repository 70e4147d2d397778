"""Encoders run once: every later subset, shuffle, repetition or concatenation is answered from memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from alignkit.errors import PolicyError, RecipeError
from alignkit.policy import Policy
from alignkit.policy.conditioning import Conditioning
from alignkit.policy.memo import Memo, digest, join_rows, take_rows
from alignkit.policy.memory import encoders
from tests.policy.tiny_parts import picture
from tests.policy.zoo import PROMPTS, ZOO

THREE = ["a red cat", "a blue dog", "a green sign"]


@contextmanager
def counting(pipe: DiffusionPipeline) -> Iterator[list[str]]:
    """The names of encoder components, text, image and VAE, once for each time that one really ran."""
    calls: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, n=name: calls.append(n)) for name, module in encoders(pipe).items()
    ]
    own = pipe.vae.encoder.forward

    def encoder(*args: Any, **kwargs: Any) -> Any:
        calls.append("vae")
        return own(*args, **kwargs)

    vars(pipe.vae.encoder)["forward"] = encoder
    try:
        yield calls
    finally:
        del vars(pipe.vae.encoder)["forward"]
        for handle in handles:
            handle.remove()


def everything(policy: Policy, cond: Conditioning) -> torch.Tensor:
    """Latents, one denoising step and a decode; returns the step's output."""
    x = policy.initial_latents(cond, torch.Generator().manual_seed(0))
    output = policy.model_output(x, cond.timesteps[0], cond)
    policy.decode(x, cond)
    return output


@pytest.mark.parametrize(("name", "guided"), [("sd3", True), ("sd3", False), ("sd15", True), ("qwen_image", True)])
def test_a_conditioning_encodes_each_prompt_once_and_its_relatives_not_at_all(name: str, guided: bool) -> None:
    pipe = ZOO[name].build()
    call = {**ZOO[name].call, **ZOO[name].variants["guided" if guided else "unguided"]}
    if "negative_prompt" in call:
        call["negative_prompt"] = ["bad quality"] * 3
    policy = Policy(pipe)
    with counting(pipe) as calls:
        cond = policy.condition(THREE, num_steps=2, **call)
        times = {n: calls.count(n) for n in encoders(pipe)}
        # one batch of prompts; with guidance one of negative prompts too
        assert set(times.values()) == {2 if guided else 1}
        calls.clear()
        for relative in (cond, cond[[2, 0]], cond[[1]], cond[[1, 1, 0]], cond.repeat(2), cond[0:2] + cond[[2]]):
            assert len(everything(policy, relative)) == len(relative)
        assert not calls


def test_two_conditionings_together_are_not_encoded_again_and_keep_their_rows() -> None:
    pipe = ZOO["sd3"].build()
    policy = Policy(pipe)
    call = {**ZOO["sd3"].call, "guidance_scale": 4.0}
    first, second = (policy.condition(prompts, num_steps=2, **call) for prompts in (THREE[:1], THREE[1:]))
    whole = policy.condition(THREE, num_steps=2, **call)
    x = policy.initial_latents(whole, torch.Generator().manual_seed(0))
    with counting(pipe) as calls:
        both = first + second
        output = policy.model_output(x, whole.timesteps[0], both)
        assert not calls
    assert [str(p) for p in both.prompts] == THREE
    torch.testing.assert_close(output, policy.model_output(x, whole.timesteps[0], whole), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["sd3", "sd15", "qwen_image"])
def test_a_row_is_the_same_alone_shuffled_and_repeated(name: str) -> None:
    policy = Policy(ZOO[name].build())
    call = {**ZOO[name].call, **ZOO[name].variants["guided"]}
    if "negative_prompt" in call:
        call["negative_prompt"] = ["bad quality"] * 3
    cond = policy.condition(THREE, num_steps=2, **call)
    x = policy.initial_latents(cond, torch.Generator().manual_seed(0))
    t = cond.timesteps[0]
    whole = policy.model_output(x, t, cond)
    for rows in ([2, 0, 1], [1], [0, 0, 2, 2]):
        part = policy.model_output(x[rows], t, cond[rows])
        torch.testing.assert_close(part, whole[rows], rtol=1e-5, atol=1e-5)
    assert (whole[0] - whole[1]).abs().max() > 1e-3


def test_other_guidance_needs_its_own_negative_prompts_only_once() -> None:
    pipe = ZOO["sd3"].build()
    policy = Policy(pipe)
    cond = policy.condition(THREE, num_steps=2, **ZOO["sd3"].call, guidance_scale=4.0)
    with counting(pipe) as calls:
        plain = cond.unguided
        first = len(calls)
        everything(policy, plain)
        everything(policy, cond.unguided)
        assert first <= len(encoders(pipe))
        assert len(calls) == first  # what the first use encoded is known to the second
    x = policy.initial_latents(cond, torch.Generator().manual_seed(0))
    t = cond.timesteps[0]
    assert not torch.equal(policy.model_output(x, t, plain), policy.model_output(x, t, cond))


def test_another_negative_prompt_is_encoded_and_changes_the_output() -> None:
    policy = Policy(ZOO["sd3"].build())
    call = {**ZOO["sd3"].call, "guidance_scale": 4.0}
    conds = [policy.condition(THREE, num_steps=2, negative_prompt=text, **call) for text in ("bad", "quality")]
    x = policy.initial_latents(conds[0], torch.Generator().manual_seed(0))
    outputs = [policy.model_output(x, cond.timesteps[0], cond) for cond in conds]
    assert not torch.equal(*outputs)


def image_call(name: str) -> dict[str, Any]:
    return {**ZOO[name].call, **next(iter(ZOO[name].variants.values()))}


@pytest.mark.parametrize("name", ["flux_kontext", "wan_i2v", "ltx_i2v", "cogvideox_i2v"])
def test_draws_from_a_pictures_posterior_are_the_same_for_the_same_seeds(name: str) -> None:
    pipe = ZOO[name].build()
    policy = Policy(pipe)
    call = image_call(name)
    conds = [policy.condition(list(PROMPTS), num_steps=2, seed=seed, **call) for seed in (5, 5, 6)]
    x = policy.initial_latents(conds[0], torch.Generator().manual_seed(0))
    t = conds[0].timesteps[0]
    torch.manual_seed(1)
    first = policy.model_output(x, t, conds[0])
    torch.manual_seed(2)  # nothing may come from the global generator
    torch.testing.assert_close(policy.model_output(x, t, conds[0]), first, rtol=0, atol=0)
    torch.testing.assert_close(policy.model_output(x, t, conds[1]), first, rtol=0, atol=0)
    draws = name in ("ltx_i2v", "cogvideox_i2v")  # the others take the posterior's mode
    assert torch.equal(policy.model_output(x, t, conds[2]), first) is not draws
    alone = policy.model_output(x[[1]], t, conds[0][[1]])
    torch.testing.assert_close(alone, first[[1]], rtol=1e-5, atol=1e-5)
    swapped = policy.model_output(x[[1, 0]], t, conds[0][[1, 0]])
    torch.testing.assert_close(swapped, first[[1, 0]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["flux_kontext", "wan_i2v"])
def test_pictures_are_encoded_once(name: str) -> None:
    pipe = ZOO[name].build()
    policy = Policy(pipe)
    with counting(pipe) as calls:
        cond = policy.condition(list(PROMPTS), num_steps=2, **image_call(name))
        assert "vae" in calls
        calls.clear()
        for relative in (cond, cond[[1, 0]], cond.repeat(2)):
            everything(policy, relative)
        assert not calls


# the memory itself


class CountingEncoder:
    """Doubles its rows and counts the batches."""

    def __init__(self) -> None:
        self.batches = 0

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, list[str], None]:
        self.batches += 1
        return 2 * x, [f"row {float(row.sum()):.0f}" for row in x], None


def ask(memo: Memo, encoder: CountingEncoder, x: torch.Tensor, shared: Any = ("length", 8)) -> Any:
    return memo("encode", shared, {"x": x}, lambda: encoder(x))


def test_known_rows_are_answered_by_indexing_in_any_order_and_number() -> None:
    memo, encoder = Memo(), CountingEncoder()
    x = torch.arange(12.0).reshape(3, 1, 4)
    whole = ask(memo, encoder, x)
    for rows in ([0, 1, 2], [2, 0], [1, 1, 1, 0]):
        tensor, texts, nothing = ask(memo, encoder, x[rows])
        assert torch.equal(tensor, 2 * x[rows]) and nothing is None
        assert texts == [whole[1][r] for r in rows]
    assert encoder.batches == memo.calls == 1
    assert ask(memo, encoder, x) is whole


def test_a_new_row_or_another_shared_argument_is_encoded() -> None:
    memo, encoder = Memo(), CountingEncoder()
    x = torch.arange(12.0).reshape(3, 1, 4)
    ask(memo, encoder, x)
    ask(memo, encoder, x + 1)
    ask(memo, encoder, x, shared=("length", 9))
    assert encoder.batches == 3


def test_rows_of_several_batches_are_put_together() -> None:
    memo, encoder = Memo(), CountingEncoder()
    x = torch.arange(16.0).reshape(4, 1, 4)
    ask(memo, encoder, x[:2])
    ask(memo, encoder, x[2:])
    tensor, texts, _ = ask(memo, encoder, x[[3, 0]])
    assert torch.equal(tensor, 2 * x[[3, 0]]) and len(texts) == 2
    assert encoder.batches == 2


def test_joined_memories_know_both_and_share_nothing_afterwards() -> None:
    first, second, encoder = Memo(), Memo(), CountingEncoder()
    x = torch.arange(8.0).reshape(2, 1, 4)
    ask(first, encoder, x[:1])
    ask(second, encoder, x[1:])
    both = first.joined(second)
    ask(both, encoder, x)
    assert encoder.batches == both.calls == 2
    ask(both, encoder, x + 9)
    assert len(first.batches) == 1


def test_content_decides_not_identity() -> None:
    x = torch.arange(4.0)
    same = [
        (x, x.clone()),
        (np.arange(3), np.arange(3)),
        (picture(1), picture(1)),
        ({"a": 1, "b": [None, "t"]}, {"b": [None, "t"], "a": 1}),
    ]
    different = [
        (x, x + 1e-6),
        (x, x.double()),
        (x, x.reshape(2, 2)),
        (picture(1), picture(2)),
        (["ab", "c"], ["a", "bc"]),
        (1, "1"),
        (1, 1.0),
        ([[1], 2], [[1, 2]]),
    ]
    assert all(digest(a) == digest(b) for a, b in same)
    assert all(digest(a) != digest(b) for a, b in different)


def test_an_argument_without_a_content_hash_is_refused() -> None:
    with pytest.raises(PolicyError, match="object, which has no content hash"):
        digest([object()])


def test_batched_guidance_blocks_are_indexed_block_by_block() -> None:
    stacked = torch.arange(6.0).reshape(6, 1, 1)  # 3 samples, negative rows first
    assert take_rows(stacked, [2, 0], 3).flatten().tolist() == [2.0, 0.0, 5.0, 3.0]
    ids = torch.zeros(3, 3)
    assert take_rows((torch.zeros(3, 3, 8), ids), [0], 3)[1] is ids  # positions belong to no sample


def test_shorter_sequences_are_padded_when_joined() -> None:
    short, long = torch.ones(1, 2, 3), torch.ones(1, 4, 3)
    joined = join_rows([(short, torch.ones(1, 2)), (long, torch.ones(1, 4))])
    assert joined[0].shape == (2, 4, 3) and joined[1].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_only_conditionings_that_fit_can_be_put_together() -> None:
    policy = Policy(ZOO["sd3"].build())
    one = policy.condition(THREE[:1], num_steps=2, **ZOO["sd3"].call, guidance_scale=4.0)
    two = policy.condition(THREE[:1], num_steps=3, **ZOO["sd3"].call, guidance_scale=4.0)
    with pytest.raises(RecipeError, match="same keywords and num_steps"):
        one + two
    with pytest.raises(RecipeError, match="at least one sample"):
        one[[]]
