"""The losses that a reward-model recipe names: from a scorer and a batch to a scalar and what to watch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from alignkit.errors import RecipeError
from alignkit.objectives import preference
from alignkit.training.examples import ChoiceBatch, LabelBatch, PairBatch, ViewBatch, score
from alignkit.training.self_distillation import SelfDistilled

Logs = dict[str, float]
Loss = Callable[[Any, Any, torch.Generator], tuple[Tensor, Logs]]
"""`(model, batch, rng) -> (scalar loss, {name: number})`; everything random comes from `rng`."""


def bradley_terry(model: nn.Module, batch: PairBatch, rng: torch.Generator) -> tuple[Tensor, Logs]:
    """-log sigmoid of the winner's lead. Ties are refused: half a win is "softmax_preference"."""
    _require(batch, PairBatch, "bradley_terry")
    _winners_win(batch, 'loss="bradley_terry"')
    if batch.ties is not None and bool(batch.ties.any()):
        raise RecipeError('loss="bradley_terry" got ties; give loss="softmax_preference", where a tie is half and half')
    ahead = _scores_of_pairs(model, batch)
    loss = preference.bradley_terry(ahead[0], ahead[1]).mean()
    return loss, {"accuracy": _share(ahead[0] > ahead[1]), "margin": float((ahead[0] - ahead[1]).detach().mean())}


def bradley_terry_dimensions(model: nn.Module, batch: PairBatch, rng: torch.Generator) -> tuple[Tensor, Logs]:
    """Sum over dimensions of -log sigmoid of the better side's lead, mean over pairs; a dimension of which a pair says
    nothing adds nothing (Flow-NRG, VideoAlign 2501.13918). The scorer gives (B, D)."""
    _require(batch, PairBatch, "bradley_terry_dimensions")
    winners, losers = _scores_of_pairs(model, batch)
    if batch.preferred is None or batch.preferred.shape != winners.shape:
        given = None if batch.preferred is None else tuple(batch.preferred.shape)
        raise RecipeError(
            f'loss="bradley_terry_dimensions" got scores {tuple(winners.shape)} and preferred={given}; both must be '
            "(pairs, dimensions)"
        )
    counts = batch.preferred != 0
    swapped = batch.preferred < 0
    ahead, behind = torch.where(swapped, losers, winners), torch.where(swapped, winners, losers)
    loss = (preference.bradley_terry(ahead, behind) * counts).sum(dim=1).mean()
    right = (ahead > behind).detach()
    told = {f"accuracy_{i}": _share(right[:, i][counts[:, i]]) for i in range(counts.shape[1]) if counts[:, i].any()}
    return loss, {"accuracy": _share(right[counts]), **told}


def bradley_terry_ties(model: nn.Module, batch: PairBatch, rng: torch.Generator) -> tuple[Tensor, Logs]:
    """Bradley-Terry with ties, k = 5, mean over the pairs and dimensions that have a valid label (VideoReward,
    2501.13918), 0 where none has. The scorer gives (B,) or (B, D)."""
    _require(batch, PairBatch, "bradley_terry_ties")
    winners, losers = _scores_of_pairs(model, batch)
    lead = winners - losers
    lead, labels = rearrange(lead, "b -> b 1") if lead.ndim == 1 else lead, batch.labels
    if labels.shape != lead.shape:
        raise RecipeError(
            f'loss="bradley_terry_ties" got scores of {tuple(lead.shape)} and labels of {tuple(labels.shape)}; both '
            "must be (pairs, dimensions): give PairBatch.of_labels, or preferred and ties of that shape"
        )
    valid = labels != preference.INVALID
    loss = preference.bradley_terry_ties(lead, labels).sum() / valid.sum().clamp(min=1)
    decided, right = labels.abs() == 1, (lead * labels > 0).detach()
    return loss, {f"accuracy_{i}": _share(right[:, i][d]) for i, d in enumerate(decided.unbind(dim=1)) if d.any()}


