"""How long a training step takes with something added, relative to one without.

Both take turns in one process, so that whatever else the machine does meets both; counted is the
processor's time of this process, which waits for nobody.
"""

import statistics
import time
from collections.abc import Callable

__all__ = ["relative_time"]


def relative_time(changed: Callable[[], object], plain: Callable[[], object], turns: int) -> float:
    """Give the median over turns of the first one's time over that of the second.

    Args:
        changed: What is timed.
        plain: What it is held against.
        turns: How often, after one turn that does not count.
    """
    ratios = []
    for turn in range(turns + 1):
        # Who is first takes turns too.
        pair = (changed, plain) if turn % 2 else (plain, changed)
        seconds = {step: _seconds(step) for step in pair}
        ratios.append(seconds[changed] / seconds[plain])
    return statistics.median(ratios[1:])


def _seconds(step: Callable[[], object]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start
