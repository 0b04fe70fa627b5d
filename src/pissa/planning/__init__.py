"""Before a run: what it will take, without its weights, and rows as the model will see them."""

from pissa.planning.plan import Cost, Plan, plan

__all__ = ["Cost", "Plan", "plan"]
