"""Pictures, tables and pages made from what runs leave on disk."""

from pissa.reports.card import write_card
from pissa.reports.commands import next_commands, served_rank
from pissa.reports.curves import plot_losses
from pissa.reports.quantisation import plot_errors
from pissa.reports.report import write_report
from pissa.reports.run_record import read_run

__all__ = [
    "next_commands",
    "plot_errors",
    "plot_losses",
    "read_run",
    "served_rank",
    "write_card",
    "write_report",
]
