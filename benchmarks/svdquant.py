"""Models in 4 bits, weights and activations, beside what each half of SVDQuant does alone, on text
it has not seen.

python benchmarks/svdquant.py [--model FOLDER] [--ranks 8,32] [--calibration FILE --key question]
[--held-out FILE]

Calibration and held-out text are different rows: by default GSM8K's training and test questions.
"calibration" and "held out" are each layer's relative output error, mean and worst, on the inputs
that the model in full precision feeds it. "perplexity" is of the whole model, all layers at once
(language models only), on the held-out rows. "bits" are what a weight takes, scales, smoothing and
branch in 16 bits included. At small layers a branch is dear, so "weights by 16" and the like spend
as many bits on finer groups of the weights, "both by 16" on those of the activations too (whose
scales are not stored, but cost time in every product).

    plain        codes alone                        branch       rank r, no smoothing
    smoothing    codes after the best smoothing     svdquant     both, one round
    nf4 W4A16    bitsandbytes, activations whole    iterated     both, at most --rounds
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from pissa.checkpoint.targets import find_targets
from pissa.linalg import relative_error
from pissa.linalg.int4 import quantise
from pissa.methods.svdquant import svdquant
from pissa.observe import Observations, observe
from pissa.quant import quantiser
from pissa.w4a4 import W4A4Linear

Layer = Callable[[Tensor], Tensor]
SHARED = Path(__file__).parents[2] / "shared"


class Rounded(nn.Module):
    """A weight, and how what meets it is rounded; for what is compared with."""

    def __init__(self, weight: Tensor, bias: Tensor | None, group: int | None, bits: float) -> None:
        super().__init__()
        self.weight, self.group, self.bits = weight, group, bits
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Of x [..., in] the output [..., out]."""
        rows = x.reshape(-1, x.shape[-1]).float()
        rows = rows if self.group is None else quantise(rows, self.group).dense()
        y = nn.functional.linear(
            rows, self.weight, None if self.bias is None else self.bias.float()
        )
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)


def plain(weight: Tensor, bias: Tensor | None, group: int, activations: int) -> Rounded:
    codes = quantise(weight, group)
    return Rounded(codes.dense(), bias, activations, 4 + 16 * codes.scales.numel() / weight.numel())


def nf4(weight: Tensor, bias: Tensor | None) -> Rounded:
    return Rounded(quantiser("nf4").quantise(weight, torch.float32).dense, bias, None, 4.5)


def w4a4(
    weight: Tensor, bias: Tensor | None, inputs: Tensor, rank: int, smoothing: bool, rounds: int
) -> W4A4Linear:
    how = {"scale": 1.0, "svd": "fast", "seed": 0, "name": "w", "inputs": inputs}
    split = svdquant(weight, min(rank, *weight.shape), smoothing=smoothing, rounds=rounds, **how)
    layer = W4A4Linear.from_split(split, bias)
    parts = [
        layer.codes,
        layer.scales,
        layer.left,
        layer.right,
        *([layer.smooth] if smoothing else []),
    ]
    layer.bits = 8 * sum(part.nbytes for part in parts) / weight.numel()
    return layer


def kinds(
    ranks: list[int], rounds: int
) -> dict[str, Callable[[Tensor, Tensor | None, Tensor], nn.Module]]:
    table: dict[str, Any] = {"plain": _plain(64, 64)}
    for group in (16, 8, 4):
        table |= {
            f"weights by {group}": _plain(group, 64),
            f"both by {group}": _plain(group, group),
        }
    table["smoothing"] = _ours(0, True, 1)
    for rank in ranks:
        table[f"branch r={rank}"] = _ours(rank, False, 1)
        table[f"svdquant r={rank}"] = _ours(rank, True, 1)
        table[f"iterated r={rank}"] = _ours(rank, True, rounds)
    table["nf4 W4A16"] = lambda weight, bias, inputs: nf4(weight, bias)
    return table


def _plain(group: int, activations: int) -> Any:
    return lambda weight, bias, inputs: plain(weight, bias, group, activations)


def _ours(rank: int, smoothing: bool, rounds: int) -> Any:
    return lambda weight, bias, inputs: w4a4(weight, bias, inputs, rank, smoothing, rounds)


