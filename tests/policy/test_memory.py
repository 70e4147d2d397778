"""Memory: checkpointing, decoder settings and offloaded encoders come back as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from alignkit.errors import RecipeError
from alignkit.policy import LoRA, Policy
from alignkit.policy.adapters import denoisers
from alignkit.policy.memory import (
    Decode,
    Offloaded,
    checkpointing,
    components,
    decoding,
    encoders,
    offload_encoders,
    remember,
    size,
)
from tests.policy.test_frames import received
from tests.policy.zoo import PROMPTS, ZOO, shared

CALL = {**ZOO["sd3"].call, "guidance_scale": 1.0}


def sd3() -> DiffusionPipeline:
    return ZOO["sd3"].build()


def settings(pipe: DiffusionPipeline) -> dict[str, Any]:
    names = ("training", "gradient_checkpointing", "use_tiling", "use_slicing", "tile_overlap_factor")
    found: dict[str, Any] = {}
    for part, module in components(pipe).items():
        for name, layer in module.named_modules():
            found[f"{part}.{name}"] = {k: v for k, v in vars(layer).items() if k in names or "checkpointing" in k}
        found[f"{part} flags"] = [p.requires_grad for p in module.parameters()]
    return found


# checkpointing


def test_checkpointing_gives_the_same_gradients_and_its_flags_go_back() -> None:
    policy = Policy(sd3(), LoRA(rank=2))
    for parameter in policy.parameters():
        nn.init.constant_(parameter, 0.05)
    cond = policy.condition(list(PROMPTS), num_steps=2, **CALL)
    x = policy.initial_latents(cond, torch.Generator().manual_seed(0))
    before = settings(policy.pipe)
    grads, calls = [], []
    block = policy.pipe.transformer.transformer_blocks[0]
    handle = block.register_forward_pre_hook(lambda *_: calls.append(None))
    for on in (False, True):
        calls.clear()
        with checkpointing(denoisers(policy.pipe), on):
            policy.model_output(x, cond.timesteps[0], cond).square().mean().backward()
        grads.append([p.grad for p in policy.parameters()])
        assert len(calls) == (2 if on else 1)  # the segment is computed again at backward
        for parameter in policy.parameters():
            parameter.grad = None
    handle.remove()
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)
    assert settings(policy.pipe) == before


def test_checkpointing_that_was_on_is_on_again() -> None:
    pipe = sd3()
    pipe.transformer.enable_gradient_checkpointing()
    before = settings(pipe)
    with checkpointing({"transformer": pipe.transformer}, on=False):
        assert not pipe.transformer.is_gradient_checkpointing
    assert pipe.transformer.is_gradient_checkpointing
    assert settings(pipe) == before


def test_a_module_that_cannot_checkpoint_is_named() -> None:
    with (
        pytest.raises(RecipeError, match=r"head \(Linear\) cannot checkpoint"),
        checkpointing({"head": nn.Linear(2, 2)}),
    ):
        pass


# settings of the whole pipeline


def test_closing_a_policy_puts_back_what_training_switched_on() -> None:
    pipe = sd3()
    pipe.vae.requires_grad_(False)
    before = settings(pipe)
    with Policy(pipe, LoRA(rank=2)):
        pipe.transformer.train()
        pipe.transformer.enable_gradient_checkpointing()
        pipe.vae.enable_tiling()
        pipe.vae.enable_slicing()
        pipe.vae.tile_overlap_factor = 0.5
        pipe.text_encoder.requires_grad_(False)
        pipe.vae.train()
        assert settings(pipe) != before
    assert settings(pipe) == before


def test_settings_that_came_new_are_gone_again() -> None:
    pipe = sd3()
    put_back = remember(pipe)
    pipe.transformer.enable_gradient_checkpointing()
    block = pipe.transformer.transformer_blocks[0]
    pipe.vae.tile_new_setting = 3
    put_back()
    assert "tile_new_setting" not in vars(pipe.vae)
    assert not pipe.transformer.is_gradient_checkpointing
    assert "gradient_checkpointing" not in vars(block) or not block.gradient_checkpointing


# the decoder


def test_a_decoder_in_another_dtype_gets_its_very_own_tensors_back() -> None:
    vae = sd3().vae
    before = [(t.data_ptr(), t.dtype) for t in vae.parameters()]
    values = [t.detach().clone() for t in vae.parameters()]
    with decoding(vae, dtype=torch.bfloat16, tiling=True):
        assert vae.dtype == torch.bfloat16 and vae.use_tiling
        latents = torch.zeros(1, vae.config.latent_channels, 4, 4, dtype=torch.bfloat16, requires_grad=True)
        vae.decode(latents).sample.sum().backward()
        assert latents.grad is not None
    assert [(t.data_ptr(), t.dtype) for t in vae.parameters()] == before
    assert all(torch.equal(a, b) for a, b in zip(values, vae.parameters(), strict=True))
    assert not vae.use_tiling


def test_the_decoder_comes_back_after_an_exception() -> None:
    vae = sd3().vae
    with pytest.raises(ZeroDivisionError), decoding(vae, dtype=torch.bfloat16, tiling=True):
        raise ZeroDivisionError
    assert vae.dtype == torch.float32 and not vae.use_tiling


def test_tiling_a_decoder_that_cannot_tile_is_an_error() -> None:
    with pytest.raises(RecipeError, match="Linear cannot decode in tiles"), decoding(nn.Linear(2, 2), tiling=True):
        pass


# encoders


def test_encoders_are_found_and_their_bytes_counted_once() -> None:
    pipe = sd3()
    assert set(encoders(pipe)) == {"text_encoder", "text_encoder_2", "text_encoder_3"}
    layer = nn.Linear(4, 4)
    layer.register_parameter("again", layer.weight)  # type: ignore[arg-type]
    assert size(layer) == 4 * (16 + 4)


def test_on_a_cpu_there_is_nothing_to_free_and_a_sentence_says_so() -> None:
    with Policy(sd3()) as policy:
        freed = policy.offload_encoders()
        assert freed.bytes == 0 and not freed.modules
        assert freed.sentence.startswith("nothing to free")
        policy.condition(list(PROMPTS), num_steps=2, **CALL)


def test_keeping_an_encoder_that_is_not_there_lists_those_that_are() -> None:
    with pytest.raises(RecipeError, match=r"keep=\['vision'\] .*text_encoder_2"):
        offload_encoders(sd3(), keep=["vision"])


def test_a_pipeline_that_offloads_by_itself_is_left_to_it() -> None:
    pipe = sd3()
    pipe._all_hooks = ["a hook"]
    assert "by itself" in offload_encoders(pipe).sentence


class Travels(nn.Module):
    """An encoder that notes where it is sent."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def to(self, device: Any) -> Travels:  # type: ignore[override]
        self.places.append(str(device))
        return self


