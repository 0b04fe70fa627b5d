"""The command line in one of several processes on processors, with FSDP2 or ZeRO-3 as on GPUs.

accelerate refuses to shard where there is no GPU, though torch and DeepSpeed can: here it is told
that the gloo group of these processes is one of GPUs, while every tensor stays on the processor.
"""

import os
import sys

import bitsandbytes
import torch
import torch.distributed as dist
from accelerate.state import DistributedType, PartialState

os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
torch.set_num_threads(1)
bitsandbytes.nn.modules.has_avx512bf16 = lambda: False  # as in conftest.py
if os.environ.get("ACCELERATE_USE_FSDP") or os.environ.get("ACCELERATE_USE_DEEPSPEED"):
    dist.init_process_group("gloo")
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
    import deepspeed

    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)

from pissa.cli.main import main  # noqa: E402

sys.argv[0] = "pissa"
main()
