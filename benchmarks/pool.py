"""Several things at once, in processes that threads wait for, until all are done or one of them ends it all."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager


@contextmanager
def at_once(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool that begins nothing more once the block has raised, Ctrl-C included; what runs then is waited for."""
    with ThreadPoolExecutor(workers) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
