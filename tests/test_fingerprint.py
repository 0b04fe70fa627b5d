"""A base is recognised in every dtype it may be loaded in, and one changed bit is another base."""

from __future__ import annotations

import hashlib

import pytest
import torch
from peft import LoraConfig, get_peft_model

from conftest import build_pico
from pissa.checkpoint.fingerprint import (
    check_same,
    check_tensor,
    combined,
    fingerprint,
    model_tensors,
    tensor_digest,
    tensor_digests,
)
from pissa.errors import WrongBaseError

WORDS = {"what": "the run", "advice": "Use the base it was made on: tiny/base"}
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def test_digest_is_sha256_of_shape_and_bytes():
    tensor = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    expected = hashlib.sha256(b"[2, 3]" + tensor.numpy().tobytes()).hexdigest()
    assert tensor_digest(tensor) == expected
    assert tensor_digest(tensor.T.contiguous().T) == expected
    assert tensor_digest(tensor.reshape(3, 2)) != expected


def test_digest_sees_one_changed_bit_and_the_sign_of_zero():
    tensor = torch.randn(5, 7)
    changed = tensor.clone()
    changed[3, 2] = torch.nextafter(changed[3, 2], torch.tensor(9.0))
    assert tensor_digest(changed) != tensor_digest(tensor)
    assert tensor_digest(torch.tensor([-0.0])) != tensor_digest(torch.tensor([0.0]))


@pytest.mark.parametrize(
    "tensor", [torch.ones(()), torch.ones(0, 3), torch.ones(3, dtype=torch.int64)], ids=str
)
def test_every_tensor_has_a_digest(tensor):
    assert len(next(iter(tensor_digests(tensor).values()))) == 64


def test_digests_name_the_own_dtype_first():
    assert list(tensor_digests(torch.ones(2))) == ["float32", "bfloat16", "float16"]
    assert list(tensor_digests(torch.ones(2, dtype=torch.bfloat16))) == ["bfloat16", "float16"]


@pytest.mark.parametrize("made_in", DTYPES, ids=str)
@pytest.mark.parametrize("loaded_in", DTYPES, ids=str)
def test_the_same_base_is_recognised_in_another_dtype(made_in, loaded_in):
    stored = torch.randn(6, 5).to(made_in)
    check_tensor("w", tensor_digests(stored), stored.to(loaded_in), **WORDS)


@pytest.mark.parametrize("made_in", DTYPES, ids=str)
@pytest.mark.parametrize("loaded_in", DTYPES, ids=str)
def test_another_base_is_refused_in_every_dtype(made_in, loaded_in):
    stored = torch.randn(6, 5).to(made_in)
    other = stored.clone()
    other[0, 0] += 1
    with pytest.raises(
        WrongBaseError, match=r"the run was made for another base: `w` \[6, 5\] has digest"
    ):
        check_tensor("w", tensor_digests(stored), other.to(loaded_in), **WORDS)


def test_a_refusal_names_both_digests_and_what_to_do():
    one, other = torch.zeros(2), torch.ones(2)
    with pytest.raises(WrongBaseError) as caught:
        check_tensor("w", tensor_digests(one), other, **WORDS)
    message = str(caught.value)
    assert tensor_digest(other)[:16] in message
    assert tensor_digest(one)[:16] in message
    assert message.endswith("Use the base it was made on: tiny/base")


def test_a_dtype_that_cannot_be_compared_says_so():
    with pytest.raises(
        WrongBaseError, match="made on `w` in float32; it is int8 here and cannot be compared"
    ):
        check_tensor("w", tensor_digests(torch.ones(2)), torch.ones(2, dtype=torch.int8), **WORDS)


def test_the_first_differing_and_the_absent_tensor_are_named():
    tensors = {
        name: torch.full((3,), value) for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0))
    }
    recorded = fingerprint(tensors)
    check_same(recorded, tensors.get, **WORDS)
    with pytest.raises(WrongBaseError, match="`b`"):
        check_same(recorded, {**tensors, "b": torch.zeros(3), "c": torch.zeros(3)}.get, **WORDS)
    with pytest.raises(WrongBaseError, match="tensor `b` is absent from this one"):
        check_same(recorded, {"a": tensors["a"], "c": tensors["c"]}.get, **WORDS)


def test_combined_digest_ignores_order_and_sees_names_and_values():
    digests = fingerprint({"a": torch.ones(2), "b": torch.zeros(2)})
    assert combined(dict(reversed(digests.items()))) == combined(digests)
    assert combined(fingerprint({"a": torch.zeros(2), "b": torch.ones(2)})) != combined(digests)
    assert combined(fingerprint({"a": torch.ones(2), "c": torch.zeros(2)})) != combined(digests)


def test_model_tensors_are_those_of_the_base_model_with_a_head_or_without():
    model = build_pico()
    names = list(model_tensors(model))
    assert "layers.0.self_attn.q_proj.weight" in names
    assert "embed_tokens.weight" in names
    # lm_head is tied to the embedding: one tensor, one name.
    assert "lm_head.weight" not in names
    assert fingerprint(model_tensors(model.model)) == fingerprint(model_tensors(model))
    untied = build_pico(tie_word_embeddings=False)
    assert "lm_head.weight" in model_tensors(untied)
    assert "lm_head.weight" not in model_tensors(untied, skip=["lm_head"])


def test_adapters_are_no_part_of_the_base():
    model = build_pico(tie_word_embeddings=False)
    before = fingerprint(model_tensors(model))
    config = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["lm_head"])
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert fingerprint(model_tensors(model)) == before


def test_a_base_that_was_rounded_and_widened_again_is_recognised_and_another_is_not():
    """As peft's preparation for k-bit training leaves a float32 base that was loaded in 16 bits."""
    base = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    digests = tensor_digests(base)
    for dtype in (torch.bfloat16, torch.float16):
        check_tensor("w", digests, base.to(dtype).float(), **WORDS)
        with pytest.raises(WrongBaseError, match="made for another base"):
            check_tensor("w", digests, (2 * base).to(dtype).float(), **WORDS)
    with pytest.raises(WrongBaseError, match="made for another base"):
        check_tensor("w", digests, torch.nextafter(base, torch.tensor(9.0)), **WORDS)
    small = torch.tensor([1e-9, 1.0])  # lossless in neither, and in float16 its first value is gone
    check_tensor("w", tensor_digests(small), small.half().float(), **WORDS)
