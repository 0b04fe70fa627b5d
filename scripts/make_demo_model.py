"""Make the small language model and the fine-tuning data that `pissa demo` works on.

The demo has to run offline, so both come from text that every Python installation carries:
source code (docstrings removed) trains the model, and the docstrings and reference topics,
English prose that the model has never seen, become the fine-tuning data.
"""

import argparse
import ast
import inspect
import json
import math
import platform
import random
import shutil
import sysconfig
import time
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    get_cosine_schedule_with_warmup,
)

STDLIB = Path(sysconfig.get_paths()["stdlib"])
DEMO = Path(__file__).resolve().parents[1] / "src" / "pissa" / "demo"
# Tests and tables teach a language model little; site-packages is not part of Python.
SKIPPED_FOLDERS = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "encodings",
    "pydoc_data",
}
END = "<|end|>"
VOCAB, CONTEXT, BATCH, THREADS = 2048, 256, 8, 2
MAX_CHARS, MAX_TOKENS = 420, 200  # of one row, prompt and completion together
EVAL_ROWS, TRAIN_ROWS = 200, 2000
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
Row = dict[str, str]
README = """\
---
license: apache-2.0
---
# The model of `pissa demo`

A Llama of {params:,} parameters (bf16) with a byte-level BPE tokenizer of {vocab} tokens, context {context}: big
enough for its weights to have structure, small enough to travel with the package, of no use beyond demonstrations.

* Made by: `{command}`
  (seed {seed}; {steps} steps of {batch} random windows of {context} tokens, AdamW)
* Made with: Python {python}, torch {torch}, transformers {transformers}, tokenizers {tokenizers}
* Pretraining text: {train_files} source files ({train_tokens:,} tokens) of Python's standard library, without their
  docstrings and without tests, `idlelib`, `lib2to3` and `encodings`
* Validation loss of the stored weights: {val_loss:.4f} nats a token, on {val_files} held-out files ({val_tokens:,}
  tokens); unigram frequencies give {unigram:.4f}
* Fine-tuning data, in `../data`: docstrings and reference topics of the same Python as `prompt` and `completion`;
  `eval.jsonl` and `train.jsonl` share no module

The same Python version and seed give the same data files bit for bit; the weights also depend on the processor and
the versions of the libraries.

Licence: the text is Python's, under the PSF licence (`../data/LICENSE.txt`); the weights are under the Apache-2.0 of
the project.
"""


def source_files() -> list[Path]:
    """List the modules to read, sorted, because the order of a directory is not reproducible."""
    names = sorted(path.relative_to(STDLIB).as_posix() for path in STDLIB.rglob("*.py"))
    # _sysconfigdata records how and where this very Python was built: not text of Python's own.
    return [STDLIB / name for name in names
            if not SKIPPED_FOLDERS & set(name.split("/")) and "_sysconfigdata" not in name]  # fmt: skip


def read(path: Path) -> str:
    """Decode a module by its own coding line; some are not UTF-8."""
    with tokenize.open(path) as file:
        return file.read()


def without_docstrings(source: str) -> str:
    """Cut the docstrings out of the text, so that the fine-tuning prose is new to the model."""
    lines = source.encode().split(b"\n")  # the columns of ast count bytes of UTF-8
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, DOCUMENTED)]
    found: list[tuple[Any, Any]] = [
        (node.body[0], node) for node in nodes if ast.get_docstring(node, clean=False)
    ]
    for doc, node in sorted(found, key=lambda pair: pair[0].lineno, reverse=True):
        before, after = (
            lines[doc.lineno - 1][: doc.col_offset],
            lines[doc.end_lineno - 1][doc.end_col_offset :],
        )
        kept = (
            before
            + (b"pass" if len(node.body) == 1 and not isinstance(node, ast.Module) else b"")
            + after
        )
        lines[doc.lineno - 1 : doc.end_lineno] = [kept] if kept.strip() else []
    return b"\n".join(lines).decode()


