"""Which attention kernel runs in the denoisers: choose it, set it in a scope, and see that it really ran.

diffusers' own switch does nothing on models that call PyTorch's attention from a processor (SD 3, Sana, PixArt,
CogVideoX, the UNets, ...) and elsewhere changes a process-wide default. Here a backend is pinned processor by
processor, by one mechanism for both kinds, and put back afterwards.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from diffusers.utils.constants import DIFFUSERS_ATTN_BACKEND
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from alignkit.errors import PolicyError, RecipeError

SDPA = "native"
"""diffusers' name for PyTorch's scaled-dot-product attention, which chooses among its kernels by itself."""

CPU = (SDPA, "_native_math", "_native_flash")
"""Backends with a forward and a backward on a CPU."""

KERNELS = ("scaled_dot_product", "flash", "efficient_attention", "xformers", "flex_attention", "sage")
"""Parts of the names of operators that compute attention in one piece."""

PROOF: Mapping[str, tuple[str, ...]] = {
    SDPA: ("_scaled_dot_product_", "softmax"),
    "_native_math": ("softmax",),
    "_native_flash": ("_scaled_dot_product_flash_attention",),
    "_native_efficient": ("_scaled_dot_product_efficient_attention",),
    "_native_cudnn": ("_scaled_dot_product_cudnn_attention",),
    # xFormers brings kernels of its own and calls PyTorch's below the level of scaled_dot_product_attention.
    "xformers": ("xformers", "flash_attn_3.", "aten._efficient_attention_forward", "aten._flash_attention_forward"),
    "flex": ("flex_attention",),
    "flash": ("flash_attn",),
    "flash_varlen": ("flash_attn",),
    "_flash_3": ("flash_attn_3",),
    "_flash_varlen_3": ("flash_attn_3",),
}
"""Operators that show that a backend ran, by parts of their names. Others (kernels from the hub) show none."""


def resolve(attention: str, device: torch.device | str, *, training: bool = True) -> str:
    """The diffusers backend that `attention` means on `device`.

    Args:
        attention: "auto" (PyTorch's scaled-dot-product attention, except where the pipeline's owner has chosen a
            backend), "sdpa", "xformers", or a backend of diffusers such as "flash" or "_native_efficient".
        training: gradients are needed.

    Raises:
        RecipeError: an unknown name, or a backend that cannot run here; the message names one that can.
    """
    kind = torch.device(device).type
    known = sorted(name.value for name in AttentionBackendName)
    if attention in ("auto", "sdpa", SDPA):
        return SDPA
    if attention not in known:
        raise RecipeError(f'attention={attention!r} is unknown; expected "auto", "sdpa" or one of {", ".join(known)}')
    if training and "sage" in attention:
        raise RecipeError(f'attention={attention!r} computes no gradients; use attention="sdpa" for training')
    if kind == "cpu" and attention not in CPU:
        raise RecipeError(
            f'attention={attention!r} needs an accelerator and the pipeline is on the CPU; use attention="sdpa"'
        )
    return attention


def require_double_backward(attention: str, what: str) -> None:
    """Raise unless the attention in force can be differentiated twice.

    Raises:
        RecipeError: fused kernels (all but the plain mathematics) have no second derivative.
    """
    if attention != "_native_math":
        raise RecipeError(
            f"{what} needs second derivatives, and fused attention kernels have none "
            f'(attention={attention!r}); use attention="_native_math", which keeps the whole attention matrix'
        )


# observing


class KernelLog(TorchDispatchMode):
    """Names of the attention kernels that run while the mode is on, those inside composite operators too."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.kernels: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "backward" not in name:
            if any(part in name for part in KERNELS):
                self.kernels.add(name.removesuffix(".default"))
            elif "softmax" in name:
                self.kernels.add("softmax")  # attention as separate operations
        return func(*args, **(kwargs or {}))


