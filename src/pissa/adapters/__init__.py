"""Splits on a live model: attach, save, load."""

from pissa.adapters.attach import attach
from pissa.adapters.state import load, restart, save

__all__ = ["attach", "load", "restart", "save"]