def prose(text: str, room: int) -> str | None:
    """Take the first paragraphs that read as English: no signatures, code, tables or lists."""
    taken: list[str] = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        joined = " ".join(paragraph.split())
        letters = sum(char.isalpha() or char == " " for char in joined)
        english = (joined.endswith(".") and joined[0].isupper() and joined.isascii() and joined.count(" ") >= 5
                   and letters >= 0.88 * len(joined) and "\n " not in "\n" + paragraph.strip("\n")
                   and not any(mark in joined for mark in (">>>", "->", "@")))  # fmt: skip
        if english and len("\n\n".join([*taken, joined])) <= room:
            taken.append(joined)
        elif taken or english:
            break
    return "\n\n".join(taken) or None


def definitions(node: DOCUMENTED, name: str) -> Iterator[tuple[str, DOCUMENTED]]:
    """Walk the public classes and functions with their dotted names; ast itself keeps no parents."""
    yield name, node
    for child in ast.iter_child_nodes(node):
        if isinstance(
            child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ) and not child.name.startswith("_"):
            yield from definitions(child, f"{name}.{child.name}")


def questions() -> Iterator[tuple[str, str, str]]:
    """Yield (top-level module, question, text) for everything that Python documents in its own files."""
    for path in source_files():
        parts = path.relative_to(STDLIB).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if any(part.startswith("_") for part in parts):
            continue
        for name, node in definitions(ast.parse(read(path)), ".".join(parts)):
            question = (
                "What is the module `{}` for?"
                if isinstance(node, ast.Module)
                else "What does `{}` do?"
            )
            question = "What is `{}`?" if isinstance(node, ast.ClassDef) else question
            yield parts[0], question.format(name), ast.get_docstring(node) or ""
    for statement in ast.parse(read(STDLIB / "pydoc_data" / "topics.py")).body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and isinstance(
            statement.value, ast.Dict
        ):
            for topic, text in sorted(ast.literal_eval(statement.value).items()):
                yield "pydoc_data", f"What does the Python reference say on `{topic}`?", text


