"""The cosine of any model of open_clip as a reward, with its preprocessing on tensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from alignkit.errors import RecipeError, RewardError
from alignkit.rewards.card import Card
from alignkit.rewards.dual_encoder import DualEncoder
from alignkit.rewards.fit import fit
from alignkit.rewards.random_weights import random_network
from alignkit.rewards.tensor_files import named, refuse_code
from alignkit.rewards.weights import DTYPES, Files, frozen, locate

CONFIG = "open_clip_config.json"
CHECKPOINT = "open_clip_model.safetensors|open_clip_pytorch_model.safetensors|open_clip_pytorch_model.bin"
# `a|b` is satisfied by either and downloads both: the tokenizer's files are there only for some models.
CONFIG_AND_TOKENIZER = f"{CONFIG}|tokenizer*|special_tokens_map.json|vocab.*|merges.txt|spiece.model|sentencepiece*"
LOCAL = "local-dir:"
RESIZE_MODES = ("shortest", "longest", "squash")


class OpenCLIPTowers:
    """A model of open_clip, its tokenizer, and its preprocessing on tensors.

    Texts are cut by the tokenizer to the model's context (77), the last token becoming the end token.
    """

    def __init__(self, network: Any, tokenizer: Callable[[list[str]], torch.Tensor], dtype: str, resize: str) -> None:
        from open_clip.transform import PreprocessCfg

        self.network: Any = frozen(network, dtype)
        self.tokenizer = tokenizer
        self.dtype = DTYPES[dtype]
        self.preprocess = PreprocessCfg(
            **{**network.visual.preprocess_cfg, **({"resize_mode": resize} if resize else {})}
        )

    @property
    def logit_scale(self) -> torch.Tensor:
        return self.network.logit_scale

    def image(self, media: torch.Tensor) -> torch.Tensor:
        """(B, D) from (B, 3, H, W) in [0, 1]."""
        return self.network.encode_image(preprocess(media, self.preprocess).to(self.dtype))

    def text(self, texts: list[str], device: torch.device) -> torch.Tensor:
        """(B, D)."""
        return self.network.encode_text(self.tokenizer(texts).to(device))


def preprocess(media: torch.Tensor, config: Any) -> torch.Tensor:
    """(B, 3, h, w) normalised, from (B, 3, H, W) in [0, 1], as a `PreprocessCfg` of open_clip says; differentiable."""
    from torchvision.transforms.v2 import functional as TF

    size = (config.size, config.size) if isinstance(config.size, int) else tuple(config.size)
    fitted = fit(media.float(), size, config.resize_mode, config.interpolation, config.fill_color / 255)
    return TF.normalize(fitted, list(config.mean), list(config.std))


def open_clip_model(
    name: str,
    checkpoint: Path | None,
    config: Mapping[str, Any] | None = None,
    preprocess: Mapping[str, Any] | None = None,
) -> Any:
    """A model of open_clip with the weights that belong to it, complete.

    Args:
        name: an architecture of open_clip, or `local-dir:folder`, which holds configuration and checkpoint.
        checkpoint: the file of weights; None with `local-dir:`.
        config: replaces entries of the architecture's configuration.
        preprocess: replaces entries of its preprocessing.

    Raises:
        RewardError: the weights do not fit, or the file holds more than tensors.
    """
    import open_clip

    file = None if checkpoint is None else str(checkpoint)
    refuse_code(checkpoint or named(Path(name.removeprefix(LOCAL)), CHECKPOINT))
    try:
        return open_clip.create_model(
            name,
            pretrained=file,
            force_preprocess_cfg=dict(preprocess or {}),
            require_pretrained=True,
            **(config or {}),
        )
    except (AssertionError, KeyError, OSError, RuntimeError, ValueError) as error:  # what its loading code raises
        reason = " ".join(str(error).split())
        raise RewardError(f"weights {file or name} do not load into open_clip's {name}: {reason}") from error


@dataclass(frozen=True, eq=False)
class OpenCLIP(DualEncoder):
    """Cosine of image and prompt by any model of open_clip, published or your own.

    Prompts are cut to the model's context, 77 tokens.

    Attributes:
        model: hub id, folder or `shipped:` folder with `open_clip_config.json` and its checkpoint; with
            `pretrained` the name of an architecture, such as "ViT-B-32". The prefixes `hf-hub:` and `local-dir:` are
            accepted.
        pretrained: one of open_clip's tags for that architecture, or a file of weights; "" for a folder or hub id.
        scale: factor of the cosine; "logit": the model's own exp(logit_scale).
        resize_mode: "shortest" (crop), "longest" (pad) or "squash"; "": the model's own.
        dtype: of the network, "float32", "bfloat16" or "float16"; scores are float32.
    """

    name: str = "open_clip"
    model: str = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    pretrained: str = ""
    scale: float | str = 1.0
    resize_mode: str = ""
    dtype: str = "float32"
    card: ClassVar[Card] = Card(
        family="preference",
        summary="the picture fits the prompt, by any model of open_clip",
        range="[-1, 1] times `scale`",
        licence="MIT",
        cost="151 M parameters, 0.6 GB",
        source="2103.00020, 2212.07143",
    )

    def __post_init__(self) -> None:
        if self.resize_mode and self.resize_mode not in RESIZE_MODES:
            raise RecipeError(
                f"resize_mode={self.resize_mode!r}; choose one of {', '.join(RESIZE_MODES)}, or '' for the model's own"
            )
        if isinstance(self.scale, str) and self.scale != "logit":
            raise RecipeError(f"scale={self.scale!r}; give a number, or 'logit' for the model's own exp(logit_scale)")

    @property
    def _source(self) -> str:
        return self.model.removeprefix("hf-hub:").removeprefix(LOCAL)

    @property
    def _is_architecture(self) -> bool:
        import open_clip

        return self._source in open_clip.list_models() and not Path(self._source).exists()

    def _tag(self) -> dict[str, Any] | None:
        """What open_clip knows of the tag in `pretrained`; None where that is a file."""
        import open_clip

        if Path(self.pretrained).is_file():
            return None
        found = open_clip.get_pretrained_cfg(self._source, self.pretrained) if self.pretrained else {}
        if not found:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(self._source)) or "none"
            raise RecipeError(
                f"model={self.model!r} is an architecture of open_clip and needs pretrained=, a file or one of its "
                f"tags; given {self.pretrained!r}, known: {tags}"
            )
        return found

    def files(self) -> tuple[Files, ...]:
        """Configuration, checkpoint and, where the model has its own, tokenizer."""
        if not self._is_architecture:
            if self.pretrained:
                raise RecipeError(
                    f"pretrained={self.pretrained!r} goes with the name of an architecture of open_clip; model="
                    f"{self.model!r} is a folder or hub id and has its own checkpoint: leave pretrained out"
                )
            return (Files(self._source, (CONFIG_AND_TOKENIZER, CONFIG, CHECKPOINT)),)
        tag = self._tag()
        if tag is None:
            return (Files(self.pretrained, ()),)
        source, _, file = tag["hf_hub"].rpartition("/")
        return (Files(source, (file,) if file else (CONFIG_AND_TOKENIZER, CONFIG, CHECKPOINT)),)

    def load(self) -> OpenCLIPTowers:
        """Read the weights."""
        import open_clip

        (files,) = self.files()
        found = locate(files)
        if CONFIG in files.patterns:
            name, checkpoint, preprocessing = f"{LOCAL}{found}", None, {}
        else:
            name, tag = self._source, self._tag() or {}
            checkpoint = found / files.patterns[0] if files.patterns else found
            preprocessing = {key: tag[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in tag}
        network = open_clip_model(name, checkpoint, preprocess=preprocessing)
        return OpenCLIPTowers(network, open_clip.get_tokenizer(name), self.dtype, self.resize_mode)

    def scaled(self, cosine: torch.Tensor) -> torch.Tensor:
        """(B,)."""
        return cosine * (self.towers.logit_scale.float().exp() if isinstance(self.scale, str) else self.scale)

    @classmethod
    def tiny(cls, folder: Path) -> dict[str, Any]:
        """A random model of 16 dimensions with open_clip's own vocabulary, in the layout of its hub repositories."""
        write_tiny_open_clip(folder, "open_clip_model.safetensors")
        return {"model": str(folder), "pretrained": ""}


def write_tiny_open_clip(folder: Path, checkpoint: str) -> None:
    """A random model and its configuration, 3.3 MB, most of it the embedding of open_clip's 49,408 words.

    Args:
        checkpoint: name of the file: `.safetensors` as on the hub, or `.pt` with `{"state_dict": ...}` as published by
            HPSv2, or `.pth` with the bare state as saved by Social Reward.
    """
    import open_clip
    from safetensors.torch import save_file

    vision = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 16, "head_width": 8}
    text = {"context_length": 77, "vocab_size": 49408, "layers": 2, "width": 16, "heads": 2}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    state = random_network(lambda: open_clip.CLIP(**config)).state_dict()
    (folder / CONFIG).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}), encoding="utf-8")
    if checkpoint.endswith(".safetensors"):
        save_file(state, folder / checkpoint)
    else:
        torch.save({"state_dict": state} if checkpoint.endswith(".pt") else state, folder / checkpoint)