def batches(
    tokenizer: Any, file: Path, key: str, rows: int, window: int
) -> list[dict[str, Tensor]]:
    """Rows of a JSON lines file, each by itself, cut to the window."""
    lines = file.read_text(encoding="utf-8").splitlines()[:rows]
    texts = [json.loads(line)[key] for line in lines]
    ids = (tokenizer(text, truncation=True, max_length=window)["input_ids"] for text in texts)
    return [{"input_ids": torch.tensor([row])} for row in ids if len(row) > 1]


@torch.no_grad()
def perplexity(model: nn.Module, rows: list[dict[str, Tensor]]) -> float:
    if not type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        return math.nan
    loss, count = 0.0, 0
    for row in rows:
        tokens = row["input_ids"].shape[1] - 1
        loss += float(model(**row, labels=row["input_ids"]).loss) * tokens
        count += tokens
    return math.exp(loss / count)


def seen(model: nn.Module, rows: list[dict[str, Tensor]], most: int) -> Observations:
    return observe(model, rows, "inputs", inputs=most)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=SHARED / "models" / "mixed-8m")
    parser.add_argument(
        "--calibration", type=Path, default=SHARED / "data" / "gsm8k" / "train.jsonl"
    )
    parser.add_argument("--held-out", type=Path, default=SHARED / "data" / "gsm8k" / "test.jsonl")
    parser.add_argument("--key", default="question")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument(
        "--inputs", type=int, default=256, help="rows kept of a layer, of either text"
    )
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--ranks", default="8,32")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", default="", help="kinds that begin so, for example svdquant,nf4")
    options = parser.parse_args()
    architecture = json.loads((options.model / "config.json").read_text())["architectures"][0]
    model = (
        getattr(transformers, architecture)
        .from_pretrained(options.model, dtype=torch.float32)
        .eval()
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    texts = [
        batches(tokenizer, file, options.key, options.rows, options.window)
        for file in (options.calibration, options.held_out)
    ]
    calibration, held_out = (seen(model, rows, options.inputs) for rows in texts)
    targets = find_targets(model)
    originals: dict[str, Any] = {
        target.module: model.get_submodule(target.module) for target in targets
    }
    print(
        f"{options.model.name}, {len(targets)} layers; full model: perplexity {perplexity(model, texts[1]):.3f}"
    )
    print(
        f"{'':18} {'bits':>6}  {'calibration':>11} {'worst':>7}  {'held out':>9} {'worst':>7}  {'perplexity':>10}"
    )
    table = []
    prefix = f"{model.base_model_prefix}."
    for kind, make in kinds(
        [int(rank) for rank in options.ranks.split(",")], options.rounds
    ).items():
        if not kind.startswith(tuple(options.only.split(","))):
            continue
        errors: dict[str, list[float]] = {"calibration": [], "held out": []}
        bits = weights = 0.0
        for target in targets:
            original = originals[target.module]
            weight, name = (
                target.to_matrix(original.weight.detach()),
                target.weight.removeprefix(prefix),
            )
            layer: Any = make(weight, original.bias, calibration.get("inputs", name))
            for text, rows in (("calibration", calibration), ("held out", held_out)):
                inputs = rows.get("inputs", name)
                with torch.no_grad():
                    whole = inputs @ weight.T
                    got = layer(inputs) - (0 if original.bias is None else original.bias)
                errors[text].append(relative_error(got, whole))
            bits, weights = bits + layer.bits * weight.numel(), weights + weight.numel()
            model.set_submodule(target.module, layer)
        row: dict[str, Any] = {
            "kind": kind,
            "bits": bits / weights,
            "perplexity": perplexity(model, texts[1]),
        }
        for text, found in errors.items():
            row[text] = {"mean": sum(found) / len(found), "worst": max(found), "layers": found}
        table.append(row)
        figures = (f"{row[text]['mean']:11.4f} {row[text]['worst']:7.4f}" for text in errors)
        print(
            f"{kind:18} {row['bits']:6.3f}  {'  '.join(figures)}  {row['perplexity']:10.3f}",
            flush=True,
        )
        for module, original in originals.items():
            model.set_submodule(module, original)
    print(
        json.dumps(
            {"model": options.model.name, "layers": [t.module for t in targets], "rows": table}
        )
    )


if __name__ == "__main__":
    main()