def make_rows(seed: int) -> tuple[list[Row], list[Row]]:
    """Split into train and eval by top-level module, so that eval holds no sibling of a training row."""
    modules: dict[str, list[Row]] = {}
    seen: set[str] = set()
    for module, question, text in questions():
        completion = prose(text, MAX_CHARS - len(question) - 1)
        if completion and not {question, completion.lower()} & seen:
            seen |= {question, completion.lower()}
            modules.setdefault(module, []).append(
                {"prompt": question + "\n", "completion": completion}
            )
    rng = random.Random(seed)
    train, held_out = list[Row](), list[Row]()
    # Whole modules, none so big that it would be most of eval
    for name in rng.sample(sorted(modules), len(modules)):
        fits = (
            len(modules[name]) <= min(EVAL_ROWS // 8, EVAL_ROWS - len(held_out))
            and name != "pydoc_data"
        )
        (held_out if fits else train).extend(modules[name])
    return rng.sample(train, min(TRAIN_ROWS, len(train))), rng.sample(held_out, len(held_out))


def make_data(folder: Path, seed: int) -> list[Row]:
    """Write the fine-tuning files, beside the licence that their text has to keep."""
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = make_rows(seed)
    for name, rows in (("train", train), ("eval", held_out)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        # Bytes: the same newlines on every system
        (folder / f"{name}.jsonl").write_bytes(text.encode())
        print(f"{name}.jsonl: {len(rows)} rows, {len(text):,} bytes")
    shutil.copyfile(STDLIB / "LICENSE.txt", folder / "LICENSE.txt")
    return train + held_out


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: it needs no unknown token, and any text can be decoded again."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[END], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END, eos_token=END, pad_token=END,
                                   model_max_length=CONTEXT, clean_up_tokenization_spaces=False)  # fmt: skip


def pretrain(tokens: torch.Tensor, steps: int, seed: int, rate: float) -> LlamaForCausalLM:
    """Train on random windows; enough weight decay and learning rate that the spectra decay."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=160, intermediate_size=432, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.06,  # 0.02 is for wide models
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    cosine = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    start, smooth = time.perf_counter(), math.log(VOCAB)
    for step in range(1, steps + 1):
        at = torch.randint(len(tokens) - CONTEXT, (BATCH, 1)) + torch.arange(CONTEXT)
        loss = model(input_ids=tokens[at], labels=tokens[at]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        cosine.step()
        smooth = 0.95 * smooth + 0.05 * loss.item()
        if step % 50 == 0 or step == steps:
            speed = step * BATCH * CONTEXT / (time.perf_counter() - start)
            print(f"step {step}/{steps}  loss {smooth:.3f}  {speed:,.0f} tokens/s", flush=True)
    return model.eval()


def mean_loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    """Average over the whole held-out text, so that the number has no luck in it."""
    windows = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    with torch.no_grad():
        losses = [
            model(input_ids=part, labels=part).loss.item() * len(part) for part in windows.split(64)
        ]
    return sum(losses) / len(windows)


def make_model(folder: Path, rows: list[Row], args: argparse.Namespace) -> None:
    """Train the tokenizer and the model, and write them as a folder that transformers loads."""
    torch.set_num_threads(THREADS)
    texts = [
        text
        for path in source_files()
        if len(text := without_docstrings(read(path)).strip() + "\n") > 200
    ]
    random.Random(args.seed).shuffle(texts)
    split = len(texts) // 20
    tokenizer = make_tokenizer(texts[split:])
    if (
        longest := max(
            len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) for row in rows
        )
    ) > MAX_TOKENS:
        raise SystemExit(f"a row has {longest} tokens, more than {MAX_TOKENS}: lower MAX_CHARS")
    val, train = (torch.tensor([i for text in part for i in [0, *tokenizer(text, verbose=False)["input_ids"]]])
                  for part in (texts[:split], texts[split:]))  # fmt: skip
    unigram = (
        -torch.log((torch.bincount(train, minlength=VOCAB) + 1) / (len(train) + VOCAB))[val]
        .mean()
        .item()
    )
    print(
        f"{len(train):,} tokens, {len(val):,} held out, longest row {longest}, unigram loss {unigram:.3f}"
    )
    model = pretrain(train, args.steps, args.seed, args.rate)
    # The weights as stored, computed with in float32
    val_loss = mean_loss(model.bfloat16().float(), val)
    print(f"validation loss {val_loss:.4f}")
    shutil.rmtree(folder, ignore_errors=True)
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # it comes as 0600, which no package should install
    (folder / "README.md").write_text(README.format(
        params=model.num_parameters(), vocab=VOCAB, context=CONTEXT, batch=BATCH, seed=args.seed, steps=args.steps,
        command=f"python scripts/make_demo_model.py --seed {args.seed} --steps {args.steps} --rate {args.rate}",
        python=platform.python_version(), torch=torch.__version__.split("+")[0], tokenizers=tokenizers.__version__,
        transformers=transformers.__version__, train_files=len(texts) - split, val_files=split,
        train_tokens=len(train), val_tokens=len(val), val_loss=val_loss, unigram=unigram,
    ), encoding="utf-8")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the model and the data of `pissa demo`.")
    parser.add_argument("--out", type=Path, default=DEMO, help="the demo package to fill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument(
        "--data-only", action="store_true", help="write the fine-tuning files and no model"
    )
    arguments = parser.parse_args()
    demo_rows = make_data(arguments.out / "data", arguments.seed)
    if not (init := arguments.out / "__init__.py").exists():
        init.write_text('"""The model and the data that `pissa demo` runs on."""\n')
    if not arguments.data_only:
        make_model(arguments.out / "model", demo_rows, arguments)
