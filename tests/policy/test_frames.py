"""Only the first frames are decoded, from the latents that they need, and they are those of the whole video."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLLTXVideo

import alignkit
from alignkit.errors import RecipeError
from alignkit.policy.frames import Call, agreeing, probe, run
from tests.policy.zoo import PROMPTS, ZOO, shared

SAME_DECODER = {"wan_t2v_unipc", "wan_two_experts"}  # as wan_t2v
VIDEO = [name for name, entry in ZOO.items() if entry.video and name not in SAME_DECODER]
CAUSAL = {name for name in VIDEO if name.startswith(("wan", "sana"))}
PICTURES = {"animatediff", "latte"}  # frame by frame, by a decoder of pictures


def conditioned(policy: alignkit.Policy, name: str, frames: int | None = None) -> Any:
    entry = ZOO[name]
    own = {} if frames is None else {next(key for key in entry.call if "frames" in key): frames}
    return policy.condition(PROMPTS, num_steps=2, **{**entry.call, **next(iter(entry.variants.values())), **own})


def latents(policy: alignkit.Policy, cond: Any) -> torch.Tensor:
    return policy.initial_latents(cond, torch.Generator().manual_seed(0))


def causal_ltx() -> Any:
    pipe = ZOO["ltx_t2v"].build()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLLTXVideo.from_config({**pipe.vae.config, "decoder_causal": True})
    pipe.register_modules(vae=vae.eval())  # type: ignore[union-attr]
    return pipe


@contextmanager
def received(vae: Any) -> Iterator[list[tuple[int, ...]]]:
    """The shapes that reach the decoder behind `decode`."""
    shapes: list[tuple[int, ...]] = []
    own = vae.__dict__.get("_decode"), vae._decode

    def noted(z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(z.shape))
        return own[1](z, *args, **kwargs)

    vae._decode = noted
    try:
        yield shapes
    finally:
        del vae._decode


@pytest.mark.parametrize("name", VIDEO)
@torch.no_grad()
def test_the_first_frames_are_those_of_the_whole_video(name: str) -> None:
    with alignkit.Policy(shared(name)) as policy:
        cond = conditioned(policy, name)
        x = latents(policy, cond)
        whole = policy.decode(x, cond)
        assert policy.num_frames(cond) == whole.shape[1]
        for frames in {1, whole.shape[1] - 1}:
            torch.testing.assert_close(policy.decode(x, cond, frames=frames), whole[:, :frames], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [*VIDEO, "ltx_causal"])
@torch.no_grad()
def test_the_decoder_gets_the_latents_that_the_plan_says(name: str) -> None:
    pipe = causal_ltx() if name == "ltx_causal" else shared(name)
    with alignkit.Policy(pipe) as policy:
        cond = conditioned(policy, name.replace("causal", "t2v"))
        x = latents(policy, cond)
        total, first = (policy.latent_frames(frames, cond) for frames in (None, 1))
        assert first == (1 if name in CAUSAL | PICTURES | {"ltx_causal"} else total)
        with received(pipe.vae) as shapes:
            policy.decode(x, cond, frames=1)
        (shape,) = shapes
        assert shape[0] * (shape[2] if len(shape) == 5 else 1) == first * len(cond)


@torch.no_grad()
def test_a_decoder_in_chunks_of_two_latents_is_cut_at_a_chunk() -> None:
    with alignkit.Policy(shared("cogvideox_t2v")) as policy:
        cond = conditioned(policy, "cogvideox_t2v", frames=17)
        assert [policy.latent_frames(n, cond) for n in (1, 9, 10, 17, None)] == [3, 3, 5, 5, 5]
        x = latents(policy, cond)
        torch.testing.assert_close(policy.decode(x, cond, frames=9), policy.decode(x, cond)[:, :9], rtol=0, atol=1e-6)


def test_gradients_of_the_first_frames_are_those_of_the_whole_video_and_reach_only_their_latents() -> None:
    with alignkit.Policy(shared("wan_t2v")) as policy:
        cond = conditioned(policy, "wan_t2v", frames=9)
        x = latents(policy, cond)
        weight = torch.rand(2, 5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        grads = []
        for frames in (5, None):
            leaf = x.clone().requires_grad_()
            (policy.decode(leaf, cond, frames=frames)[:, :5] * weight).sum().backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(grads[0], grads[1])
        assert grads[0] is not None and bool(grads[0][:, :, :2].any()) and not bool(grads[0][:, :, 2:].any())


@torch.no_grad()
def test_a_decoder_is_watched_once_and_in_float32() -> None:
    pipe = ZOO["wan_t2v"].build()
    pipe.vae.to(torch.bfloat16)
    with alignkit.Policy(pipe) as policy:
        cond = conditioned(policy, "wan_t2v", frames=9)
        before = {name: tensor.data_ptr() for name, tensor in pipe.vae.state_dict().items()}
        state = torch.get_rng_state()
        with received(pipe.vae) as shapes, torch.autocast("cpu", torch.bfloat16):
            assert policy.latent_frames(3, cond) == 2
            seen = len(shapes)
            assert seen > 0 and policy.latent_frames(2, cond) == 2 and len(shapes) == seen
        assert {name: tensor.data_ptr() for name, tensor in pipe.vae.state_dict().items()} == before
        assert torch.equal(torch.get_rng_state(), state)


def test_a_decoder_that_hears_what_comes_later_is_told_from_one_that_does_not() -> None:
    class Averages(torch.nn.Module):
        """Every frame is its latent and a thousandth of the mean over time."""

        def decode(self, z: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
            return ((z + self.weight * z.mean(dim=2, keepdim=True)).repeat_interleave(2, dim=2),)

        weight = 1e-3

    call, vae = Call("vae", torch.zeros(2, 3, 6, 8, 8), (), {}), Averages()
    assert run(vae, call, probe(call)).shape == (1, 3, 12, 4, 4)
    assert agreeing(vae, call, 3) == 0
    vae.weight = 0.0
    assert agreeing(vae, call, 3) == 6


def test_frames_that_are_not_there_and_pictures_are_refused() -> None:
    with alignkit.Policy(shared("wan_t2v")) as policy:
        cond = conditioned(policy, "wan_t2v")
        for frames in (0, 6):
            with pytest.raises(RecipeError, match=f"frames={frames} of videos of 5; expected 1 to 5"):
                policy.decode(latents(policy, cond), cond, frames=frames)
    with alignkit.Policy(shared("sd3")) as policy:
        cond = conditioned(policy, "sd3")
        with pytest.raises(RecipeError, match="decodes no videos"):
            policy.decode(latents(policy, cond), cond, frames=1)
