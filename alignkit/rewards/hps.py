"""Human Preference Score v2 and v2.1, and Social Reward: published checkpoints of open_clip's architectures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from alignkit.errors import RecipeError
from alignkit.rewards.card import Card
from alignkit.rewards.dual_encoder import DualEncoder
from alignkit.rewards.openclip import CONFIG, OpenCLIPTowers, open_clip_model, write_tiny_open_clip
from alignkit.rewards.tensor_files import named
from alignkit.rewards.weights import Files, locate


class FineTuned(DualEncoder):
    """An architecture of open_clip with a checkpoint from elsewhere; the reward is the plain cosine."""

    file: ClassVar[str]
    resize_mode: ClassVar[str]
    weights: str
    architecture: str
    dtype: str

    def files(self) -> tuple[Files, ...]:
        """The checkpoint; the tokenizer is inside open_clip."""
        return (Files(self.weights, (self.file,)),)

    def load(self) -> OpenCLIPTowers:
        """Read the weights."""
        import open_clip

        (files,) = self.files()
        found = locate(files)
        found = named(found, self.file) if found.is_dir() else found
        name, config = architecture_of(self.architecture)
        network = open_clip_model(name, found, config)
        return OpenCLIPTowers(network, open_clip.get_tokenizer(name), self.dtype, self.resize_mode)


def architecture_of(given: str) -> tuple[str, dict[str, Any]]:
    """Name of an architecture of open_clip and what to change of its configuration.

    Args:
        given: such a name, or a folder with `open_clip_config.json`.

    Raises:
        RecipeError: neither.
    """
    import open_clip

    if given in open_clip.list_models():
        return given, {}
    file = Path(given) / CONFIG
    if not file.is_file():
        raise RecipeError(
            f"architecture={given!r} is no architecture of open_clip (such as 'ViT-H-14') and no folder with {CONFIG}"
        )
    return "ViT-H-14", json.loads(file.read_text(encoding="utf-8"))["model_cfg"]


@dataclass(frozen=True, eq=False)
class HPSv2(FineTuned):
    """What people prefer of the pictures of one prompt, Human Preference Score v2: cos(image, text).

    Wu et al., 2306.09341. No scale: the published score is the plain cosine of a fine-tuned CLIP-H. The whole picture
    is shown, its long side at 224 and black at the short sides, as the published code does. Prompts are cut to 77
    tokens. Scores of v2 and v2.1 do not compare.

    Attributes:
        weights: hub id, folder, or the file `HPS_v2_compressed.pt` itself.
        architecture: of open_clip, or a folder with an `open_clip_config.json`.
        dtype: of the network, "float32", "bfloat16" or "float16"; scores are float32.
    """

    name: str = "hpsv2"
    weights: str = "xswu/HPSv2"
    architecture: str = "ViT-H-14"
    dtype: str = "float32"
    file: ClassVar[str] = "HPS_v2_compressed.pt"
    resize_mode: ClassVar[str] = "longest"
    card: ClassVar[Card] = Card(
        family="preference",
        summary="people prefer this picture of the prompt",
        range="about 0.2 to 0.3",
        licence="Apache-2.0",
        cost="986 M parameters, 3.9 GB",
        source="2306.09341",
    )

    @classmethod
    def tiny(cls, folder: Path) -> dict[str, Any]:
        """A random model of 16 dimensions as `{"state_dict": ...}`."""
        write_tiny_open_clip(folder, cls.file)
        return {"weights": str(folder), "architecture": str(folder)}


@dataclass(frozen=True, eq=False)
class HPSv21(HPSv2):
    """What people prefer of the pictures of one prompt, Human Preference Score v2.1: cos(image, text).

    As `HPSv2`, trained on better data; its scores do not compare with those of v2.
    """

    name: str = "hpsv21"
    file: ClassVar[str] = "HPS_v2.1_compressed.pt"
    card: ClassVar[Card] = Card(
        family="preference",
        summary="people prefer this picture of the prompt",
        range="about 0.20 to 0.37; beyond, over-optimised",
        licence="Apache-2.0",
        cost="986 M parameters, 3.9 GB",
        source="2306.09341, its v2.1 weights",
    )


@dataclass(frozen=True, eq=False)
class SocialReward(FineTuned):
    """Whether people would make something of the picture, by a million remixes: cos(image, text).

    Isajanyan et al., 2402.09872: CLIP ViT-L/14 trained with a triplet loss on what users of an online community
    remixed. Its code scores by the cosine; on features of length 1 the squared distance of its loss is 2 - 2 cos.
    The repository named by `weights` publishes code and, as far as its README says, no checkpoint: give the `.pth`
    that its training saves (the state of OpenAI's CLIP ViT-L/14).

    Attributes:
        weights: hub id, folder or file.
        architecture: of open_clip, or a folder with an `open_clip_config.json`.
        dtype: of the network, "float32", "bfloat16" or "float16"; scores are float32.
    """

    name: str = "social_reward"
    weights: str = "Picsart-AI-Research/Social-Reward"
    architecture: str = "ViT-L-14-quickgelu"
    dtype: str = "float32"
    file: ClassVar[str] = "*.pth"
    resize_mode: ClassVar[str] = "shortest"
    card: ClassVar[Card] = Card(
        family="preference",
        summary="people would make something of this picture",
        range="[-1, 1]",
        licence="none stated; give your own checkpoint",
        cost="428 M parameters, 1.7 GB",
        source="2402.09872",
    )

    @classmethod
    def tiny(cls, folder: Path) -> dict[str, Any]:
        """A random model of 16 dimensions as a bare state."""
        write_tiny_open_clip(folder, "clip_epoch_0_global_step_final.pth")
        return {"weights": str(folder), "architecture": str(folder)}
