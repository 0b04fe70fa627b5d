"""`pissa methods`."""

from __future__ import annotations

from pissa.cli import options, show


def methods(as_json: options.Json = False) -> None:
    """List the methods, their papers, and when to take each."""
    from pissa import registry

    known = registry.methods().values()
    if as_json:
        keys = ("name", "title", "paper", "trains", "verdict", "zero_start")
        show.print_json([{key: getattr(method, key) for key in keys} for method in known])
        return
    rows = [[method.name, f"arXiv {method.paper}", method.trains, method.verdict] for method in known]
    show.print_table(["method", "paper", "trains", "verdict"], rows)
