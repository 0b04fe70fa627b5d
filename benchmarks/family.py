"""What the starts of the family claim and one pass over a model can show: a truncation curve and
first steps.

python benchmarks/family.py --model FOLDER --calibration train.jsonl --held-out
test.jsonl,wiki.test.txt

Texts are cut into blocks of --length tokens; a .jsonl row is its fields, an empty line between
them. The first --blocks blocks of --calibration are what the methods see. Nothing is trained.

"truncated": perplexity on the first --blocks blocks of each held-out text when every linear layer
but the head loses a share of its components, the least ones: singular values of W ("plain"), of W C
(CorDA), or of W C^(1/2), which is the least error on the layer's outputs; C is the covariance of
the calibration inputs.

"first step": cosine with the full gradient of the change that one step of SGD makes through a
start, -s^2 (L L^T G + G R^T R), by layer; "LoRA-Pro" is that of its step, which is |g~| / |G|.
"calibration" takes G on the rows that methods have seen, "held out" on the first held-out text.
"best 2r" is the bound for any rank-r factors; a control is the same start along random directions.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from pissa.linalg.tangent import Tangent
from pissa.method import OBSERVED
from pissa.observe import Observations, observe
from pissa.registry import get

CURVES: dict[str, tuple[str, dict[str, str]]] = {
    "plain": ("milora", {}),
    "W C": ("corda", {"mode": "kpm"}),
    "W C^1/2": ("corda", {"mode": "kpm", "weighting": "root"}),
}
SHARES = (0.0, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)
STARTS: dict[str, tuple[str, dict[str, str]]] = {
    "lora": ("lora", {}),
    "milora": ("milora", {}),
    "olora": ("olora", {}),
    "pissa": ("pissa", {}),
    "pissa control": ("pissa-control", {}),
    "corda kpm": ("corda", {"mode": "kpm"}),
    "corda ipm": ("corda", {"mode": "ipm"}),
    "eva": ("eva", {}),
    "lora_ga": ("lora_ga", {}),
    "lora_ga control": ("lora_ga-control", {}),
}
Weights = dict[str, torch.nn.Parameter]


def blocks(file: Path, tokenizer: Any, count: int, length: int) -> Tensor:
    """Token ids [count, length]."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".jsonl":
        text = "\n\n".join(
            "\n\n".join(map(str, json.loads(line).values())) for line in text.splitlines()
        )
    ids = tokenizer(text[: 20 * count * length], verbose=False)["input_ids"][: count * length]
    if len(ids) < count * length:
        raise SystemExit(f"{file} has {len(ids)} tokens of {count} x {length}: lower --blocks")
    return torch.tensor(ids).view(count, length)


def batches(ids: Tensor, size: int = 8) -> Iterator[dict[str, Tensor]]:
    for part in ids.split(size):
        yield {"input_ids": part, "labels": part}


@torch.no_grad()
def perplexity(model: Any, ids: Tensor) -> float:
    losses = [model(**batch).loss for batch in batches(ids)]
    return math.exp(torch.stack(losses).double().mean())


def seen_of(name: str, observations: Observations, method: str) -> Any:
    needs = get(method).needs
    return observations.get(needs, name) if needs in OBSERVED else None


def truncated(
    model: Any, weights: Weights, observations: Observations, texts: dict[str, Tensor]
) -> list[Any]:
    rows = []
    for curve, (method, options) in CURVES.items():
        parts = {}
        for name, weight in weights.items():
            seen = seen_of(name, observations, method)
            parts[name] = get(method).split(
                weight.data, min(weight.shape), observed=seen, options=options
            )
        kept = {name: weight.data for name, weight in weights.items()}
        for share in SHARES:
            for name, split in parts.items():
                rank = split.rank - round(share * split.rank)
                weights[name].data = (
                    kept[name] if share == 0 else split.left[:, :rank] @ split.right[:rank]
                )
            rows.append(
                {
                    "curve": curve,
                    "share": share,
                    **{text: perplexity(model, ids) for text, ids in texts.items()},
                }
            )
        for name, weight in weights.items():
            weight.data = kept[name]
    return rows


