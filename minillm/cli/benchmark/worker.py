"""One side of the benchmark, in a process of its own.

``python -m minillm.cli.benchmark.worker FAMILY CASE SIDE THREADS`` reads a number of steps per line from
standard input, takes one untimed step and that many timed ones, and answers with one line of JSON. Between two
lines it waits, so that the sides take turns and never run at once.
"""

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable

from minillm.cli.benchmark.table import FAMILIES


def resident_mib() -> float:
    """The largest memory this process has held, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 if sys.platform != "darwin" else 1024 * 1024)


def measure(step: Callable[[], float], n: int) -> dict:
    """One untimed step, then n timed ones: their median, and the value the last one returned."""
    value = step()
    times = []
    for _ in range(n):
        start = time.perf_counter()
        value = step()
        times.append(time.perf_counter() - start)
    return {"seconds": statistics.median(times), "value": value}


def main(family: str, case: str, side: str, threads: str) -> None:
    """Answer requests until standard input ends."""
    chosen = FAMILIES[family]
    with chosen.sides[side](chosen.cases[case], int(threads)) as step:
        loaded = resident_mib()
        for line in sys.stdin:
            answer = measure(step, int(line))
            print(json.dumps(answer | {"step_mib": max(0.0, resident_mib() - loaded)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
