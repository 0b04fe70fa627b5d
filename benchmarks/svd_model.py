"""The fast SVD over all matrices of a model on one device, with its share of what the device can
do.

python benchmarks/svd_model.py --device cuda            Llama-2-7B: 32 layers of 4096 and 11008 columns, bf16, rank 128
python benchmarks/svd_model.py --layers 1 --hidden 512 --intermediate 1376 --rank 32          on anything

The matrices are noise, made on the device one at a time outside the clock. "of the product ceiling"
compares the products that the space needs with a square product in the dtype that is used for them;
"of the copy ceiling" the bytes of the matrix, read once per product, with a copy.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median

import torch

from pissa.linalg import lanczos, truncated_svd


def clock(work: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def ceilings(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """(floating-point operations, bytes copied) per second."""
    size = 8192 if device != "cpu" else 2048
    square = torch.randn(size, size, device=device).to(dtype)
    other = torch.empty_like(square)
    product = median(clock(lambda: square @ square, device) for _ in range(5))
    copy = median(clock(lambda: other.copy_(square), device) for _ in range(5))
    return 2 * size**3 / product, 2 * square.nbytes / copy


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--rank", type=int, default=128)
    options = parser.parse_args()
    square, tall = (options.hidden, options.hidden), (options.intermediate, options.hidden)
    shapes = [square] * 4 + [tall] * 2 + [tall[::-1]]
    probe = torch.zeros(1, dtype=torch.bfloat16, device=options.device)
    dtype = lanczos._product_dtypes(probe)[0]
    columns = 2 * lanczos._size(options.rank, lanczos.SIZE)
    generator = torch.Generator(options.device).manual_seed(0)
    total, operations, moved = 0.0, 0.0, 0.0
    for layer in range(options.layers + 1):
        for index, shape in enumerate(shapes):
            weight = torch.randn(shape, generator=generator, device=options.device).bfloat16()
            name = f"{layer}.{index}"
            taken = clock(
                lambda w=weight, n=name: truncated_svd(w, options.rank, "fast", name=n),
                options.device,
            )
            if layer:  # the first one warms up
                total += taken
                operations += 2 * weight.numel() * columns
                moved += weight.numel() * dtype.itemsize * columns / lanczos._block(options.rank)
    product, copy = ceilings(options.device, dtype)
    row = {
        "matrices": options.layers * len(shapes),
        "seconds": total,
        "product_dtype": str(dtype),
        "of the product ceiling": operations / total / product,
        "of the copy ceiling": moved / total / copy,
    }
    print(
        "  ".join(
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in row.items()
        )
    )
    print(json.dumps({**vars(options), **row}))


if __name__ == "__main__":
    main()
