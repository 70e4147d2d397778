"""Advantages and losses: pure functions on tensors. Knows torch only."""
