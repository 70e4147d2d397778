"""Attention backends: chosen by name, set in a scope, and seen to have run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import nn
from torch.nn import functional as F

from alignkit.errors import PolicyError, RecipeError
from alignkit.policy import LoRA, Policy
from alignkit.policy.adapters import denoisers
from alignkit.policy.attention import (
    ChosenAttention,
    kernel_report,
    observed_kernels,
    probe,
    require_double_backward,
    resolve,
    scope,
    verify,
    watching,
)
from tests.policy.zoo import PROMPTS, ZOO

gpu = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
FLASH = "aten._scaled_dot_product_flash_attention_for_cpu"
CPU = torch.device("cpu")


def qkv(grad: bool = False) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, 8, 16, generator=rng, requires_grad=grad) for _ in range(3)]


def forward(policy: Policy, name: str) -> torch.Tensor:
    entry = ZOO[name]
    cond = policy.condition(list(PROMPTS), num_steps=2, **{**entry.call, **next(iter(entry.variants.values()))})
    return policy.model_output(policy.initial_latents(cond, torch.Generator().manual_seed(0)), cond.timesteps[0], cond)


def processors(pipe: DiffusionPipeline) -> list[tuple[str, int, object]]:
    """Every processor of the denoisers: its layer, its identity and the backend pinned on it."""
    return [
        (name, id(layer.processor), vars(layer.processor).get("_attention_backend", "none"))
        for module in denoisers(pipe).values()
        for name, layer in module.named_modules()
        if "processor" in vars(layer) or "processor" in layer._modules
    ]


# choosing


@pytest.mark.parametrize("name", ["auto", "sdpa", "native"])
def test_the_default_is_pytorchs_scaled_dot_product_attention(name: str) -> None:
    assert resolve(name, "cpu") == resolve(name, "cuda") == "native"


@pytest.mark.parametrize("name", ["xformers", "flash", "_native_efficient", "_native_cudnn", "flex"])
def test_on_a_cpu_a_backend_without_a_cpu_kernel_is_an_error_that_names_sdpa(name: str) -> None:
    with pytest.raises(RecipeError, match=r'CPU; use attention="sdpa"'):
        resolve(name, "cpu")
    assert resolve(name, "cuda") == name


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"'flash9' is unknown; .*xformers"):
        resolve("flash9", "cuda")


def test_backends_without_gradients_are_refused_for_training_only() -> None:
    with pytest.raises(RecipeError, match="no gradients"):
        resolve("sage", "cuda")
    assert resolve("sage", "cuda", training=False) == "sage"


def test_what_needs_second_derivatives_says_so_about_fused_kernels() -> None:
    with pytest.raises(RecipeError, match="the Hessian needs second derivatives.*_native_math"):
        require_double_backward("native", "the Hessian")
    require_double_backward("_native_math", "the Hessian")


def test_fused_attention_has_no_second_derivative_and_plain_mathematics_has() -> None:
    def second(backend: torch.nn.attention.SDPBackend) -> torch.Tensor:
        q, k, v = qkv(grad=True)
        with torch.nn.attention.sdpa_kernel(backend):
            (first,) = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).square().sum(), q, create_graph=True)
        return torch.autograd.grad(first.square().sum(), q)[0]

    assert second(torch.nn.attention.SDPBackend.MATH).abs().max() > 0
    with pytest.raises(RuntimeError, match="not implemented|does not require grad"):
        second(torch.nn.attention.SDPBackend.FLASH_ATTENTION)


# observing


def test_kernels_inside_composite_operators_are_seen() -> None:
    q, k, v = qkv()
    assert observed_kernels(lambda: F.scaled_dot_product_attention(q, k, v)) == {FLASH}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert observed_kernels(lambda: F.scaled_dot_product_attention(q, k, v)) == {"softmax"}
    assert observed_kernels(lambda: q + k) == set()


def test_watching_tells_components_apart_and_leaves_no_hook() -> None:
    class Attends(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            F.scaled_dot_product_attention(x, x, x)
            raise KeyboardInterrupt

    modules = {"attends": Attends(), "fails": Fails(), "idle": Attends()}
    x = qkv()[0]
    with pytest.raises(KeyboardInterrupt), watching(modules) as seen:
        modules["attends"](x)
        modules["fails"](x)
    assert seen == {"attends": {FLASH}, "fails": {FLASH}}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules.values())
    assert observed_kernels(lambda: None) == set()
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_a_kernel_that_did_not_run_is_an_error_that_names_the_component() -> None:
    module = nn.Identity()
    with pytest.raises(PolicyError, match=rf"'xformers' was asked for, but in unet \(Identity\) ran: {FLASH}"):
        verify("xformers", "unet", module, {FLASH})
    with pytest.raises(PolicyError, match="no attention kernel at all"):
        verify("native", "unet", module, set())
    with pytest.raises(PolicyError, match="_native_math"):
        verify("_native_math", "unet", module, {FLASH, "softmax"})
    verify("xformers", "unet", module, {"xformers_flash.flash_fwd", "softmax"})
    verify("native", "unet", module, {FLASH})


# setting


@pytest.mark.parametrize("name", ["sd3", "sd15", "qwen_image", "cogvideox_t2v"])
def test_the_asked_kernel_runs_in_models_with_and_without_diffusers_dispatcher(name: str) -> None:
    pipe = ZOO[name].build()
    before, default = processors(pipe), _AttentionBackendRegistry.get_active_backend()[0]
    part = next(iter(denoisers(pipe)))
    with Policy(pipe, attention="sdpa") as policy:
        plain = forward(policy, name)
        assert policy.attention.kernels == {part: {FLASH}}
    with Policy(pipe, attention="_native_math") as policy:
        mathematics = forward(policy, name)
        assert policy.attention.kernels == {part: {"softmax"}}
        assert _AttentionBackendRegistry.get_active_backend()[0] == default
    torch.testing.assert_close(mathematics, plain, rtol=1e-4, atol=1e-4)
    assert processors(pipe) == before


def test_another_models_switch_does_not_reach_into_a_policy() -> None:
    pipe, other = ZOO["qwen_image"].build(), ZOO["flux"].build()
    default = _AttentionBackendRegistry.get_active_backend()[0]
    try:
        with Policy(pipe) as policy:
            other.transformer.set_attention_backend("_native_math")  # changes the process-wide default
            forward(policy, "qwen_image")
            assert policy.attention.kernels == {"transformer": {FLASH}}
    finally:
        _AttentionBackendRegistry.set_active_backend(default)


def test_auto_keeps_a_backend_that_the_owner_chose_and_sdpa_replaces_it_for_the_time() -> None:
    pipe = ZOO["qwen_image"].build()
    for layer in pipe.transformer.modules():
        if "processor" in vars(layer):
            layer.processor._attention_backend = AttentionBackendName._NATIVE_MATH
    before = processors(pipe)
    assert {backend for _, _, backend in before} == {AttentionBackendName._NATIVE_MATH}
    for attention, kernels in (("auto", {"softmax"}), ("sdpa", {FLASH})):
        with Policy(pipe, attention=attention) as policy:
            forward(policy, "qwen_image")
            assert policy.attention.kernels == {"transformer": kernels}
        assert processors(pipe) == before


def test_a_component_that_runs_something_else_is_found_at_the_first_conditioning() -> None:
    pipe = ZOO["qwen_image"].build()
    policy = Policy(pipe, attention="_native_math")
    for layer in pipe.transformer.modules():
        if "processor" in vars(layer):
            layer.processor._attention_backend = AttentionBackendName.NATIVE
    with pytest.raises(PolicyError, match=r"in transformer \(QwenImageTransformer2DModel\) ran: aten"):
        forward(policy, "qwen_image")


def test_training_gradients_are_the_same_through_a_routed_processor() -> None:
    grads = []
    for attention in ("sdpa", "_native_math"):
        policy = Policy(ZOO["sd3"].build(), LoRA(rank=2), attention=attention)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.fill_(0.05)
        forward(policy, "sd3").square().mean().backward()
        grads.append([p.grad for p in policy.parameters()])
    assert any(g is not None and g.abs().max() > 0 for g in grads[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-5)


def test_a_processor_that_somebody_exchanged_meanwhile_is_left_to_them() -> None:
    from diffusers.models.attention_processor import AttnProcessor

    pipe = ZOO["sd15"].build()
    chosen = ChosenAttention(denoisers(pipe), "_native_math", CPU, training=False)
    name, layer = next((n, m) for n, m in pipe.unet.named_modules() if "processor" in vars(m))
    mine = AttnProcessor()
    layer.processor = mine
    chosen.close()
    assert layer.processor is mine
    others = [m for n, m in pipe.unet.named_modules() if "processor" in vars(m) and n != name]
    assert {type(m.processor).__module__ for m in others} == {"diffusers.models.attention_processor"}
    assert not any("alignkit_backend" in vars(m.processor) for m in others)


def test_a_scope_restores_after_an_exception() -> None:
    pipe = ZOO["sd3"].build()
    before = processors(pipe)
    with pytest.raises(ZeroDivisionError), scope(denoisers(pipe), "_native_math", "_native_math"):
        assert processors(pipe) != before
        raise ZeroDivisionError
    assert processors(pipe) == before


# reporting


def test_the_report_says_which_backends_run_forward_and_backward_here() -> None:
    report = {found.backend: found for found in kernel_report(CPU)}
    assert report["native"].backward and report["native"].kernels == (FLASH,)
    assert report["_native_math"].backward and report["_native_math"].kernels == ("softmax",)
    assert not report["xformers"].forward and report["xformers"].note
    assert not report["_native_efficient"].forward
    assert not any("hub" in name for name in report)  # these would download
    assert next(iter(report)) == "native"


@gpu
@needs_cuda
@pytest.mark.parametrize("backend", ["native", "_native_efficient", "_native_flash", "xformers"])
def test_memory_efficient_kernels_run_forward_and_backward_on_a_gpu(backend: str) -> None:
    found = probe(backend, "cuda")
    assert found.backward, found.note
    verify(backend, "probe", nn.Identity(), set(found.kernels))


@gpu
@needs_cuda
@pytest.mark.parametrize("name", ["sd3", "sd15", "qwen_image"])
def test_xformers_runs_in_every_kind_of_model_on_a_gpu(name: str, tmp_path: Path) -> None:
    pipe = ZOO[name].build().to("cuda", torch.bfloat16)
    with Policy(pipe, attention="xformers") as policy:
        forward(policy, name)
