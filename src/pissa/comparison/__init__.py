"""Many runs side by side: every method at every learning rate and seed, read together and told honestly."""

from pissa.comparison.compare import compare, report

__all__ = ["compare", "report"]
