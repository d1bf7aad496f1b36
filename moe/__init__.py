"""Mixture-of-Experts training with five-dimensional parallelism: yet to come, empty so far."""

__all__: list[str] = []
