"""Independent pieces of work side by side on a CPU.

The products of a small model are too short to gain much from a second thread, while pieces that each have a thread of
their own do not wait for one another. torch releases the interpreter's lock during its operations, so threads suffice.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def side_by_side(workers: int, part: int = 1) -> Iterator[ThreadPoolExecutor]:
    """A pool of `workers` threads that share torch's threads, or one `part`-th of them, evenly.

    On an exception what has not begun is dropped.
    """
    threads = torch.get_num_threads()
    each = max(1, threads // part // workers)
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(each,))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)  # what the pool's threads set is also the process' default


def in_order(pool: ThreadPoolExecutor, work: Callable, items: Iterable, ahead: int) -> Iterator:
    """The results of `work` on `items` in their order, at most `ahead` of them computed before they are asked for."""
    pending = deque()
    for item in items:
        pending.append(pool.submit(work, item))
        if len(pending) == ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
