"""A tiny VideoReward that rates clips of moving shapes in look, motion and what was asked.

What `recipes/shapes_reward.py` trains, from the base model of `speaker.py`: the scorer, its examples and what it is
measured by. It is trained through the class that scores with it, and saved in the published layout, so that nothing
special loads it:

    VideoReward("shipped:assets/shapes/reward", base="shipped:assets/shapes/reward/base", **OPTIONS)
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file as load_tensors
from safetensors.torch import save_file
from torch import Tensor, nn

from alignkit import Prompt
from alignkit.objectives.preference import accuracy_with_ties, accuracy_without_ties, tie_threshold
from alignkit.rewards.loading import load_file
from alignkit.rewards.token_head import published_names
from alignkit.rewards.video_reward import CONFIG, DIMENSIONS, NORMALISATION, TEMPLATE_FILE, TOKENS, VideoReward
from alignkit.shipped import path, resolved
from alignkit.training.examples import PairBatch

speaker = load_file(path("recipes", "shapes", "speaker.py"))
contests, world = speaker.contests, speaker.world

OPTIONS: dict[str, Any] = {"media_fps": speaker.RATE, "batch_size": 64, "dtype": "float32"}
QUESTION = "look{}motion{}{{prompt}}{}".format(*TOKENS)


def write_checkpoint(folder: Path, state: Mapping[str, Tensor], normalisation: Mapping[str, float]) -> None:
    """Weights in float16, settings and template under the published names."""
    checkpoint = folder / "checkpoint-1"
    checkpoint.mkdir(parents=True, exist_ok=True)
    halves = {name: value.detach().cpu().half().contiguous() for name, value in published_names(state).items()}
    save_file(halves, str(checkpoint / "model.safetensors"), metadata={"format": "pt"})
    settings = {
        "data_config": {"fps": speaker.RATE, "max_frame_pixels": speaker.PIXELS, "eval_dim": list(DIMENSIONS)},
        "model_config": {"output_dim": len(DIMENSIONS), "use_special_tokens": True, "reward_token": "special"},
        "peft_lora_config": {"lora_enable": False},
        "inference_config": dict(normalisation),
    }
    (folder / CONFIG).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    (folder / TEMPLATE_FILE).write_text(QUESTION, encoding="utf-8")


class Judge(nn.Module):
    """VideoReward in training.

    Args:
        base: folder of the Qwen2-VL that it starts from, as `Speaker.save` writes it.
    """

    def __init__(self, base: Path) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        place = Path(self.folder.name)
        write_checkpoint(place, judging(load_tensors(base / "model.safetensors")), dict.fromkeys(NORMALISATION, 1.0))
        self.reward = VideoReward(str(place), str(base), normalised=False, **OPTIONS)
        self.base, self.model = base, self.reward.reader.model.requires_grad_(True)

    def forward(self, media: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(B, 3) of (B, T, 3, H, W): VQ, MQ and TA, not normalised."""
        return torch.stack(list(self.reward.components(media, prompts).values()), dim=1)

    def save(self, folder: Path) -> None:
        """The published layout, with means and deviations over clips of training prompts."""
        asked, first, second, _ = contests.drawn(np.random.default_rng([6, 3]), 128, world.split_prompts()[0])
        clips = contests.as_media(np.concatenate([first, second]))
        with torch.no_grad():
            found = self(clips, [Prompt(prompt) for prompt in (*asked, *asked)])
        measured = dict(zip((f"{name}_mean" for name in DIMENSIONS), found.mean(dim=0).tolist(), strict=True))
        measured |= zip((f"{name}_std" for name in DIMENSIONS), found.std(dim=0).tolist(), strict=True)
        write_checkpoint(folder, self.model.state_dict(), measured)
        shutil.copytree(self.base, folder / "base")


def scorer(base: str = "shipped:assets/shapes/reward/base") -> Judge:
    return Judge(Path(resolved(base)))


