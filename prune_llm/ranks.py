"""Processes that prune one model together, each with a share of the calibration samples.

`torchrun` and `accelerate launch` start them. Statistics are summed over all of them and what is
decided once is decided by the first, so that every process prunes the same weights; the first one
writes them. The rest of the package asks a `Ranks` and need not know how many there are.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# what a launcher tells each of its processes
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# a process waits so long for another, which may be verifying or calibrating levels; one that died
# is noticed at once
PATIENCE = timedelta(days=1)


class Ranks:
    """The processes of a run, seen from one of them; alone, values come back as they are.

    Every method but `share` is a meeting: all processes must call it, in the same order.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and tells."""
        return self.rank == 0

    def share(self, samples_ST: Tensor) -> Tensor:
        """The samples of this process: consecutive ones, one more or less than another's.

        Raises:
            ValueError: fewer samples than processes.
        """
        if len(samples_ST) < self.count:
            raise ValueError(
                f"samples {len(samples_ST)}: fewer than the {self.count} processes that share "
                "them; give more samples, or start fewer processes"
            )
        return samples_ST.tensor_split(self.count)[self.rank]

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the processes, the same bits in each."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor)

    def of_all(self, value: T) -> list[T]:
        """Each process's value, by rank; tensors in it lie on the CPU."""
        if self.count == 1:
            return [value]
        found: list[T] = [value] * self.count
        torch.distributed.all_gather_object(found, value)
        return found

    def of_first(self, value: T) -> T:
        """The first process's value."""
        if self.count == 1:
            return value
        found = [value]
        torch.distributed.broadcast_object_list(found, device=torch.device("cpu"))
        return found[0]

    def tensor_of_first(self, tensor: Tensor) -> Tensor:
        """The first process's tensor, of the same shape and dtype."""
        if self.count == 1:
            return tensor
        tensor = tensor.contiguous()
        torch.distributed.broadcast(tensor.view(torch.uint8), 0)
        return tensor

    def done_by_first(self, work: Callable[[], T]) -> T | None:
        """What the first process gets; None in the others.

        Raises:
            ValueError: in every process, what the work raised in the first.
        """
        done, error = None, None
        if self.first:
            try:
                done = work()
            except ValueError as raised:
                error = raised
        told = self.of_first(None if error is None else str(error))
        if told is not None:
            raise error or ValueError(told)
        return done

    def device(self, device: torch.device) -> torch.device:
        """Of this process: where CUDA is asked for without a number, one for each of a machine."""
        if self.count == 1 or device.type != "cuda" or device.index is not None:
            return device
        number = int(os.environ.get("LOCAL_RANK", self.rank))
        if number >= torch.cuda.device_count():
            raise ValueError(
                f"device {str(device)!r}: process {number} of this machine has none of its "
                f"{torch.cuda.device_count()} CUDA devices; start as many processes as devices"
            )
        torch.cuda.set_device(number)
        return torch.device("cuda", number)


ALONE = Ranks()


def launched_rank() -> int:
    """The number a launcher gave this process; 0 where there is none."""
    return int(os.environ["RANK"]) if all(name in os.environ for name in LAUNCHED) else 0


def launched_count() -> int:
    """Processes that a launcher started together with this one, itself included."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in LAUNCHED) else 1


def refuse_launched(what: str) -> None:
    """Raises ValueError where a launcher started several processes for what runs in one."""
    count = launched_count()
    if count > 1:
        raise ValueError(
            f"{what}: runs in one process, and {count} were started; start it without torchrun or "
            "accelerate launch"
        )


def joined() -> Ranks:
    """Meet the processes that a launcher started; alone where there is no launcher.

    The meeting lasts as long as the process: a second one at the same address would not come about.
    """
    if launched_count() == 1:
        return ALONE
    if not torch.distributed.is_initialized():
        both = torch.cuda.is_available() and torch.distributed.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if both else "gloo"
        torch.distributed.init_process_group(backend, timeout=PATIENCE)
        atexit.register(torch.distributed.destroy_process_group)
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
