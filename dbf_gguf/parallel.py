"""Several processes at one convert, as `torchrun` or `accelerate launch` start them: one for each GPU, or on a CPU.

Everything is data-parallel. Each process has its share of the windows, or of the linears to factorize; sums over
windows are added up over all processes (all-reduce) and come out the same on each to the last bit, so that all of them
take the same decisions and make the same steps. What depends on a clock or on the disk the first process decides and
tells the others.

The first process alone prints, holds the lock of the work folder, writes into it, and makes and evaluates the GGUF. The
others write nothing but the linears that they have factorized. All must see the same folders: it is one machine.

A process that fails says why and ends. The launcher then ends the others; those that wait for it notice the lost
connection. Of processes that fail together only one speaks.

Without a launcher there is one process: torch.distributed is left alone, and all functions hand back what they got.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch

from .errors import DBFError

T = TypeVar("T")

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what launchers put into the environment
PATIENCE = timedelta(days=7)  # one process may wait for another as long as that works; one that ends is noticed at once
LAST_WORDS = 2.0  # seconds; the launcher ends all processes as soon as one has ended, so the others let it speak first
ROUND = 4  # pieces of work for each worker between two exchanges of what is finished

_rank, _count, _store = 0, 1, None


def count() -> int:
    """How many processes there are."""
    return _count


def is_main() -> bool:
    """Whether this is the first process."""
    return _rank == 0


@contextmanager
def together() -> Iterator[None]:
    """Within, the processes of a launcher are one group. Of all that they raise only the first comes out.

    Where that went well they end here, at once, without Python's own end: threads of gloo's may still hold what they
    last exchanged, and one that lets go of it then aborts the process, and the launcher all others.
    """
    _join()
    try:
        yield
    except (Exception, KeyboardInterrupt):
        if _count == 1 or _first_to_fail():
            raise
        time.sleep(LAST_WORDS)
        raise SystemExit(1) from None
    if _store is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _join() -> None:
    global _rank, _count, _store
    if not all(name in os.environ for name in LAUNCHER) or int(os.environ["WORLD_SIZE"]) == 1:
        return
    import torch.distributed as dist

    if os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]) != os.environ["WORLD_SIZE"]:
        raise DBFError("the processes are on several machines, which is not supported: start all of them on one")
    local = int(os.environ["LOCAL_RANK"])
    if torch.cuda.is_available() and local < torch.cuda.device_count():
        torch.cuda.set_device(local)  # "cuda" is a GPU of this process' own from here on
    # gloo for what is on the CPU, which includes all exchange of objects
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    _store, _rank, _count = next(dist.rendezvous("env://", timeout=PATIENCE))
    dist.init_process_group(backend, store=_store, rank=_rank, world_size=_count, timeout=PATIENCE)
    if _rank > 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends silently, even while it waits for another


def leave() -> None:
    """From here on the first process is alone; the others have nothing more to do."""
    global _count
    if _count > 1:
        _count = 1
        torch.distributed.destroy_process_group()


def _first_to_fail() -> bool:
    try:
        return _store.add("failed", 1) == 1
    except RuntimeError:  # the store is gone with the process or launcher that held it
        return is_main()


def own_device(name: str) -> str:
    """The device that this process uses where `name` is wanted: a GPU of its own. Raises DBFError if it gets none."""
    if _count == 1 or name == "cpu":
        return name
    if name != "cuda":
        raise DBFError(f"--device {name} is for one process: leave it out, so that each of the {_count} takes a GPU")
    gpus, local = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
    if local >= gpus:
        raise DBFError(f"{_count} processes were started, torch finds {gpus} GPUs here: start one for each")
    return f"cuda:{local}"


def share(items: Sequence[T]) -> Sequence[T]:
    """This process' part of a list, a range or a tensor (by its first dimension): every n-th. It may be empty."""
    return items if _count == 1 else items[_rank::_count]


def rounds(items: list[T], workers: int) -> list[list[T]]:
    """`items` in pieces; after each the processes tell each other what is finished. In one process a single piece."""
    size = max(1, len(items)) if _count == 1 else ROUND * workers * _count
    return [items[i : i + size] for i in range(0, len(items), size)]


def total(value):
    """A number or tensor added up over all processes; tensors in float32, in their own memory where it is that."""
    if _count == 1:
        return value
    if not isinstance(value, torch.Tensor):
        return total(torch.tensor([value], dtype=torch.float64)).item()
    value = value.detach().contiguous()
    value = value if value.dtype == torch.float64 else value.float()
    _exchange(torch.distributed.all_reduce, value)
    return value


def from_main(compute: Callable[[], T]) -> T:
    """What `compute` gives in the first process, which alone calls it; must be something that pickle can write."""
    if _count == 1:
        return compute()
    box: list[Any] = [compute() if is_main() else None]
    _exchange(torch.distributed.broadcast_object_list, box)
    return box[0]


def gather(value: T) -> list[T]:
    """The values of all processes, in the order of these."""
    if _count == 1:
        return [value]
    found: list[Any] = [None] * _count
    _exchange(torch.distributed.all_gather_object, found, value)
    return found


def wait() -> None:
    """Until all processes have come here."""
    gather(None)


def _exchange(operation: Callable, *arguments) -> None:
    try:
        operation(*arguments)
    except RuntimeError as error:
        if "memory" in str(error):  # of the device; named as such further out
            raise
        raise DBFError("another process ended without a word, perhaps for want of memory: --resume goes on") from None
