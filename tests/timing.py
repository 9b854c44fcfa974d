"""How long a call takes at its best, for the tests that a reader of hostile text is linear."""

import gc
import time
from collections.abc import Callable


def cpu_seconds(call: Callable[[], object], bound: float, tries: int = 3) -> float:
    """CPU seconds of this thread in `call`: the first that is under `bound`, else the least of `tries`.

    One measurement tells of more than the code: a full garbage collection of a process that holds torch and a thousand
    tests falls into it, and a machine whose cores are shared has doubled it. What is quadratic is late every time.
    """
    best = float("inf")
    for again in range(tries):
        if again:
            gc.collect()
        began = time.thread_time()
        call()
        best = min(best, time.thread_time() - began)
        if best < bound:
            break
    return best