def judging(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a base model as those of an untrained VideoReward: rows for the special tokens, and a head."""
    rng, embedding = torch.Generator().manual_seed(6), "model.embed_tokens.weight"
    rows = state[embedding].float()
    special = rows.std() * torch.randn(len(TOKENS), rows.shape[1], generator=rng)
    head = torch.randn(len(DIMENSIONS), rows.shape[1], generator=rng) * rows.shape[1] ** -0.5
    kept = {name: value for name, value in state.items() if not name.startswith("lm_head.")}
    return {**kept, embedding: torch.cat([rows, special]), "rm_head.weight": head}


class Contests:
    """Pairs of clips with labels as people give them.

    Args:
        pairs: how many are drawn, before training.
        mistaken, unanswered: shares of labels that are noise and that are missing.
        shuffled: the control: pairs get the labels of other pairs.
        held_out_pairs: how many the measures use, with clean labels and of held-out prompts.
    """

    def __init__(
        self,
        pairs: int = 8000,
        mistaken: float = 0.05,
        unanswered: float = 0.03,
        shuffled: bool = False,
        held_out_pairs: int = 256,
    ) -> None:
        train, held_out = world.split_prompts()
        rng = np.random.default_rng([6, 2])
        self.prompts, *self.clips, self.labels = contests.drawn(rng, pairs, train, mistaken, unanswered)
        if shuffled:
            self.labels = rng.permutation(self.labels)
        rng = np.random.default_rng([6, 1])
        self.held_out = contests.drawn(rng, held_out_pairs, held_out)
        self.probes = contests.probes(rng, held_out)

    def batch(self, size: int, rng: torch.Generator) -> PairBatch:
        rows = torch.randint(len(self.prompts), (size,), generator=rng).tolist()
        both = np.stack([side[rows] for side in self.clips], axis=1)
        first, second = speaker.softened(contests.as_media(both), rng).unbind(dim=1)
        labels = torch.from_numpy(self.labels[rows])
        return PairBatch.of_labels(first, second, [Prompt(self.prompts[i], i) for i in rows], labels)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Accuracies on held-out prompts by dimension, with ties at the best threshold, without ties, and the share of
        clips without a flaw that beat the same prompt's clip with just that flaw; strictly."""
        return accuracies(model, self.held_out) | beaten(model, self.probes)


def rated(model: Any, clips: np.ndarray, prompts: Sequence[str], batch: int = 64) -> Tensor:
    """(N, 3) of (N, T, H, W, 3) uint8 clips."""
    parts = [slice(start, start + batch) for start in range(0, len(clips), batch)]
    return torch.cat([model(contests.as_media(clips[rows]), [Prompt(p) for p in prompts[rows]]) for rows in parts])


@torch.no_grad()
def accuracies(model: Any, pairs: Any) -> dict[str, float]:
    """With and without ties, by dimension and the mean of the three."""
    prompts, first, second, told = pairs
    leads, labels, found = rated(model, first, prompts) - rated(model, second, prompts), torch.from_numpy(told), {}
    for name, lead, label in zip(DIMENSIONS, leads.unbind(dim=1), labels.unbind(dim=1), strict=True):
        found[f"{name} with ties"] = accuracy_with_ties(lead, label, tie_threshold(lead, label))
        found[f"{name} without ties"] = accuracy_without_ties(lead, label)
    for kind in ("with ties", "without ties"):
        found[f"mean {kind}"] = sum(found[f"{name} {kind}"] for name in DIMENSIONS) / len(DIMENSIONS)
    return found


@torch.no_grad()
def beaten(model: Any, probes: Any) -> dict[str, float]:
    """For each flaw the share of prompts whose clip without it is rated higher, in the dimension that it is of."""
    prompts, clips = probes
    scores = {flaw: rated(model, shown, prompts) for flaw, shown in clips.items()}
    columns = {flaw: DIMENSIONS.index(name) for name, flaws in contests.FLAWS.items() for flaw in flaws}
    ahead = {flaw: (scores[""] > scores[flaw])[:, column].float().mean() for flaw, column in columns.items()}
    return {f"{DIMENSIONS[columns[flaw]]}: beats {flaw}": float(share) for flaw, share in ahead.items()}
