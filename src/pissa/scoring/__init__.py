"""Answers and what they are worth: pure functions of text, and programs that run behind walls. Knows no model."""
