"""Any diffusers pipeline as a policy."""

from alignkit.policy.adapters import Full, LoRA
from alignkit.policy.conditioning import Conditioning
from alignkit.policy.pipeline import Policy

__all__ = ["Conditioning", "Full", "LoRA", "Policy"]
