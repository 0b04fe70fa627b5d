"""Options that several commands share, each with its unit and its "off" value."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from pissa.errors import InputError

Method = Annotated[str, Option(help="How to split; see `pissa methods`. Presets: qlora, loftq, qpissa.")]
Rank = Annotated[int, Option(help="Rank of the trainable part, 1 to the smaller side of the narrowest target.")]
Alpha = Annotated[float | None, Option(help="Strength: the product is scaled by alpha / rank. Default: the rank (1).")]
Targets = Annotated[str, Option(help="all-linear, names separated by commas, or a regular expression.")]
Svd = Annotated[str, Option(help="fast (seeded sketch), exact (certified to 1e-5) or the tolerance to certify.")]
Seed = Annotated[int, Option(help="Fixes every random number, together with the tensors' names.")]
Dtype = Annotated[str | None, Option(help="float32, bfloat16 or float16 for what is written. Default: as stored.")]
Device = Annotated[str, Option(help="Where the algebra runs: cpu, cuda, cuda:1.")]
Quant = Annotated[
    str | None, Option(help="nf4, fp4 or int8 for the frozen part. Default: as it is, or as a preset says.")
]
MergedQuant = Annotated[
    str | None, Option("--quant", help="nf4, fp4 or int8 for the merged weights. Default: 16 bits.")
]
Iterations = Annotated[
    int | None, Option(help="Rounds of low-rank part and quantised rest (pissa, loftq). Default: 5.")
]
DoubleQuant = Annotated[bool, Option("--double-quant", help="Quantise the scales of the blocks too (nf4, fp4).")]
Settings = Annotated[
    list[str] | None, Option("--option", help="A setting of the method's own, NAME=VALUE; may be given several times.")
]
Calibration = Annotated[
    str | None,
    Option(help="For methods that observe the model: data (as for training), or a file of pissa observe."),
]
CalibrationRows = Annotated[int, Option(help="Use the first so many rows of the calibration data, 1 or more.")]
Store = Annotated[str, Option(help="packed (few bits, for bitsandbytes) or 16bit (what they stand for, for any tool).")]
Workers = Annotated[int | None, Option(help="Tensors worked on side by side, 1 or more. Default: one a core, up to 4.")]
MaxShardBytes = Annotated[str, Option(help="Size of an output file: bytes, 500MB, 5GB.")]
Revision = Annotated[str | None, Option(help="Commit, tag or branch of a Hub model.")]
RemoteCode = Annotated[bool, Option("--trust-remote-code", help="Run Python code that comes with the model.")]
RunCode = Annotated[
    bool, Option("--allow-code-execution", help="Run programs that a model wrote, without network, files or rights.")
]
NoIsolation = Annotated[
    bool, Option("--no-isolation", help="Accept a process with limits only, where the machine has no walls.")
]
Force = Annotated[bool, Option("--force", help="Replace the output folder if it is there.")]
Json = Annotated[bool, Option("--json", help="Print the result as JSON.")]


def named(settings: list[str] | None) -> dict[str, str]:
    """`mode=kpm` as a name and a value."""
    pairs = [setting.partition("=") for setting in settings or ()]
    for name, equals, _ in pairs:
        if not (name and equals):
            raise InputError(f"--option is {name + equals!r}, expected NAME=VALUE, as in --option mode=kpm")
    if len({name for name, _, _ in pairs}) < len(pairs):
        raise InputError(f"--option is given twice for one name: {', '.join(settings or ())}")
    return {name: value for name, _, value in pairs}


def target_list(text: str) -> str | list[str]:
    """`q_proj,v_proj` is a list; a regular expression or a single name stays a string."""
    plain = all(character.isalnum() or character in "._-, " for character in text)
    return [name.strip() for name in text.split(",")] if plain and "," in text else text
