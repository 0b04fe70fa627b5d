"""`pissa demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

from pissa.cli import options, show


def demo(
    out: Annotated[Path, Option(help="The folder to write.")] = Path("pissa-demo"),
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Run the main job on a small model that comes along."""
    from pissa.demo.run import demo as run_demo

    result = run_demo(out, force=force, say=show.say)
    if as_json:
        show.print_json(result)
        return
    rows = [
        [row["method"], row["trainable"], row["start_loss"], row["end_loss"], row["seconds"]]
        for row in result["rows"]
    ]
    show.print_table(["method", "trainable", "loss before", "loss after", "seconds"], rows)
    proof = result["proof"]
    print(
        f"stock peft, original model, plain LoRA of rank {proof['rank']}: logits differ by {proof['difference']:.1e} "
        f"from the trained model's, which training moved by {proof['moved']:.2f}"
    )
    show.say(f"curves: {out / 'loss.png'}")
    show.say_next(
        f"pissa inspect {out / 'plain-lora'}",
        "pissa train CONFIG.yaml, with your own model and data",
    )
