"""Layouts, process groups, collectives with gradients, and the reduction of gradients."""

__all__: list[str] = []
