from __future__ import annotations

from math import isnan

import pytest
import torch

from alignkit.evaluation.diversity import (
    PARTS,
    comparison,
    effective_rank,
    pairwise_rmse,
    vendi,
    within_groups,
)


def signs(count: int = 6) -> torch.Tensor:
    """(count, 3, 24, 48): one bright bar on a mid-grey ground, all alike."""
    media = torch.full((count, 3, 24, 48), 0.4)
    media[:, :, 8:14, 18:30] = 0.9
    return media


def brighter(media: torch.Tensor) -> torch.Tensor:
    return media + torch.linspace(-0.1, 0.1, len(media))[:, None, None, None]


def moved(media: torch.Tensor) -> torch.Tensor:
    return torch.stack([one.roll(2 * i - 5, dims=-1) for i, one in enumerate(media)])


def reshaped(media: torch.Tensor) -> torch.Tensor:
    changed = media.clone()
    for i, one in enumerate(changed):
        one[:, 8:14, 18:30] = 0.4
        one[:, 8 + i : 14 - i + i, 18:30] = 0.9
    return changed


def tinted(media: torch.Tensor) -> torch.Tensor:
    tint = torch.linspace(-0.1, 0.1, len(media))
    weights = torch.tensor([1 / 0.299, 0.0, -1 / 0.114]) * 0.05  # luminance unchanged
    return media + tint[:, None, None, None] * weights[None, :, None, None]


ONE_GROUP = torch.zeros(6, dtype=torch.long)


def test_samples_that_are_all_alike_have_no_diversity_in_any_part() -> None:
    diversity = within_groups(signs(), ONE_GROUP)
    torch.testing.assert_close(diversity.total, 0.0)
    for value in diversity.parts.values():
        torch.testing.assert_close(value, 0.0, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "change, part", [(brighter, "brightness"), (moved, "position"), (reshaped, "shape"), (tinted, "colour")]
)
def test_a_change_of_one_property_raises_its_part(change, part) -> None:
    parts = within_groups(change(signs()), ONE_GROUP).parts
    assert parts[part] > 0.01


@pytest.mark.parametrize("change, untouched", [(brighter, "shape"), (moved, "shape"), (brighter, "position")])
def test_a_change_of_one_property_leaves_others_alone(change, untouched) -> None:
    assert within_groups(change(signs()), ONE_GROUP).parts[untouched] < 1e-6


def test_differences_between_prompts_do_not_count() -> None:
    media = torch.cat([signs(2), signs(2) * 0.5])
    torch.testing.assert_close(within_groups(media, torch.tensor([0, 0, 1, 1])).total, 0.0)


def test_only_the_kept_samples_are_compared() -> None:
    media = signs(4)
    media[3] = 0.0
    groups = torch.zeros(4, dtype=torch.long)
    assert within_groups(media, groups).total > 0.1
    kept = within_groups(media, groups, keep=torch.tensor([True, True, True, False]))
    torch.testing.assert_close(kept.total, 0.0)


def test_a_group_of_one_cannot_be_measured_and_says_so() -> None:
    diversity = within_groups(signs(2), torch.tensor([0, 1]))
    assert diversity.groups == 0 and isnan(diversity.total) and all(map(isnan, diversity.parts.values()))
    assert comparison(diversity, diversity)["before"] is None


def test_video_is_measured_like_its_frames() -> None:
    image = brighter(signs())
    still = image[:, None].expand(-1, 3, -1, -1, -1)
    for name, part in PARTS.items():
        torch.testing.assert_close(part(still.double()), part(image.double()), msg=name, atol=1e-3, rtol=1e-2)


def test_pairwise_rmse_is_the_literal_mean_over_pairs(rng) -> None:
    samples = torch.rand((5, 3, 4, 6), generator=rng, dtype=torch.float64)
    pairs = [(samples[i] - samples[j]).pow(2).mean().sqrt() for i in range(5) for j in range(i)]
    torch.testing.assert_close(pairwise_rmse(samples), float(torch.stack(pairs).mean()))


def test_vendi_and_effective_rank_count_distinct_directions() -> None:
    basis = torch.eye(4)
    torch.testing.assert_close(vendi(basis), 4.0)
    torch.testing.assert_close(vendi(basis[[0, 0, 0, 0]]), 1.0)
    torch.testing.assert_close(vendi(basis[[0, 0, 1, 1]]), 2.0)
    torch.testing.assert_close(effective_rank(torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]])), 2.0)
    torch.testing.assert_close(effective_rank(torch.ones(3, 5)), 0.0)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="groups \\(B,\\)"):
        within_groups(signs(), torch.zeros(5, dtype=torch.long))
