"""Transforms of rewards and advantages between a reward model and a loss. NaN marks what was not computed and stays.

Rewards become rewards (`log_sigmoid`, `quantile_stretch`, `gated`, `hybrid`), advantages become advantages
(`diversity_shaping`), uncertainty becomes a weight (`uncertainty_weighted`, `proxy_uncertainty`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from alignkit.errors import AlignkitError, RecipeError
from alignkit.objectives.groups import checked, like, members


def log_sigmoid(rewards: Tensor, reference: Tensor, scale: float = 1.0) -> Tensor:
    """(B,) `log sigmoid((r - reference) / scale)`, at most 0 (2402.00742, "Transforming and Combining Rewards").

    It falls linearly below the reference and saturates above it, so that bad samples decide and there is little to
    gain from pushing a good reward further. If each reward is a Bradley-Terry logit, the sum over rewards is the log
    probability that the sample beats the reference on *all* of them: a logical and.

    Args:
        rewards: (B,) of one reward.
        reference: (B,) what counts as good enough for each sample's prompt: a high quantile (the paper: 0.85) of the
            reference policy's rewards on that prompt.
        scale: reward units per logit. The transform means what it says only in logit units.
    """
    if not scale > 0:
        raise RecipeError(f"scale={scale} of a reward must be above 0: it is the difference that counts as one logit")
    return F.logsigmoid((rewards - reference) / scale)


def group_quantile(rewards: Tensor, groups: Tensor, quantile: float) -> Tensor:
    """(B,) the quantile (linear interpolation) of each sample's group over its scored samples, NaN if it has none."""
    if not 0 <= quantile <= 1:
        raise RecipeError(f"quantile={quantile} must lie in [0, 1]; the paper's is 0.85")
    checked(rewards, groups)
    found = torch.full(rewards.shape, torch.nan, dtype=torch.float64)
    for rows in members(groups):
        found[rows] = torch.nanquantile(rewards.detach().to("cpu", torch.float64)[rows], quantile)
    return like(rewards, found)


def quantile_stretch(rewards: Tensor, groups: Tensor) -> Tensor:
    """(B,) each sample's rank in its group, spread evenly over [0, 1]; equal rewards share their mean rank.

    However much the rewards of a group cluster, their transforms do not; any increasing function of the reward gives
    the same. The price: differences that are noise are stretched as well.
    """
    values, valid, _, _ = checked(rewards, groups)
    found = torch.full(rewards.shape, torch.nan, dtype=torch.float64)
    for rows in members(groups):
        own = rows[valid[rows]]
        below = (values[own][None, :] < values[own][:, None]).sum(dim=1)
        equal = (values[own][None, :] == values[own][:, None]).sum(dim=1)
        rank = below.double() + (equal - 1) / 2  # 0 .. n - 1
        found[own] = rank / (len(own) - 1) if len(own) > 1 else torch.full_like(rank, 0.5)
    return like(rewards, found)


def gated(rewards: Tensor, gate: Tensor, threshold: float, below: float = 0.0) -> Tensor:
    """(B,) the reward where `gate >= threshold`, `below` elsewhere; NaN where either is.

    `below` must be under every reward that can pass, or failing the gate would pay.
    """
    closed = torch.where(gate >= threshold, rewards, below)
    return closed.masked_fill(rewards.isnan() | gate.isnan(), torch.nan)


def hybrid(model: Tensor, rule: Tensor, model_confidence: Tensor | float, rule_confidence: Tensor | float) -> Tensor:
    """(B,) mean of a model's and a rule's reward, weighted by how far each is to be trusted.

    A reward that is NaN (the rule does not apply, the model gave no answer) leaves the other alone; NaN where no
    reward with a confidence above 0 is left. Both need one scale.

    Args:
        model_confidence, rule_confidence: (B,) or one number, at least 0.
    """
    total, trust = torch.zeros_like(model), torch.zeros_like(model)
    for reward, confidence in ((model, model_confidence), (rule, rule_confidence)):
        given = torch.as_tensor(confidence, dtype=model.dtype, device=model.device).expand_as(model)
        if bool((given < 0).any()):
            raise AlignkitError(f"a confidence is {float(given.min())}; expected at least 0")
        share = torch.where(reward.isnan() | given.isnan(), 0.0, given)
        total = total + share * torch.where(reward.isnan(), 0.0, reward)
        trust = trust + share
    return torch.where(trust > 0, total / torch.where(trust > 0, trust, 1.0), torch.nan)


def uncertainty_weighted(loss: Tensor, uncertainty: Tensor) -> Tensor:
    """`L exp(-U) + U` (Ctrl-U, 2410.11236), any one shape.

    An uncertain reward counts less; the second term keeps U from growing without end: at U = log L the sum is least.
    """
    return loss * (-uncertainty).exp() + uncertainty


def proxy_uncertainty(proxy: Tensor, auxiliaries: Sequence[Tensor]) -> Tensor:
    """(B,) how much higher a sample ranks by the trained reward than by others (GARDO, 2512.24138).

    `U_i = w(proxy)_i - mean_k w(auxiliary_k)_i`, in [-1, 1], with w the share of the batch that a sample beats, ties
    counting half. What only the trained reward likes is what it may be wrong about.
    """
    if not auxiliaries:
        raise RecipeError("uncertainty needs at least one auxiliary reward beside the trained one")
    others = torch.stack([_batch_win_rate(auxiliary) for auxiliary in auxiliaries])
    return like(proxy, _batch_win_rate(proxy) - others.mean(dim=0))


def _batch_win_rate(rewards: Tensor) -> Tensor:
    return quantile_stretch(rewards.detach().double(), torch.zeros(rewards.shape, dtype=torch.int64)).cpu()


def nearest_distance(features: Tensor, groups: Tensor) -> Tensor:
    """(B,) cosine distance, in [0, 2], from each sample's features (B, D) to the nearest of its group.

    1 where a group has one sample: nothing is near.
    """
    if features.ndim != 2 or features.shape[:1] != groups.shape:
        raise AlignkitError(f"features {tuple(features.shape)} must be (B, D) for groups {tuple(groups.shape)}")
    unit = F.normalize(features.detach().to("cpu", torch.float64), dim=1)
    found = torch.ones(len(groups), dtype=torch.float64)
    for rows in members(groups):
        if len(rows) > 1:
            cosine = unit[rows] @ unit[rows].T
            cosine.fill_diagonal_(-torch.inf)
            found[rows] = (1 - cosine.amax(dim=1)).clamp(min=0.0)
    return found


def diversity_shaping(advantages: Tensor, features: Tensor, groups: Tensor) -> Tensor:
    """(B,) `A_i d_i` where `A_i > 0`, else `A_i` (GARDO, 2512.24138).

    d is `nearest_distance`: among samples that are good, those unlike the others of their group count more, and a
    copy of another counts nothing. Multiplied and only above 0, so that difference alone is never rewarded.

    Args:
        advantages: (B,), 0 = no signal.
        features: (B, D) of the media.
    """
    distance = nearest_distance(features, groups).to(advantages)
    return torch.where(advantages > 0, advantages * distance, advantages)
