"""`pissa methods`."""

from __future__ import annotations

from pissa.cli import options, show


def methods(as_json: options.Json = False) -> None:
    """List the methods, their papers, and when to take each."""
    from pissa import registry
    from pissa.quant import NAMES as QUANTISERS

    known = registry.methods().values()
    if as_json:
        keys = ["name", "title", "paper", "trains", "needs", "exports", "options", "verdict"]
        keys += ["parts", "zero_start", "alternates", "full_rank"]
        show.print_json([{key: getattr(method, key) for key in keys} for method in known])
        return
    rows = [[one.name, one.trains, one.needs, one.exports, one.verdict] for one in known]
    show.print_table(["method", "trains", "needs", "exports", "verdict"], rows)
    own = [
        f"{one.name}: {', '.join(f'{key}={value}' for key, value in one.options.items())}"
        for one in known
        if one.options
    ]
    print(f"Own settings (--option NAME=VALUE): {'; '.join(own)}.")
    presets = ", ".join(
        f"{name} is {method} with {quant}" for name, (method, quant) in registry.PRESETS.items()
    )
    print(f"In few bits: {presets}; others with --quant {', '.join(QUANTISERS)}.")
    print(
        "NAME-control is the start of NAME along random directions of the same norms. Papers: --json, docs/methods."
    )
