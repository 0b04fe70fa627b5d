"""Nothing made for one base is ever used on another: every wrong pairing is an error that names the tensor."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import pissa
from conftest import build_pico
from pissa.errors import WrongBaseError
from runs import language_model, logits, make_run, train

LAST = "layers.1.mlp.down_proj.weight"
NORM = "norm.weight"
ANY = r"[\w.]+\.weight"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The right base, what was made from it, and five bases that are wrong for it."""
    root = tmp_path_factory.mktemp("pairings")
    base = root / "base"
    build_pico().save_pretrained(base)
    build_pico(seed=1).save_pretrained(root / "other seed")
    copy(
        base,
        root / "one ulp",
        lambda name, tensor: one_ulp(tensor) if name.endswith(LAST) else tensor,
    )
    copy(base, root / "another revision", lambda name, tensor: tensor * (1 + 1e-3))
    copy(
        base,
        root / "changed norm",
        lambda name, tensor: tensor + 1e-3 if name == f"model.{NORM}" else tensor,
    )
    make_run(base, root / "run", method="pissa")
    make_run(base, root / "lora_run", method="lora")
    pissa.convert(root / "run", root / "lora")
    for name in ("base", "other seed", "another revision"):
        pissa.decompose(
            root / name, root / ("residual" if name == "base" else f"start of {name}"), rank=4
        )
    residual = language_model(root / "residual")
    pair = peft.PeftModel.from_pretrained(
        residual, root / "residual", subfolder="pissa_init", is_trainable=True
    )
    train(pair).save_pretrained(root / "pair")
    pissa.save(
        train(pissa.load(language_model(root / "residual"), root / "residual")),
        root / "residual_run",
    )
    return root


def copy(source: Path, folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    shutil.copytree(source, folder)
    tensors = {
        name: change(name, tensor)
        for name, tensor in load_file(source / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def one_ulp(tensor: torch.Tensor) -> torch.Tensor:
    moved = tensor.clone()
    moved.view(-1)[-1] = torch.nextafter(moved.view(-1)[-1], torch.tensor(torch.inf))
    return moved


def load(root: Path, made: str, base: str) -> None:
    model = language_model(root / base)
    before = logits(model)
    try:
        pissa.load(model, root / made)
    finally:
        assert torch.equal(logits(model), before)  # refused before it was touched


def restart(root: Path, made: str, base: str) -> None:
    pissa.restart(language_model(root / base), root / made)


def convert(root: Path, made: str, base: str) -> None:
    pissa.convert(root / made, root / "new" / "lora", base=root / base)


def convert_start(root: Path, made: str, start: str) -> None:
    pissa.convert(root / made, root / "new" / "lora", start=root / start)


def merge(root: Path, made: str, base: str) -> None:
    pissa.merge(root / base, root / made, root / "new" / "merged")


def merge_streaming(root: Path, made: str, base: str) -> None:
    pissa.merge(root / base, root / made, root / "new" / "merged", max_shard_bytes=9_000)


WRONG = [
    (load, "run", "other seed", ANY),
    (load, "run", "one ulp", LAST),
    (load, "run", "residual", ANY),
    (load, "run", "changed norm", NORM),
    (load, "run/adapter", "other seed", ANY),
    (load, "run/adapter", "one ulp", LAST),
    (load, "run/state", "another revision", ANY),
    (load, "lora", "residual", ANY),
    (load, "lora", "changed norm", NORM),
    (load, "lora_run", "one ulp", LAST),
    (load, "residual", "other seed", ANY),
    (load, "residual", "changed norm", NORM),
    (load, "residual", "base", "original base"),
    (load, "residual", "start of other seed", ANY),
    (load, "residual_run", "start of another revision", ANY),
    (load, "residual_run", "one ulp", LAST),
    (restart, "run/state", "other seed", ANY),
    (restart, "run/state", "one ulp", LAST),
    (restart, "run/state", "another revision", ANY),
    (restart, "run/state", "residual", ANY),
    (restart, "lora_run/state", "changed norm", NORM),
    (restart, "residual_run/state", "changed norm", NORM),
    (convert, "run", "other seed", ANY),
    (convert, "run", "one ulp", LAST),
    (convert, "run/state", "another revision", ANY),
    (convert, "run/adapter", "residual", ANY),
    (convert, "lora", "changed norm", NORM),
    (convert, "residual_run", "residual", ANY),
    (convert_start, "pair", "start of other seed", ANY),
    (convert_start, "pair", "start of another revision", ANY),
    (merge, "run", "other seed", ANY),
    (merge, "run", "one ulp", LAST),
    (merge, "run/adapter", "another revision", ANY),
    (merge, "lora", "changed norm", NORM),
    (merge, "residual_run", "residual", ANY),
    (merge_streaming, "run/state", "one ulp", LAST),
]


@pytest.mark.parametrize(
    ("use", "made", "base", "tensor"),
    WRONG,
    ids=[f"{use.__name__}-{made}-{base}" for use, made, base, _ in WRONG],
)
def test_a_wrong_pairing_is_an_error_that_names_the_tensor(
    use: Callable[[Path, str, str], None], made: str, base: str, tensor: str, folders: Path
) -> None:
    with pytest.raises(WrongBaseError, match=tensor):
        use(folders, made, base)
    assert not [path for path in folders.glob("new/*") if not path.name.startswith(".")]
    assert not list(folders.glob("new/.*"))


@pytest.mark.parametrize("use", [load, convert, merge, restart], ids=lambda use: use.__name__)
def test_the_right_pairing_is_none(use: Callable[[Path, str, str], None], folders: Path) -> None:
    """So that the errors above come from the pairing."""
    try:
        if use is load:
            pissa.load(language_model(folders / "base"), folders / "run")
        else:
            use(folders, "run/state", "base")
    finally:
        shutil.rmtree(folders / "new", ignore_errors=True)
    if use is convert:
        convert_start(folders, "pair", "residual")
        shutil.rmtree(folders / "new")


def test_the_error_shows_both_digests_and_the_way_out(folders: Path) -> None:
    with pytest.raises(
        WrongBaseError, match=r"digest \w{16} here, expected \w{16} \(float32\).*Use .*base"
    ):
        load(folders, "run", "one ulp")
