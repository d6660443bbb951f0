"""Peak of the memory that a call allocates.

On a GPU it is what torch's allocator counts. On a CPU, counted are all allocations and frees that
torch's CPU allocator reports to ``torch.profiler``, so also buffers within operators and those of
compiled code; to them comes the peak of what numpy allocates, by ``tracemalloc``. The process's
resident memory is not taken: it hangs on what the allocator keeps, and on libraries.
"""

import itertools
import tracemalloc
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_bytes"]


def peak_bytes(function: Callable[[], object], device: str = "cpu") -> int:
    """Most bytes that a call held at once, beyond what was there when it began.

    Memory from before the call whose last use is within it counts to the end of it.
    """
    if device != "cpu":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        # Within, so that what the profiler's own start allocates is not counted.
        tracemalloc.start()
        function()
        numpy_peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    events = found.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    # In the order of time; the sort is stable, so events of one instant keep theirs.
    changes.sort(key=lambda change: change[0])
    held = itertools.accumulate((size for _, size in changes), initial=0)
    return max(held) + numpy_peak
