"""DINO (2104.14294): a student learns to see in one view of a picture what its own average sees in another."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from alignkit.objectives.preference import balanced, centred, moved_centre


class SelfDistilled(nn.Module):
    """A student and the teacher that follows it, in one scorer. A recipe's class adds `save`.

    The teacher sees views as the student does (evaluation mode aside), gets no gradient, and moves after each step. It
    is part of the state, so a resumed run has it back.

    Args:
        network: (B, 3, h, w) -> (B, K) logits, of any view size.
        classes: K.
        momentum: share of the teacher that stays at each step.
        student_temperature, teacher_temperature: the teacher's is the lower one (sharpening).
        balance: what keeps pictures apart: "centre", a running mean of the teacher's logits (DINO), or "sinkhorn",
            equal shares of each batch (DINOv2), which small batches need.
        centre_momentum: share of the old centre that stays.
    """

    centre: Tensor

    def __init__(
        self,
        network: nn.Module,
        classes: int,
        momentum: float = 0.99,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        balance: Literal["centre", "sinkhorn"] = "centre",
        centre_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.student = network
        self.teacher = copy.deepcopy(network).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(classes))
        self.momentum, self.balance, self.centre_momentum = momentum, balance, centre_momentum
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature

    def train(self, mode: bool = True) -> SelfDistilled:
        """The teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def seen(self, logits: Tensor) -> Tensor:
        """The teacher's probabilities (W, B, K) of its logits; moves the centre."""
        if self.balance == "sinkhorn":
            return balanced(logits, self.teacher_temperature)
        probabilities = centred(logits, self.centre, self.teacher_temperature)
        self.centre.copy_(moved_centre(self.centre, logits, self.centre_momentum))
        return probabilities

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """The teacher moves towards the student."""
        pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        for followed, own in pairs:
            followed.lerp_(own, 1 - self.momentum)
