"""The probes tell a judge that looks from one that does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

from alignkit.rewards.judge_probes import (
    blank,
    caption_in_picture,
    complaints,
    frozen,
    jittered,
    place_bias,
    robustness,
    share_of_ties,
    shuffled_frames,
    shuffled_pixels,
    spearman,
)
from alignkit.types import Prompt
from tests.rewards.signs import WORDS, prompt_text, sign

COLOURS = ("blue", "red", "yellow", "white")


@dataclass
class FakeJudge:
    """Scores by a function of (media, prompts)."""

    score: Callable[[torch.Tensor, Sequence[Prompt]], torch.Tensor]
    name: str = "fake"
    kind: str = "image"
    differentiable: bool = False

    def __call__(self, media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        return self.score(media, prompts)


def signs() -> tuple[torch.Tensor, list[Prompt]]:
    media = torch.stack([sign(word, colour) for word, colour in zip(WORDS, COLOURS)])
    return media, [Prompt(prompt_text(word, colour), id=i) for i, (word, colour) in enumerate(zip(WORDS, COLOURS))]


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def true_picture(media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
    """High where the picture is the sign that the prompt describes; different from sign to sign."""
    shown = {str(prompt): picture for picture, prompt in zip(*signs())}
    closeness = [1 - (one - shown[str(p).split("\n")[0]]).abs().mean() for one, p in zip(media, prompts)]
    bonus = torch.tensor([sorted(shown).index(str(p).split("\n")[0]) / 50 for p in prompts])
    return torch.stack(closeness) + bonus


def test_a_judge_that_looks_at_the_picture_gets_no_complaint() -> None:
    media, prompts = signs()
    others = [prompts[(i + 1) % 4] for i in range(4)]
    numbers = robustness(FakeJudge(true_picture), media, prompts, rng(), counter=others)
    assert complaints(numbers) == []
    assert numbers["rank_stability"] > 0.8 and numbers["ties"] == 0


def test_a_judge_that_reads_only_the_prompt_is_found_out() -> None:
    media, prompts = signs()
    judge = FakeJudge(lambda media, prompts: torch.tensor([float(len(p)) for p in prompts]))
    said = " ".join(complaints(robustness(judge, media, prompts, rng())))
    for probe in ("blank", "shuffled_pixels", "other_picture", "opener_3: the score should not rise"):
        assert probe in said


def test_a_judge_that_gives_everything_the_same_mark_is_found_out() -> None:
    judge = FakeJudge(lambda media, prompts: torch.full((len(media),), 4.0))
    numbers = robustness(judge, *signs(), rng())
    assert numbers["ties"] == 1
    said = " ".join(complaints(numbers))
    assert "ties: 100%" in said and "rank_stability" in said


def test_a_judge_that_likes_writing_is_found_out() -> None:
    def edges(media: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
        return media.diff(dim=-1).abs().mean((1, 2, 3))

    said = " ".join(complaints(robustness(FakeJudge(edges), *signs(), rng())))
    assert "caption_in_picture: the score should not rise" in said


def test_a_judge_of_videos_that_sees_no_motion_is_found_out() -> None:
    clips = torch.rand(4, 5, 3, 16, 16, generator=rng())
    texts = ["a", "b", "c", "d"]
    first_frame = FakeJudge(lambda media, prompts: media[:, 0].mean((1, 2, 3)), kind="video")
    assert "frozen: the score should fall" in " ".join(complaints(robustness(first_frame, clips, texts, rng())))
    any_order = FakeJudge(lambda media, prompts: media.mean((1, 2, 3, 4)), kind="video")
    assert "shuffled_frames: the score should fall" in " ".join(complaints(robustness(any_order, clips, texts, rng())))


def test_a_liking_for_the_first_place_is_measured() -> None:
    @dataclass
    class Fixed:
        p: float
        name: str = "fixed"
        kind: str = "image"

        def compare(self, first: torch.Tensor, second: torch.Tensor, prompts: Sequence[Prompt]) -> torch.Tensor:
            better = (first.mean((1, 2, 3)) > second.mean((1, 2, 3))).float()
            return 0.5 * better + self.p * 0.5

    media, prompts = signs()
    assert place_bias(Fixed(0.5), media, media.flip(0) * 0.9, prompts) == pytest.approx(0)
    assert place_bias(Fixed(0.9), media, media.flip(0) * 0.9, prompts) == pytest.approx(0.2)


def test_each_change_does_what_it_says() -> None:
    media, prompts = signs()
    assert blank(media, prompts, rng())[0].std() == 0
    moved, _ = shuffled_pixels(media, prompts, rng())
    assert not torch.equal(moved, media)
    torch.testing.assert_close(moved.flatten(2).sort(2).values, media.flatten(2).sort(2).values)
    written, _ = caption_in_picture(media, prompts, rng())
    assert written.shape == media.shape and written.min() >= 0 and written.max() <= 1
    changed = (written - media).abs().amax(1) > 0.2
    assert 0.005 < changed.float().mean() < 0.3
    clips = torch.rand(2, 4, 3, 8, 8, generator=rng())
    assert torch.equal(frozen(clips, prompts, rng())[0][:, 3], clips[:, 0])
    reordered, _ = shuffled_frames(clips, prompts, rng())
    assert not torch.equal(reordered, clips)
    torch.testing.assert_close(reordered.sum(1), clips.sum(1))
    smooth = media.mean((2, 3), keepdim=True).expand_as(media)
    torch.testing.assert_close(jittered(smooth), smooth, rtol=0, atol=0.02)


def test_rank_correlation_and_ties_are_the_textbook_ones() -> None:
    from scipy.stats import spearmanr

    a, b = torch.randn(9, generator=rng()), torch.randn(9, generator=torch.Generator().manual_seed(2)).round()
    assert spearman(a, b) == pytest.approx(spearmanr(a.numpy(), b.numpy()).statistic)
    assert share_of_ties(torch.tensor([1.0, 1.0, 2.0, float("nan")])) == pytest.approx(1 / 3)
