"""What a judge should not fall for, tried on real pictures before a run trusts it.

Each probe changes the pictures or the prompts and measures how the scores move. Constant judges, judges that like a
place, and judges that read instructions off the prompt have cost published runs their results (one-token attacks on
judges, arXiv 2507.08794; both orders, arXiv 2508.20751).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from einops import rearrange, repeat
from PIL import Image, ImageDraw, ImageFont

from alignkit.rewards.base import Pairwise, Reward, as_prompts, evaluate
from alignkit.rewards.pixels import to_uint8
from alignkit.types import Prompt

OPENERS = (":", ".", "Thought process:", "Let's solve this problem step by step.")
"""What made language-model judges say yes without anything behind it."""

Change = Callable[[torch.Tensor, Sequence[Prompt], torch.Generator], tuple[torch.Tensor, Sequence[Prompt]]]


def blank(
    media: torch.Tensor, prompts: Sequence[Prompt], rng: torch.Generator
) -> tuple[torch.Tensor, Sequence[Prompt]]:
    """Grey instead of the picture."""
    return torch.full_like(media, 0.5), prompts


def shuffled_pixels(
    media: torch.Tensor, prompts: Sequence[Prompt], rng: torch.Generator
) -> tuple[torch.Tensor, Sequence[Prompt]]:
    """The pixels of each picture in another order: its colours without anything to see."""
    order = torch.randperm(media.shape[-2] * media.shape[-1], generator=rng).to(media.device)
    return media.flatten(-2)[..., order].reshape(media.shape), prompts


def other_picture(
    media: torch.Tensor, prompts: Sequence[Prompt], rng: torch.Generator
) -> tuple[torch.Tensor, Sequence[Prompt]]:
    """The next sample's picture. The batch should hold different prompts."""
    return media.roll(1, 0), prompts


def caption_in_picture(
    media: torch.Tensor, prompts: Sequence[Prompt], rng: torch.Generator
) -> tuple[torch.Tensor, Sequence[Prompt]]:
    """The prompt written across the bottom of the picture."""
    return torch.stack([_captioned(one, str(prompt)) for one, prompt in zip(media, prompts, strict=True)]), prompts


