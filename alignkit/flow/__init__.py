"""The mathematics of paths, stochastic steps, plans and guidance. Knows torch only."""
