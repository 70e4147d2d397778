"""How far one step of the policy is from the reference's, in three named forms."""

from __future__ import annotations

from torch import Tensor

from alignkit.flow.transition import KLForm, Reduce, Transition


def kl_divergence(transition: Transition, reference: Transition, reduce: Reduce, form: KLForm) -> Tensor:
    """(B,) divergence of `transition` from `reference`; the formulas are `Transition.kl`'s.

    Compute it with gradient, and the reference without. The form has no default, because a published
    coefficient
    belongs to one:

    * `gaussian`: the true KL of the step.
    * `no_dt`: gaussian times |dt|. Flow-GRPO's coefficients (0.04 for GenEval and OCR, 0.01 for PickScore)
    belong
      here; under `gaussian` multiply them by |dt|.
    * `velocity`: the squared velocity difference, weighted the same at every noise level.
    """
    return transition.kl(reference, reduce, form)
