"""Trained, reference, old and EMA weights on one base.

With LoRA they are adapters: nothing of the base is copied, and switching sets which adapters a layer adds, without
touching `requires_grad` (peft's own switches do). With full fine-tuning they are copies (`full_weights.py`).
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from alignkit.errors import PolicyError, RecipeError
from alignkit.policy.full_weights import FullWeights

TRAINED = "alignkit"
COMPANIONS = {"old": "alignkit_old", "ema": "alignkit_ema"}


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters on the denoisers.

    Attributes:
        rank: of each adapter.
        alpha: the update is scaled by alpha / rank.
        targets: "attention" (every linear layer inside attention), "all" (every linear layer), or a tuple of
            module-name endings such as ("to_q", "to_k").
        seed: of the adapters' initial values.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str | tuple[str, ...] = "attention"
    seed: int = 0


@dataclass(frozen=True)
class Full:
    """All denoiser weights are trained; the reference is a frozen copy of them."""


@dataclass(frozen=True)
class Pair:
    """The adapter of one layer: its output gains alpha / rank * B A x.

    Attributes:
        a: (rank, in, ...).
        b: (out, rank, ...).
    """

    a: torch.Tensor
    b: torch.Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


Initial = Mapping[str, Mapping[str, Pair]]
"""Adapters by component and layer name, to start from."""


class Weights(Protocol):
    """What a policy asks of its weights."""

    def parameters(self) -> list[nn.Parameter]: ...

    def using(self, name: str) -> Any: ...

    def snapshot(self, name: str, decay: float) -> None: ...

    def state(self) -> dict[str, torch.Tensor]: ...

    def load(self, state: Mapping[str, torch.Tensor]) -> None: ...

    def close(self) -> None: ...


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's denoising networks by component name (both experts where there are two)."""
    homes = ("diffusers.models.transformers", "diffusers.models.unets")
    parts = {n: p for n, p in vars(pipe).items() if isinstance(p, nn.Module)}
    found = {n: p for n, p in parts.items() if type(p).__module__.startswith(homes)}
    if not found:
        raise PolicyError(
            f"{type(pipe).__name__} has no component from diffusers.models.transformers or diffusers.models.unets "
            f"(components: {', '.join(parts)}), so there is nothing to train"
        )
    return found


def linear_targets(module: nn.Module, targets: str | tuple[str, ...]) -> list[str]:
    """Names of the linear layers that `targets` means in `module`.

    Raises:
        RecipeError: none matches.
    """
    linear = [n for n, layer in module.named_modules() if isinstance(layer, nn.Linear) and "lora_" not in n]
    linear = [n.removesuffix(".base_layer") for n in linear]
    if targets == "all":
        chosen = linear
    elif targets == "attention":
        chosen = [n for n in linear if "attn" in n.lower() or "attention" in n.lower()]
    elif isinstance(targets, str):
        raise RecipeError(f'targets={targets!r}; expected "attention", "all" or a tuple of module-name endings')
    else:
        chosen = [n for n in linear if any(n == t or n.endswith(f".{t}") for t in targets)]
    if not chosen:
        endings = sorted({n.split(".")[-1] for n in linear})
        raise RecipeError(f"targets={targets!r} match no linear layer of {type(module).__name__}; it has {endings}")
    return chosen


def weights_for(pipe: Any, train: LoRA | Full | None, initial: Initial | None = None) -> Weights:
    """The weights of `pipe` as `train` asks for them; with `initial`, adapters of its layers, ranks and alphas."""
    if initial is not None and not isinstance(train, LoRA):
        raise RecipeError(f"init_lora with train={train!r}: a LoRA file starts an adapter; give train=LoRA()")
    match train:
        case None:
            return Untrained()
        case LoRA():
            return LoRAWeights(denoisers(pipe), train, initial)
        case Full():
            return FullWeights(denoisers(pipe))
    raise RecipeError(f"train={train!r}; expected LoRA(...), Full() or None")


class Untrained:
    """A policy for inference: its reference is itself."""

    def parameters(self) -> list[nn.Parameter]:
        return []

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        if name != "reference":
            raise PolicyError(f"a policy without trained weights has no {name!r} weights; give train=LoRA(...)")
        yield

    def snapshot(self, name: str, decay: float) -> None:
        raise PolicyError(f"a policy without trained weights has no {name!r} weights; give train=LoRA(...)")

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        if state:
            raise PolicyError("a policy without trained weights cannot load any")

    def close(self) -> None:
        return None