def test_offloaded_encoders_return_for_the_time_of_encoding_also_when_it_fails() -> None:
    encoder = Travels()
    offloaded = Offloaded({"text_encoder": encoder}, {"text_encoder": torch.device("cuda:0")}, 4, "freed")
    with offloaded.onloaded():
        assert encoder.places == ["cuda:0"]
    assert encoder.places == ["cuda:0", "cpu"]
    with pytest.raises(ZeroDivisionError), offloaded.onloaded():
        raise ZeroDivisionError
    assert encoder.places[2:] == ["cuda:0", "cpu"]
    offloaded.restore()
    assert encoder.places[-1] == "cuda:0"


def test_denoising_needs_no_encoder_once_conditioned() -> None:
    pipe = sd3()
    with Policy(pipe, LoRA(rank=2)) as policy:
        cond = policy.condition(list(PROMPTS), num_steps=2, **CALL)
        x = policy.initial_latents(cond, torch.Generator().manual_seed(0))
        here = policy.model_output(x, cond.timesteps[0], cond)

        def absent(*_: Any, **__: Any) -> None:
            raise AssertionError("an encoder ran")

        for module in encoders(pipe).values():
            vars(module)["forward"] = absent
        assert torch.equal(policy.model_output(x, cond.timesteps[0], cond), here)
        policy.decode(x, cond[[1, 0]])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloading_frees_the_encoders_bytes_on_a_gpu_and_conditioning_still_works() -> None:
    pipe = sd3().to("cuda")
    expected = sum(size(m) for n, m in encoders(pipe).items() if n != "text_encoder_2")
    with Policy(pipe, LoRA(rank=2)) as policy:
        freed = policy.offload_encoders(keep=["text_encoder_2"])
        assert freed.bytes == expected
        assert pipe.text_encoder.device.type == "cpu" and pipe.text_encoder_2.device.type == "cuda"
        cond = policy.condition(list(PROMPTS), num_steps=2, **CALL)
        x = policy.initial_latents(cond, torch.Generator().manual_seed(0))
        assert policy.model_output(x, cond.timesteps[0], cond).device.type == "cuda"
        assert pipe.text_encoder.device.type == "cpu"
    assert pipe.text_encoder.device.type == "cuda"


