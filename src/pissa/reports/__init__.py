"""Pictures and tables made from what runs leave on disk."""

from pissa.reports.curves import plot_losses
from pissa.reports.quantisation import plot_errors

__all__ = ["plot_errors", "plot_losses"]