def _captioned(media: torch.Tensor, text: str) -> torch.Tensor:
    height, width = media.shape[-2:]
    canvas = Image.new("L", (width, height), 0)
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(max(height // 8, 6))
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    pen.text((max((width - (right - left)) // 2, 0), height - (bottom - top) - height // 12), text, 255, font)
    ink = torch.from_numpy(np.array(canvas)).to(media) / 255
    return media * (1 - ink) + (media.mean() < 0.5).to(media) * ink


def opened_with(opener: str) -> Change:
    """The prompt followed by words that promise a good answer and say nothing."""

    def change(
        media: torch.Tensor, prompts: Sequence[Prompt], rng: torch.Generator
    ) -> tuple[torch.Tensor, Sequence[Prompt]]:
        return media, [Prompt(f"{prompt}\n{opener}", id=prompt.id, columns=prompt.columns) for prompt in prompts]

    return change


def frozen(
    media: torch.Tensor, prompts: Sequence[Prompt], rng: torch.Generator
) -> tuple[torch.Tensor, Sequence[Prompt]]:
    """The first frame of each video for as long as it lasts."""
    return repeat(media[:, 0], "b c h w -> b t c h w", t=media.shape[1]), prompts


def shuffled_frames(
    media: torch.Tensor, prompts: Sequence[Prompt], rng: torch.Generator
) -> tuple[torch.Tensor, Sequence[Prompt]]:
    """The frames of each video in another order."""
    return media[:, torch.randperm(media.shape[1], generator=rng).to(media.device)], prompts


def jittered(media: torch.Tensor, quality: int = 80) -> torch.Tensor:
    """The media after JPEG, which a person would hardly notice."""
    frames = media.reshape(-1, *media.shape[-3:])
    decoded = []
    for pixels in to_uint8(frames):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, format="JPEG", quality=quality)
        decoded.append(np.array(Image.open(file)))
    shown = rearrange(torch.from_numpy(np.stack(decoded)), "b h w c -> b c h w").to(media) / 255
    return shown.reshape(media.shape)


SHOULD_FALL: Mapping[str, Change] = {
    "blank": blank,
    "shuffled_pixels": shuffled_pixels,
    "other_picture": other_picture,
}
SHOULD_FALL_IN_VIDEO: Mapping[str, Change] = {"frozen": frozen, "shuffled_frames": shuffled_frames}
SHOULD_NOT_RISE: Mapping[str, Change] = {
    "caption_in_picture": caption_in_picture,
    **{f"opener_{i}": opened_with(opener) for i, opener in enumerate(OPENERS)},
}


def robustness(
    reward: Reward,
    media: torch.Tensor,
    prompts: Sequence[str],
    rng: torch.Generator,
    counter: Sequence[str] | None = None,
) -> dict[str, float]:
    """How a pointwise judge moves under each probe; about ten times the cost of scoring the batch.

    Args:
        media: good pictures (B, 3, H, W) or videos (B, T, 3, H, W) of `prompts`, B at least 3.
        counter: for every prompt one that is false of its picture (an attribute exchanged, a negation).

    Returns:
        `rise/<probe>`: mean change of the score, in standard deviations of the plain scores (where these are all
        equal, in points); `rank_stability`: Spearman's correlation of the scores with those after JPEG;
        `ties`: share of pairs of samples with equal scores. Samples that the judge could not score are left out.
    """
    known = as_prompts(prompts)
    with torch.no_grad():
        plain = evaluate(reward, media, known).scores
        changes = {**SHOULD_FALL, **SHOULD_NOT_RISE, **(SHOULD_FALL_IN_VIDEO if reward.kind == "video" else {})}
        moved = {name: evaluate(reward, *change(media, known, rng)).scores for name, change in changes.items()}
        if counter is not None:
            false = [Prompt(text, id=p.id, columns=p.columns) for text, p in zip(counter, known, strict=True)]
            moved["counter_caption"] = evaluate(reward, media, false).scores
        after = evaluate(reward, jittered(media), known).scores
    spread = float(plain[plain.isfinite()].std(correction=0)) or 1.0
    found = {f"rise/{name}": float((scores - plain).nanmean()) / spread for name, scores in moved.items()}
    return {**found, "rank_stability": spearman(plain, after), "ties": share_of_ties(plain)}


def complaints(numbers: Mapping[str, float], least: float = 0.1) -> list[str]:
    """A sentence for every probe that a judge falls for.

    Args:
        numbers: of `robustness`.
        least: standard deviations by which a score has to fall, or may rise.
    """
    falls = {*SHOULD_FALL, *SHOULD_FALL_IN_VIDEO, "counter_caption"}
    said = []
    for name, value in numbers.items():
        probe = name.removeprefix("rise/")
        if probe in falls and not value < -least:
            said.append(f"{probe}: the score should fall and changed by {value:+.2f} standard deviations")
        elif name.startswith("rise/") and probe not in falls and not value < least:
            said.append(f"{probe}: the score should not rise and changed by {value:+.2f} standard deviations")
    if not numbers["rank_stability"] > 0.8:
        said.append(
            f"rank_stability: JPEG changes the order of the samples (correlation {numbers['rank_stability']:.2f})"
        )
    if not numbers["ties"] < 0.5:
        said.append(
            f"ties: {numbers['ties']:.0%} of the pairs of samples have equal scores; groups will have no spread"
        )
    return said


def place_bias(judge: Pairwise, first: torch.Tensor, second: torch.Tensor, prompts: Sequence[str]) -> float:
    """How much more often than half a pair judge prefers what is shown first, both orders asked, in [-0.5, 0.5]."""
    known = as_prompts(prompts)
    with torch.no_grad():
        straight, swapped = judge.compare(first, second, known), judge.compare(second, first, known)
    return float((0.5 * (straight + swapped)).nanmean()) - 0.5


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation of two (B,), ties sharing their mean rank, over samples finite in both; NaN where one of them
    is constant."""
    both = a.isfinite() & b.isfinite()
    ranks = torch.stack([_ranks(x[both].double()) for x in (a, b)])
    centred = ranks - ranks.mean(1, keepdim=True)
    return float((centred[0] * centred[1]).sum() / centred.square().sum(1).prod().sqrt())


def _ranks(x: torch.Tensor) -> torch.Tensor:
    """(B,) mean ranks, from 0.5."""
    return (x.unsqueeze(1) > x).double().sum(1) + 0.5 * (x.unsqueeze(1) == x).double().sum(1)


def share_of_ties(scores: torch.Tensor) -> float:
    """Share of the pairs of finite scores that are equal."""
    finite = scores[scores.isfinite()]
    number = len(finite)
    equal = (finite.unsqueeze(0) == finite.unsqueeze(1)).sum().item() - number
    return equal / (number * (number - 1)) if number > 1 else 0.0
