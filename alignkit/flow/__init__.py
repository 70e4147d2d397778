"""The mathematics of paths, stochastic steps, plans and guidance. Knows torch and nothing else of alignkit but errors."""
