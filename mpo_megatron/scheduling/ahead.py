"""Work that is done in a thread ahead of the place where its result is needed."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
# What the thread's name begins with.
THREAD = "mpo-ahead"


def made_ahead(
    make: Callable[[Item], Result],
    items: Iterable[Item],
    ahead: int,
    start_thread: Callable[[], None] = lambda: None,
) -> Generator[Result]:
    """`make(item)` of each item, in order, made in one thread while the caller works with those before.

    An error of `make` is raised where its result would be. The thread ends with the last item, and when the generator
    is closed: what it is making is then made to the end, and no more begun.

    Args:
        ahead: at most so many results are made, or being made, beyond the one that the caller has; 0: each is made by
            the caller when it is asked for.
        start_thread: called first in the thread.
    """
    if not ahead:
        yield from map(make, items)
        return
    remaining = iter(items)
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=THREAD, initializer=start_thread)
    try:
        begun: deque[Future[Result]] = deque(thread.submit(make, item) for item in islice(remaining, ahead))
        while begun:
            result = begun.popleft().result()
            begun.extend(thread.submit(make, item) for item in islice(remaining, 1))
            yield result
            del result
    finally:
        thread.shutdown(cancel_futures=True)
