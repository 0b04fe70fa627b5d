"""`pissa methods`."""

from __future__ import annotations

from pissa.cli import options, show


def methods(as_json: options.Json = False) -> None:
    """List the methods, their papers, and when to take each."""
    from pissa import registry
    from pissa.quant import NAMES as QUANTISERS

    known = registry.methods().values()
    if as_json:
        keys = ("name", "title", "paper", "trains", "verdict", "zero_start", "alternates", "needs")
        show.print_json([{key: getattr(method, key) for key in keys} for method in known])
        return
    rows = [[method.name, f"arXiv {method.paper}", method.trains, method.verdict] for method in known]
    show.print_table(["method", "paper", "trains", "verdict"], rows)
    presets = ", ".join(f"{name} is {method} with {quant}" for name, (method, quant) in registry.PRESETS.items())
    print(f"In few bits: {presets}; any other with --quant {', '.join(QUANTISERS)}.")
