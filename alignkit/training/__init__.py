"""Training: one loop, thin trainers, runs that survive."""
