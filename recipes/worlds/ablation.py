"""What is refused elsewhere, to show why: a head that was trained on clean latents guides as if it knew noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from alignkit.rewards.noise_aware import NoiseAwareReward


@dataclass(frozen=True, eq=False)
class CleanHead(NoiseAwareReward):
    """`noise_aware` with a head of `alignkit run sign_noisy:clean` or `shapes_noisy:clean` (the ablation of VideoAlign
    2501.13918, Table 5)."""

    noise_aware: ClassVar[bool] = True  # type: ignore[assignment]
