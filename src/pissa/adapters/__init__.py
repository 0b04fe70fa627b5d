"""Splits on a live model: attach, save, load."""

from pissa.adapters.attach import attach, is_residual, recipe_of
from pissa.adapters.state import load, restart, save

__all__ = ["attach", "is_residual", "load", "recipe_of", "restart", "save"]
