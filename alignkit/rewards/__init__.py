"""Rewards: what they are (`base`), how they are found (`loading`), how they are combined (`combine`)."""

from alignkit.rewards.base import BrokenContract, Evaluation, Reward, RewardFailure, evaluate
from alignkit.rewards.card import Card
from alignkit.rewards.combine import Weighted, in_micro_batches
from alignkit.rewards.functions import as_reward
from alignkit.rewards.loading import describe, load, load_file, status
from alignkit.rewards.per_frame import PerFrameMean
from alignkit.rewards.probe import Probe, probe
from alignkit.rewards.table import TABLE
from alignkit.rewards.weights import Files, MissingWeights

__all__ = [
    "TABLE",
    "load",
    "load_file",
    "status",
    "describe",
    "Reward",
    "RewardFailure",
    "BrokenContract",
    "Card",
    "Files",
    "MissingWeights",
    "as_reward",
    "evaluate",
    "Evaluation",
    "probe",
    "Probe",
    "Weighted",
    "PerFrameMean",
    "in_micro_batches",
]
