"""Pictures and tables made from what runs leave on disk."""

from pissa.reports.curves import plot_losses

__all__ = ["plot_losses"]
