"""What `tests/optim/test_distributed.py` runs on two CPU processes, on two GPUs with NCCL and the fused kernels.

    torchrun --nproc-per-node 2 tests/gpu/two_gpus.py

Prints one line per part that held and leaves with 1 at the first that did not. It is no pytest file, since torchrun
starts the processes.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from optim import test_distributed as parts  # the tests' folder has to be found first


def main():
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", rank))
    parts.DEVICE = "cuda"
    agreed = [tempfile.mkdtemp() if rank == 0 else ""]
    dist.broadcast_object_list(agreed, device=torch.device("cpu"))
    folder = Path(agreed[0])
    try:
        for part in (parts.ddp, parts.fsdp, parts.one_to_two, parts.fsdp_release):
            part(rank, folder)
            dist.barrier()
            if rank == 0:
                print(f"{part.__name__}: held on two of {torch.cuda.get_device_name(0)}, torch {torch.__version__}")
    finally:
        dist.destroy_process_group()
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
