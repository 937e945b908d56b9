"""Rows of the accuracy benchmark in several processes at a time, spread over the GPUs.

Small models leave a GPU waiting for Python most of the time. Each process loads model and texts once and does one
calibration after the other; the rows come back to the process that owns the results file.
"""

import argparse
import os
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context

import torch

from benchmarks.accuracy_run import AccuracyRun
from benchmarks.accuracy_settings import Job
from benchmarks.results_file import MemoryResults, Results, Row

_run: AccuracyRun | None = None  # of this process


def rows_of(
    options: argparse.Namespace, jobs: list[Job], results: Results, processes: int
) -> Iterator[tuple[Job, list[Row], int]]:
    """Measures `jobs`; yields each with its new rows and how many of them failed, as they come.

    Args:
        results: what is held already; rows in it are not measured again.
        processes: at a time, on all GPUs together; the order of `jobs` is the order of beginning.

    Raises:
        BrokenProcessPool: a process died, killed for its memory perhaps; what was yielded is not lost.
    """
    context = get_context("spawn")  # CUDA does not survive a fork
    places = context.Queue()
    for place in range(processes):
        places.put(place)
    begin = (places, processes, options, jobs, results)
    with ProcessPoolExecutor(processes, context, _begin, begin) as pool:
        running: dict[Future, Job] = {pool.submit(_do, job): job for job in jobs}
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), *future.result()


def _begin(places, processes: int, options: argparse.Namespace, jobs: list[Job], results: Results) -> None:
    global _run
    place = places.get()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    if torch.device(options.device).type == "cuda":
        torch.cuda.set_device(place % torch.cuda.device_count())
    _run = AccuracyRun(options, jobs, MemoryResults(results))


def _do(job: Job) -> tuple[list[Row], int]:
    held, failures = len(_run.file.results.rows), _run.failures
    _run.run_job(job)
    return _run.file.results.rows[held:], _run.failures - failures
