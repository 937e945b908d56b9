"""Rows of the accuracy benchmark in several processes at a time, spread over the GPUs.

Small models leave a GPU waiting for Python most of the time. Each process loads model and texts once and does one
calibration after the other; each row goes to the process that owns the results file as soon as it is measured.
"""

import argparse
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from queue import Empty

import torch

from benchmarks.accuracy_run import AccuracyRun
from benchmarks.accuracy_settings import Job
from benchmarks.results_file import Results, Row, SentResults

_WAIT = 0.2  # seconds between two looks at what ended

_run: AccuracyRun | None = None  # of this process


def rows_of(options: argparse.Namespace, jobs: list[Job], results: Results) -> Iterator[Row]:
    """Measures `jobs` in `options.processes` processes; yields each row as it comes.

    Args:
        jobs: in the order of beginning.
        results: what is held already; rows in it are not measured again.

    Raises:
        BrokenProcessPool: a process died, killed for its memory perhaps; what was yielded is not lost.
    """
    context = get_context("spawn")  # CUDA does not survive a fork
    places, rows = context.Queue(), context.Queue()
    for place in range(options.processes):
        places.put(place)
    held = Results(**vars(results) | {"rows": list(results.rows)})
    with ProcessPoolExecutor(options.processes, context, _begin, (places, rows, options, jobs, held)) as pool:
        running = [pool.submit(_do, job) for job in jobs]
        ended = False
        while True:
            try:
                yield rows.get(timeout=_WAIT)
            except Empty:
                if ended:
                    break
                ended = all(future.done() for future in running)  # a last row may be on its way: look once more
        for future in running:
            future.result()


def _begin(places, rows, options: argparse.Namespace, jobs: list[Job], held: Results) -> None:
    global _run
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // options.processes))
    if torch.device(options.device).type == "cuda":
        torch.cuda.set_device(places.get() % torch.cuda.device_count())
    _run = AccuracyRun(options, jobs, SentResults(held, rows))


def _do(job: Job) -> None:
    _run.run_job(job)
