"""Advantages and losses: pure functions on tensors. Knows torch and `flow`."""