class LoRAWeights:
    """Adapters on each denoiser; `using` chooses which one a layer adds to its base."""

    def __init__(self, modules: Mapping[str, nn.Module], config: LoRA, initial: Initial | None = None) -> None:
        self.modules, self.config, self.initial = dict(modules), config, initial
        if initial is not None:
            pairs = [pair for layers in initial.values() for pair in layers.values()]
            names = tuple(name for layers in initial.values() for name in layers)
            rank, alpha = _commonest(pairs)
            self.config = replace(config, rank=rank, alpha=alpha, targets=names)
        peft_configs = {name: self._peft_config(name) for name in modules}  # before anything is changed
        _refuse_merged(modules)
        self.flags = [(p, p.requires_grad) for m in modules.values() for p in m.parameters()]
        self.own_config = {n: vars(m).get("peft_config") for n, m in modules.items()}
        self.switches = [(layer, layer._active_adapter, layer._disable_adapters) for layer in self._layers()]
        self.users = {id(layer): [] if off else list(layer.active_adapters) for layer, _, off in self.switches}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            for name, peft_config in peft_configs.items():
                self._inject(name, TRAINED, peft_config)
        self._fill()
        for parameter, _ in self.flags:
            parameter.requires_grad_(False)
        self._activate(TRAINED)

    def _peft_config(self, name: str) -> LoraConfig | None:
        """The configuration of component `name`'s adapters; None where the initial LoRA has none for it."""
        if self.initial is None:
            targets = linear_targets(self.modules[name], self.config.targets)
            ranks, alphas = {}, {}
        else:
            layers = self.initial.get(name, {})
            targets = list(layers)
            ranks = {f"^{re.escape(k)}": p.rank for k, p in layers.items() if p.rank != self.config.rank}
            alphas = {f"^{re.escape(k)}": p.alpha for k, p in layers.items() if p.alpha != self.config.alpha}
        if not targets:
            return None
        return LoraConfig(
            r=self.config.rank,
            lora_alpha=self.config.alpha,  # type: ignore[arg-type]
            target_modules=targets,
            rank_pattern=ranks,
            alpha_pattern=alphas,
            init_lora_weights=True,
        )

    def _inject(self, name: str, adapter: str, config: LoraConfig | None) -> None:
        if config is None:
            return
        module = self.modules[name]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # the user's, or ours: meant
            inject_adapter_in_model(config, module, adapter_name=adapter)
        for layer in _tuner_layers(module):
            for parameters in (layer.lora_A, layer.lora_B):
                if adapter in parameters:
                    parameters[adapter].to(torch.float32).requires_grad_(adapter == TRAINED)

    @torch.no_grad()
    def _fill(self) -> None:
        """Put the initial LoRA's values into the trained adapter."""
        trained = self._tensors(TRAINED)
        for part, layers in (self.initial or {}).items():
            for path, pair in layers.items():
                trained[f"{part}.{path}.lora_A"].copy_(pair.a)
                trained[f"{part}.{path}.lora_B"].copy_(pair.b)

    def _layers(self) -> list[Any]:
        return [layer for module in self.modules.values() for layer in _tuner_layers(module)]

    def _activate(self, name: str | None) -> None:
        for layer in self._layers():
            layer._active_adapter = self.users.get(id(layer), []) + ([name] if name else [])
            layer._disable_adapters = False

    def _tensors(self, name: str) -> dict[str, nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        for part, module in self.modules.items():
            for path, layer in module.named_modules():
                if not isinstance(layer, BaseTunerLayer) or name not in layer.lora_A:  # type: ignore[attr-defined]
                    continue
                found[f"{part}.{path}.lora_A"] = layer.lora_A[name].weight  # type: ignore[attr-defined]
                found[f"{part}.{path}.lora_B"] = layer.lora_B[name].weight  # type: ignore[attr-defined]
        return found

    def parameters(self) -> list[nn.Parameter]:
        return list(self._tensors(TRAINED).values())

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        adapter = None if name == "reference" else self._companion(name)
        with self.only(adapter), torch.set_grad_enabled(torch.is_grad_enabled() and name == "reference"):
            yield

    @contextmanager
    def only(self, adapter: str | None) -> Iterator[None]:
        """Context: of all adapters that are not the user's, this one alone takes effect."""
        active = [(layer, layer._active_adapter) for layer in self._layers()]
        self._activate(adapter)
        try:
            yield
        finally:
            for layer, previous in active:
                layer._active_adapter = previous

    def _companion(self, name: str) -> str:
        adapter = COMPANIONS[name]
        if not self._tensors(adapter):
            raise PolicyError(f'there are no {name!r} weights yet; policy.snapshot("{name}") makes them')
        return adapter

    @torch.no_grad()
    def snapshot(self, name: str, decay: float) -> None:
        adapter = COMPANIONS[name]
        if not self._tensors(adapter):
            decay = 0.0
            active = [(layer, layer._active_adapter) for layer in self._layers()]
            flags = [(p, p.requires_grad) for m in self.modules.values() for p in m.parameters()]
            with torch.random.fork_rng(devices=[]):
                for part in self.modules:
                    self._inject(part, adapter, self._peft_config(part))
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            for layer, previous in active:
                layer._active_adapter = previous
        trained = self._tensors(TRAINED)
        for key, tensor in self._tensors(adapter).items():
            tensor.lerp_(trained[key], 1.0 - decay)

    def state(self) -> dict[str, torch.Tensor]:
        """Every adapter of ours, by `name/component.path.lora_A`."""
        names = {"trained": TRAINED, **COMPANIONS}
        return {f"{n}/{k}": v.detach() for n, adapter in names.items() for k, v in self._tensors(adapter).items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        for name in COMPANIONS:
            if any(key.startswith(f"{name}/") for key in state):
                self.snapshot(name, 0.0)
        own = self.state()
        if own.keys() != state.keys():
            raise PolicyError(f"the saved adapters do not fit: {len(state)} tensors for {len(own)} in the model")
        for key, tensor in own.items():
            tensor.copy_(state[key])

    def remove(self, part: str, adapter: str) -> None:
        """Take one adapter out of a component that keeps others."""
        for layer in _tuner_layers(self.modules[part]):
            _delete(layer, adapter)
        vars(self.modules[part])["peft_config"].pop(adapter, None)

    def close(self) -> None:
        for module in self.modules.values():
            for path, layer in list(module.named_modules()):
                if isinstance(layer, BaseTunerLayer):
                    _remove(module, path, layer)
        for name, module in self.modules.items():
            if self.own_config[name] is None:
                vars(module).pop("peft_config", None)
            else:
                for adapter in (TRAINED, *COMPANIONS.values()):
                    self.own_config[name].pop(adapter, None)  # type: ignore[union-attr]
        for layer, active, disabled in self.switches:
            layer._active_adapter, layer._disable_adapters = active, disabled
        for parameter, flag in self.flags:
            parameter.requires_grad_(flag)


def layer_pairs(modules: Mapping[str, nn.Module], adapter: str) -> dict[str, dict[str, Pair]]:
    """One adapter's values by component and layer; views, detached."""
    found: dict[str, dict[str, Pair]] = {part: {} for part in modules}
    for part, module in modules.items():
        for path, layer in module.named_modules():
            if isinstance(layer, BaseTunerLayer) and adapter in layer.lora_A:  # type: ignore[operator]
                a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight  # type: ignore[index]
                alpha = float(layer.scaling[adapter] * layer.r[adapter])  # type: ignore[index]
                found[part][path] = Pair(a.detach(), b.detach(), alpha)
    return found


def _commonest(pairs: list[Pair]) -> tuple[int, float]:
    """The rank and alpha that most layers have."""
    ranks, alphas = Counter(p.rank for p in pairs), Counter(p.alpha for p in pairs)
    return ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]


def _refuse_merged(modules: Mapping[str, nn.Module]) -> None:
    """A layer with a fused LoRA computes without any adapter: ours would do nothing.

    Raises:
        RecipeError: a LoRA was fused and its adapters are still there.
    """
    for name, module in modules.items():
        merged = sorted({adapter for layer in _tuner_layers(module) for adapter in layer.merged_adapters})
        if merged:
            raise RecipeError(
                f"{name} carries fused LoRA adapters {merged}, beside which no other adapter takes effect; call "
                "pipe.unload_lora_weights() after pipe.fuse_lora() (the fused weights stay), or pipe.unfuse_lora()"
            )


def _tuner_layers(module: nn.Module) -> list[Any]:
    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def _remove(module: nn.Module, path: str, layer: Any) -> None:
    """Take our adapters out of a layer; a layer that carries no adapter of the user's becomes its base again."""
    others = [name for name in layer.lora_A if name not in (TRAINED, *COMPANIONS.values())]
    if not others:
        parent = module.get_submodule(path.rpartition(".")[0])
        setattr(parent, path.rpartition(".")[2], layer.base_layer)
        return
    for adapter in (TRAINED, *COMPANIONS.values()):
        _delete(layer, adapter)


def _delete(layer: Any, adapter: str) -> None:
    if adapter in layer.lora_A:
        layer._active_adapter = [name for name in layer.active_adapters if name != adapter]
        layer.delete_adapter(adapter)
