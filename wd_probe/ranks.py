"""The processes of one run, as `torchrun` starts them: a part of every batch for each.

Started in any other way a process is alone, and everything here does nothing.
"""

import atexit
import os
import random
import signal
import threading
import warnings
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import InputError, counted

T = TypeVar("T")

#: What the others can say of a process that is gone.
FAILED = "failed, perhaps as another process has died"

_known_rank = 0


def size() -> int:
    """How many processes share this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0. The first one alone writes and shows."""
    return dist.get_rank() if dist.is_initialized() else 0


def known_rank() -> int:
    """The same of a training that others have started, in whatever way; also when it is over."""
    global _known_rank
    _known_rank = rank() or _known_rank or int(os.environ.get("RANK", "0") or 0)
    return _known_rank


def started() -> int:
    """How many processes `torchrun` has started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def own_gpu() -> str:
    """The GPU of this process, one of those on its machine."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if started() > 1 else "cuda"


def join(device: torch.device) -> None:
    """Join the other processes for good, over NCCL on GPUs and gloo elsewhere."""
    if started() == 1 or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    atexit.register(dist.destroy_process_group)


def share(start: int, stop: int) -> tuple[int, int]:
    """This process's part of a range."""
    count = stop - start
    return start + count * rank() // size(), start + count * (rank() + 1) // size()


def check_divides(batch_size: int) -> None:
    """See that every process gets as many images of a batch as the others.

    Raises:
        InputError: it does not.
    """
    if batch_size % size():
        raise InputError(
            f"a batch of {counted(batch_size, 'image')} does not divide over {size()} processes; "
            f"--batch-size counts the images of all processes: try {batch_size // size() * size()}"
            if batch_size > size()
            else f"a batch of {counted(batch_size, 'image')} is too small for {size()} processes"
        )


def total(numbers: Tensor) -> Tensor:
    """The sum over all processes, the same to the bit on each."""
    if size() == 1:
        return numbers
    summed = numbers.clone()
    dist.all_reduce(summed)
    return summed


def same(answer_here: T) -> T:
    """The first process's answer."""
    if size() == 1:
        return answer_here
    answer = [answer_here]
    dist.broadcast_object_list(answer)
    return answer[0]


def wrapped(model: nn.Module) -> nn.Module:
    """The model as all train it: gradients are the means over the processes."""
    if size() == 1:
        return model
    device = next(model.parameters()).device
    warnings.filterwarnings("ignore", "Grad strides do not match")  # of depthwise convolutions
    return nn.parallel.DistributedDataParallel(
        model, device_ids=[device] if device.type == "cuda" else None
    )


def draw_apart() -> None:
    """From one random state on all processes, let each draw numbers of its own from now on."""
    if rank():
        seed = int(torch.randint(2**31, ())) + rank()
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)


def settle(model: nn.Module) -> None:
    """Average the running statistics of batch norm over the processes, as timm does."""
    if size() > 1:
        from timm.utils import distribute_bn

        distribute_bn(model, size(), reduce=True)


def outlive_the_others() -> None:
    """`torchrun` ends every process as soon as one fails; what was measured is written first."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
