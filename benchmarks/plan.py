"""What `pissa plan` says a run takes on this device, beside what the run took: bytes, and planned
over taken.

python benchmarks/plan.py TOKENIZER DATA.jsonl [--hidden 2048] [--layers 16] [--device cuda] [--set
bf16=true,...]

The model is a Llama of that size with random weights in bf16 and the tokenizer of the folder
TOKENIZER, three steps of training long. On a GPU "taken" is the peak of torch's allocator, as
`run.json` has it; on a CPU the peak of the whole process, which grows from run to run, so one
method at a time is fair there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
import transformers
import yaml

import pissa
from pissa.config import load_settings
from pissa.planning import plan
from pissa.training.quiet import quiet


def write_llama(folder: Path, tokenizer: str, hidden: int, layers: int) -> int:
    """Write the model; its parameters."""
    words = transformers.AutoTokenizer.from_pretrained(tokenizer)
    words.save_pretrained(folder)
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=11 * hidden // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        vocab_size=max(32000, len(words)),
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    return model.num_parameters()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokenizer")
    parser.add_argument("data")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", default="full,lora,pissa,lora_xs,qlora,qpissa")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument(
        "--set", default="", help="more settings with commas, as gradient_checkpointing=true"
    )
    options = parser.parse_args()
    more = {
        key: yaml.safe_load(value)
        for key, value in (pair.split("=") for pair in options.set.split(",") if pair)
    }
    rows = []
    with tempfile.TemporaryDirectory() as temporary, quiet():
        model = Path(temporary, "model")
        parameters = write_llama(model, options.tokenizer, options.hidden, options.layers)
        for method in options.methods.split(","):
            out = Path(temporary, method)
            values = {
                "model": str(model), "data": options.data, "data_limit": 200, "output": str(out), "method": method,
                "rank": options.rank, "batch_size": options.batch_size, "micro_batch_size": options.batch_size,
                "max_length": options.max_length, "packing": True, "max_steps": 3, "save_steps": 0, "eval_size": 0,
                "device": options.device,
            }  # fmt: skip
            settings = load_settings(None, {**values, **more})
            device = plan(settings).asked.device
            record = pissa.train(settings)
            planned, taken = (device.total if device else 0), int(record["peak_memory_bytes"] or 0)
            row = {
                "method": method,
                "planned": planned,
                "taken": taken,
                "ratio": planned / max(taken, 1),
            }
            rows.append({**row, "seconds": record["seconds"]})
            print(
                f"{method:10} planned {planned / 1e9:6.2f} GB  taken {taken / 1e9:6.2f} GB  {row['ratio']:5.2f}",
                flush=True,
            )
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    print(json.dumps({**vars(options), "parameters": parameters, "rows": rows}))


if __name__ == "__main__":
    main()