def cosines(left: Tensor, right: Tensor, G: Tensor) -> tuple[float, float]:
    """Of SGD's and of LoRA-Pro's first change of the weight."""
    tangent = Tangent(left, right)
    gradients = tangent.gradients(G)
    changes = tangent.change(*gradients), tangent.change(*tangent.updates(*gradients))
    sgd, pro = (
        float(F.cosine_similarity(change.flatten(), G.flatten(), dim=0)) for change in changes
    )
    return sgd, pro


def first_steps(
    weights: Weights, observations: Observations, others: Observations, rank: int
) -> list[Any]:
    rows = []
    for name, weight in weights.items():
        gradients = {
            "calibration": observations.get("gradient", name),
            "held out": others.get("gradient", name),
        }
        for start, (method, options) in STARTS.items():
            seen = seen_of(name, observations, method)
            split = get(method).split(weight.data, rank, name=name, observed=seen, options=options)
            for rows_of, G in gradients.items():
                sgd, pro = cosines(split.left, split.right, G)
                rows.append(
                    {
                        "layer": name,
                        "start": start,
                        "gradient": rows_of,
                        "SGD": sgd,
                        "LoRA-Pro": pro,
                    }
                )
        for rows_of, G in gradients.items():
            energy = torch.linalg.svdvals(G.double()).square()
            best = float((energy[: 2 * rank].sum() / energy.sum()).sqrt())
            rows.append(
                {
                    "layer": name,
                    "start": "best 2r",
                    "gradient": rows_of,
                    "SGD": best,
                    "LoRA-Pro": best,
                }
            )
    return rows


def show_truncated(rows: list[Any], texts: list[str]) -> None:
    for text in texts:
        print(
            f"\nperplexity on {text} without the least share\n{'':10}",
            *(f"{share:>9.4g}" for share in SHARES),
        )
        for curve in CURVES:
            print(f"{curve:10}", *(f"{row[text]:9.4g}" for row in rows if row["curve"] == curve))


def show_first_steps(rows: list[Any]) -> None:
    columns = [
        (which, step) for which in ("calibration", "held out") for step in ("SGD", "LoRA-Pro")
    ]
    print("\ncosine of the first step with the gradient: mean (least) over layers")
    print(f"{'':16}", *(f"{f'{which}, {step}':>22}" for which, step in columns))
    for start in (*STARTS, "best 2r"):
        cells = []
        for which, step in columns:
            values = [
                row[step] for row in rows if (row["start"], row["gradient"]) == (start, which)
            ]
            cells.append(f"{f'{sum(values) / len(values):.3f} ({min(values):.3f})':>22}")
        print(f"{start:16}", *cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True, type=Path)
    parser.add_argument("--held-out", required=True, help="files, comma-separated")
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16, help="of the first steps")
    options = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        options.model, dtype=torch.float32
    ).eval()
    shape = options.blocks, options.length
    held_out = [Path(file) for file in options.held_out.split(",")]
    texts = {
        f"{file.parent.name}/{file.name}": blocks(file, tokenizer, *shape) for file in held_out
    }
    calibration = blocks(options.calibration, tokenizer, *shape)
    needs = ("covariance", "components", "gradient")
    observations = observe(model, batches(calibration), needs, components=4 * options.rank)
    others = observe(model, batches(next(iter(texts.values()))), "gradient")
    parameters = dict(model.named_parameters())
    prefix = model.base_model_prefix
    weights = {
        name: parameters.get(name, parameters.get(f"{prefix}.{name}")) for name in observations.base
    }
    curve = truncated(model, weights, observations, texts)
    show_truncated(curve, list(texts))
    steps = first_steps(weights, observations, others, options.rank)
    show_first_steps(steps)
    settings = {key: str(value) for key, value in vars(options).items()}
    print(json.dumps({"settings": settings, "truncated": curve, "first step": steps}))


if __name__ == "__main__":
    main()