def observed_kernels(call: Callable[[], Any]) -> set[str]:
    """Names of the attention kernels that ran during `call()`; "softmax" stands for attention in separate steps."""
    with KernelLog() as log:
        call()
    return log.kernels


@contextmanager
def watching(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, set[str]]]:
    """Context: fills a mapping of component name -> kernels that ran in its calls. Components not called are absent."""
    seen: dict[str, set[str]] = {}
    open_logs: list[tuple[str, KernelLog, ExitStack]] = []

    def before(name: str, *_: Any) -> None:
        stack = ExitStack()
        open_logs.append((name, stack.enter_context(KernelLog()), stack))

    def after(*_: Any) -> None:
        name, log, stack = open_logs.pop()
        stack.close()
        seen.setdefault(name, set()).update(log.kernels)

    handles = [module.register_forward_pre_hook(functools.partial(before, name)) for name, module in modules.items()]
    handles += [module.register_forward_hook(after) for module in modules.values()]
    try:
        yield seen
    finally:
        while open_logs:  # calls that raised
            after()
        for handle in handles:
            handle.remove()


def verify(backend: str, component: str, module: nn.Module, kernels: set[str]) -> None:
    """Check what ran in one component against what was asked.

    Raises:
        PolicyError: another kernel ran than the one asked for.
    """
    proof = PROOF.get(backend)
    if proof is None:
        return
    proven = {name for name in kernels if any(part in name for part in proof)}
    if proven and kernels <= proven | {"softmax"}:  # a lone softmax may be a gate, not attention
        return
    ran = ", ".join(sorted(kernels)) or "no attention kernel at all"
    raise PolicyError(
        f"attention={backend!r} was asked for, but in {component} ({type(module).__name__}) ran: {ran}. "
        'Use attention="auto" to keep what the pipeline runs, or "sdpa"'
    )


# setting


class _Routed(TorchFunctionMode):
    """Hands calls of `scaled_dot_product_attention` to a backend of diffusers."""

    def __init__(self, backend: AttentionBackendName) -> None:
        super().__init__()
        self.backend = backend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return _dispatched(self.backend, *args, **(kwargs or {}))