# how decoders trade time for memory


def decoded(how: Decode | None, name: str = "wan_t2v") -> tuple[torch.Tensor, list[tuple[int, ...]]]:
    """Three short videos or pictures, and the shapes that reached the decoder's network."""
    pipe = shared(name)
    with Policy(pipe) as policy:
        cond = policy.condition(["a cat", "a dog", "a cow"], num_steps=1, **{**ZOO[name].call, "guidance_scale": 1.0})
        x = policy.initial_latents(cond, torch.Generator().manual_seed(0))
        if how is not None:
            policy.set_decoding(how)
        with torch.no_grad(), received(pipe.vae) as shapes:
            return policy.decode(x, cond), shapes


@pytest.mark.parametrize(
    ("how", "batches"), [(Decode(slicing=True), [1, 1, 1]), (Decode(batch=2), [2, 1]), (Decode(), [3])]
)
def test_decoding_in_parts_gives_the_same_pixels(how: Decode, batches: list[int]) -> None:
    whole, _ = decoded(None)
    found, shapes = decoded(how)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)
    assert [shape[0] for shape in shapes] == batches


def test_sliced_first_frames_are_those_of_the_whole() -> None:
    pipe = shared("wan_t2v")
    with Policy(pipe) as policy, torch.no_grad():
        cond = policy.condition(list(PROMPTS), num_steps=1, **ZOO["wan_t2v"].call)
        x = policy.initial_latents(cond, torch.Generator().manual_seed(0))
        whole = policy.decode(x, cond)
        policy.set_decoding(Decode(slicing=True, batch=1))
        torch.testing.assert_close(policy.decode(x, cond, frames=1), whole[:, :1], rtol=0, atol=1e-6)


def test_settings_of_the_decoder_go_back_when_the_policy_closes() -> None:
    pipe = ZOO["ltx_t2v"].build()
    names = ("use_slicing", "use_tiling", "use_framewise_decoding", "tile_sample_min_height")
    before = {name: vars(pipe.vae)[name] for name in names}
    with Policy(pipe) as policy:
        policy.set_decoding(Decode(slicing=True, tiling=True, framewise=True))
        assert pipe.vae.use_slicing and pipe.vae.use_tiling and pipe.vae.use_framewise_decoding
        policy.set_decoding(Decode(tiling=False))
        assert pipe.vae.use_slicing and not pipe.vae.use_tiling  # None leaves what is set
    assert {name: vars(pipe.vae)[name] for name in names} == before


def test_a_setting_that_a_decoder_has_not_is_refused_before_anything_is_switched() -> None:
    pipe = ZOO["wan_t2v"].build()
    with Policy(pipe) as policy:
        with pytest.raises(RecipeError, match=r"decode.framewise=True: vae \(AutoencoderKLWan\) .* slicing, tiling"):
            policy.set_decoding(Decode(slicing=True, framewise=True))
        assert not pipe.vae.use_slicing
        with pytest.raises(RecipeError, match="decode.batch=0"):
            policy.set_decoding(Decode(batch=0))


def test_slicing_is_refused_where_the_decoder_is_told_a_timestep() -> None:
    pipe = ZOO["ltx_t2v"].build()
    pipe.vae.register_to_config(timestep_conditioning=True)
    with Policy(pipe) as policy:
        with pytest.raises(RecipeError, match="decode.slicing=True: vae .* use decode.batch=1"):
            policy.set_decoding(Decode(slicing=True, tiling=True))
        assert not pipe.vae.use_slicing and not pipe.vae.use_tiling
        policy.set_decoding(Decode(slicing=False, batch=1))