def softmax_preference(model: nn.Module, batch: PairBatch | ChoiceBatch, rng: torch.Generator) -> tuple[Tensor, Logs]:
    """Cross-entropy over the images of one prompt; scores are logits, so the scorer applies its own scale."""
    _require(batch, (PairBatch, ChoiceBatch), "softmax_preference")
    if isinstance(batch, PairBatch):
        _winners_win(batch, 'loss="softmax_preference"')
        logits = rearrange(list(_scores_of_pairs(model, batch)), "side b -> b side")
        targets = torch.zeros_like(logits)
        targets[:, 0] = 1.0
        if batch.ties is not None:
            targets[batch.ties] = 0.5
    else:
        prompts = [prompt for prompt in batch.prompts for _ in range(batch.media.shape[1])]
        sigma = None if batch.sigma is None else repeat(batch.sigma, "b -> (b g)", g=batch.media.shape[1])
        flat = score(model, rearrange(batch.media, "b g ... -> (b g) ..."), prompts, sigma)
        logits, targets = rearrange(flat, "(b g) -> b g", b=len(batch.prompts)), batch.targets
    decided = targets.max(dim=1).values > targets.mean(dim=1)  # a tie of all has no right answer
    right = logits.argmax(dim=1)[decided] == targets.argmax(dim=1)[decided]
    return preference.softmax_preference(logits, targets).mean(), {"accuracy": _share(right)}


def yes_no(model: nn.Module, batch: LabelBatch, rng: torch.Generator) -> tuple[Tensor, Logs]:
    """Binary cross-entropy of the scores as logits."""
    _require(batch, LabelBatch, "yes_no")
    logits = score(model, batch.media, batch.prompts, batch.sigma)
    loss = preference.yes_no(logits, batch.labels).mean()
    return loss, {"accuracy": _share((logits > 0) == (batch.labels > 0.5))}


def self_distillation(model: nn.Module, batch: ViewBatch, rng: torch.Generator) -> tuple[Tensor, Logs]:
    """DINO on the views of a batch."""
    _require(batch, ViewBatch, "self_distillation")
    if not isinstance(model, SelfDistilled):
        raise RecipeError(
            f'loss="self_distillation" trains a student with its teacher, a SelfDistilled; got {type(model).__name__}'
        )
    with torch.no_grad():
        taught = torch.stack([model.teacher(view) for view in batch.views[: batch.teacher_views]])
        seen = model.seen(taught)
    learnt = torch.stack([model.student(view) for view in batch.views])
    loss = preference.self_distillation(learnt, seen, model.student_temperature)
    # Collapse shows in one of two ways: one class for everything, or the same even spread for every picture.
    spread = seen.mean(dim=(0, 1))
    return loss, {"class_entropy": _entropy(spread), "picture_entropy": float(_entropies(seen).mean())}


LOSSES: Mapping[str, Loss] = {
    "bradley_terry": bradley_terry,
    "bradley_terry_dimensions": bradley_terry_dimensions,
    "bradley_terry_ties": bradley_terry_ties,
    "softmax_preference": softmax_preference,
    "yes_no": yes_no,
    "self_distillation": self_distillation,
}


def pair_accuracy(model: nn.Module, pairs: PairBatch) -> float:
    """Share of pairs whose winner scores strictly higher; a model that scores all alike gets 0. Ties are left out."""
    _winners_win(pairs, "pair_accuracy")
    winners, losers = _scores_of_pairs(model, pairs)
    right = winners > losers
    return _share(right if pairs.ties is None else right[~pairs.ties])


def _scores_of_pairs(model: nn.Module, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """Both sides in one call, so that both see the same batch composition."""
    both = torch.cat([batch.winners, batch.losers])
    sigma = None if batch.sigma is None else torch.cat([batch.sigma, batch.sigma])
    winners, losers = score(model, both, [*batch.prompts, *batch.prompts], sigma).chunk(2)
    return winners, losers


def _winners_win(batch: PairBatch, what: str) -> None:
    if batch.preferred is not None:
        raise RecipeError(
            f"{what} takes the first of a pair for the winner, and these pairs are judged in "
            f'{batch.preferred.shape[-1]} dimensions by `preferred`; use "bradley_terry_dimensions" or '
            '"bradley_terry_ties"'
        )


def _require(batch: Any, kinds: type | tuple[type, ...], loss: str) -> None:
    if not isinstance(batch, kinds):
        names = kinds.__name__ if isinstance(kinds, type) else " or ".join(k.__name__ for k in kinds)
        raise RecipeError(f"loss={loss!r} learns from {names}, and the data gave {type(batch).__name__}")


def _share(right: Tensor) -> float:
    return float(right.float().mean())


def _entropies(probabilities: Tensor) -> Tensor:
    return -torch.xlogy(probabilities, probabilities).sum(dim=-1)


def _entropy(probabilities: Tensor) -> float:
    return float(_entropies(probabilities))
