"""Splits on a live model (attach, runs) and the folders that hold them (plain, state)."""
