"""Upcycling offline: what is exact, and how much memory a conversion takes."""