def _dispatched(
    backend: AttentionBackendName,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """(B, heads, length, width), as PyTorch's function has it; diffusers puts the length before the heads."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out = dispatch_attention_fn(q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend=backend)
    return out.transpose(1, 2)


@functools.cache
def _routed_class(own: type) -> type:
    """A subclass of a processor's class that runs it with its attention routed to `alignkit_backend`."""
    entry = "forward" if issubclass(own, nn.Module) else "__call__"
    call = next(vars(cls)[entry] for cls in own.__mro__ if entry in vars(cls))

    @functools.wraps(call)  # diffusers reads the signature to know which keywords a processor takes
    def routed(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _Routed(self.alignkit_backend):
            return call(self, *args, **kwargs)

    return type(own.__name__, (own,), {entry: routed, "__module__": own.__module__})


def _processors(module: nn.Module) -> Iterator[tuple[nn.Module, Any]]:
    for layer in module.modules():
        processor = vars(layer).get("processor", layer._modules.get("processor"))
        if callable(processor):
            yield layer, processor


def _dispatches(processor: Any) -> bool:
    """Whether a processor hands its attention to diffusers' dispatcher, with a backend of its own choice."""
    return any("_attention_backend" in vars(cls) for cls in type(processor).__mro__)


def _pin(processor: Any, backend: AttentionBackendName, stack: ExitStack) -> None:
    own = vars(processor)
    if "_attention_backend" in own:
        stack.callback(setattr, processor, "_attention_backend", own["_attention_backend"])
    else:
        stack.callback(own.pop, "_attention_backend", None)
    processor._attention_backend = backend


def _route(layer: nn.Module, processor: Any, backend: AttentionBackendName, stack: ExitStack) -> None:
    twin = copy.copy(processor)
    twin.__class__ = _routed_class(type(processor))
    twin.alignkit_backend = backend
    layer.processor = twin

    def put_back() -> None:
        if layer.processor is twin:  # else somebody has chosen another one since
            layer.processor = processor

    stack.callback(put_back)


@contextmanager
def scope(modules: Mapping[str, nn.Module], attention: str, backend: str) -> Iterator[None]:
    """Context: attention inside `modules` runs on `backend` (as `resolve` gave it); afterwards all is as it was.

    With `attention="auto"` a backend that the pipeline's owner has set stays; what has none is pinned to the default
    of the environment, so that another model's `set_attention_backend` cannot change it in the middle of a run.
    """
    chosen = AttentionBackendName(DIFFUSERS_ATTN_BACKEND if attention == "auto" else backend)
    with ExitStack() as stack:
        done: set[int] = set()
        for module in modules.values():
            for layer, processor in list(_processors(module)):
                if _dispatches(processor):
                    own = vars(processor).get("_attention_backend")
                    if id(processor) not in done and not (attention == "auto" and own is not None):
                        _pin(processor, chosen, stack)
                    done.add(id(processor))
                elif attention != "auto" and backend != SDPA:
                    _route(layer, processor, chosen, stack)
        yield


class ChosenAttention:
    """The attention of one policy: set for its lifetime, verified at the first call of each component.

    Attributes:
        backend: as `resolve` gave it.
        kernels: by component, what was seen to run.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], attention: str, device: torch.device, *, training: bool
    ) -> None:
        self.attention, self.backend = attention, resolve(attention, device, training=training)
        self.kernels: dict[str, set[str]] = {}
        self.unseen = dict(modules)
        self._stack = ExitStack()
        self._stack.enter_context(scope(modules, attention, self.backend))

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Context around a call of the pipeline: components that run for the first time are verified.

        Raises:
            PolicyError: a component ran another kernel than the one asked for.
        """
        if not self.unseen:
            yield
            return
        with watching(self.unseen) as seen:
            yield
        for name, kernels in seen.items():
            module = self.unseen.pop(name)
            self.kernels[name] = kernels
            if self.attention != "auto":
                verify(self.backend, name, module, kernels)

    def close(self) -> None:
        """Put every processor back."""
        self._stack.close()


# reporting


@dataclass(frozen=True)
class Probe:
    """Whether one backend runs on one device.

    Attributes:
        kernels: what ran, forward.
        forward, backward: whether each succeeded.
        note: why not, in the library's own words, cut to one line.
    """

    backend: str
    kernels: tuple[str, ...]
    forward: bool
    backward: bool
    note: str


def probe(backend: str, device: torch.device | str) -> Probe:
    """Run a tiny forward and backward, (1, 8, 2, 64), float32 on a CPU and bfloat16 elsewhere."""
    kind = torch.device(device)
    dtype = torch.float32 if kind.type == "cpu" else torch.bfloat16
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 8, 2, 64, generator=rng).to(kind, dtype).requires_grad_() for _ in range(3))
    log, forward = KernelLog(), False
    try:
        with log, attention_backend(backend):
            out = dispatch_attention_fn(q, k, v)
        forward = True
        out.sum().backward()
    except (RuntimeError, ValueError, ImportError, TypeError, AttributeError) as error:
        note = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        return Probe(backend, tuple(sorted(log.kernels)), forward, False, note)
    return Probe(backend, tuple(sorted(log.kernels)), True, True, "")


def kernel_report(device: torch.device | str) -> list[Probe]:
    """One probe for each backend that needs no download, PyTorch's own first."""
    local = [name.value for name in AttentionBackendName if "hub" not in name.value]
    other_hardware = ("_native_npu", "_native_xla")
    names = [SDPA, *(n for n in local if n.startswith("_native") and n not in other_hardware)]
    return [probe(n, device) for n in [*names, *(n for n in local if n not in {*names, *other_hardware})]]
