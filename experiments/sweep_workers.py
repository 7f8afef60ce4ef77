"""Where the tasks of a sweep or a search run: one `concurrent.futures` executor, whoever starts its processes.

A task is a function of this package, named by reference, and one JSON text; its result is a JSON text. Nothing else goes
between processes, so that it does not matter which of them computes a task, nor on which machine.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import wait as wait_for_connection
from types import FrameType, TracebackType
from typing import Any, Final, Protocol

from .errors import EXIT_INTERRUPTED, ConfigError, ResourceError

EXECUTORS: Final = ("processes", "mpi", "dask")
Task = Callable[[str], str]
_GRACE_S: Final = 10.0  # for a task that is told to end, to leave nothing half-written
_ENDED_BY_SIGNAL: Final = 128 + signal.SIGTERM
_SET_BY_MPIEXEC: Final = ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_SIZE")  # one of them, by every launcher


class WorkerDied(Exception):
    """The process that computed a task is gone without an answer: killed, out of memory, or crashed in native code."""


class Pool(Protocol):
    """An executor of so many workers. `restarted` gives another one after a worker's death, None where there is none."""

    executor: Executor
    num_workers: int
    num_in_flight: int  # tasks to hand out at once

    def restarted(self) -> Pool | None: ...

    def stop(self, *, interrupted: bool = False) -> None:
        """End what runs, now."""
        ...

    def close(self) -> None: ...


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def open_pool(kind: str, num_workers: int) -> Iterator[Pool | None]:
    """A pool of `kind` (one of EXECUTORS); 1 of `processes` is this process itself. None for a rank that has served.

    With `mpi` the world says how many there are, with `dask` and a scheduler its workers do. Left by an exception, it
    ends what still runs. Raises ConfigError for a library that is missing, ResourceError for a world of one rank.
    """
    if kind == "processes":
        pool: Pool = _Inline() if num_workers == 1 else _Processes(num_workers)
        with _stopping(pool):
            yield pool
    elif kind == "mpi":
        with _mpi_executor() as found:
            if found is None:
                yield None
                return
            with _stopping(_Mpi(*found)) as pool:
                yield pool
    elif kind == "dask":
        with _dask_client(num_workers) as client, _stopping(_Dask(client)) as pool:
            yield pool
    else:
        raise ConfigError(f"--executor {kind}: must be one of {', '.join(EXECUTORS)}")


class _stopping(AbstractContextManager[Pool]):
    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def __enter__(self) -> Pool:
        return self._pool

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None or kind is GeneratorExit:
            self._pool.close()
        else:
            self._pool.stop(interrupted=isinstance(error, KeyboardInterrupt))


# ---- handing tasks out ----------------------------------------------------------------------------------------------


def completed(pool: Pool, task: Task, texts: Sequence[str]) -> Iterator[tuple[int, str | Exception]]:
    """(number of the text, result) as they come; an exception instead of a result is that of the task or WorkerDied.

    When a worker dies, those that it may have died of are computed again one by one: it is told of one task, the others
    finish. Every number comes exactly once: where no worker is left, WorkerDied comes for all that are not computed.
    """
    waiting = deque(range(len(texts)))
    suspects: deque[int] = deque()
    running: dict[Future[str], int] = {}
    is_fresh = False  # restarted, and given nothing since
    try:
        while waiting or suspects or running:
            alone = bool(suspects)
            queue, room = (suspects, 1) if alone else (waiting, pool.num_in_flight)
            broken: list[int] = []
            is_refused = False
            while queue and len(running) < room and not is_refused:
                try:
                    future = pool.executor.submit(_call, task, texts[queue[0]])
                except BrokenExecutor:  # a worker died before: of a task that runs, or idle, but not of this one
                    is_refused = True
                else:
                    running[future] = queue.popleft()
                    is_fresh = False
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                number = running.pop(future)
                try:
                    yield number, future.result()
                except BrokenExecutor:
                    broken.append(number)
                except Exception as error:
                    yield number, error
            if broken or is_refused:
                broken += running.values()
                running.clear()
                following = None if is_refused and is_fresh else pool.restarted()  # not for ever
                is_fresh = True
                if following is None or (len(broken) == 1 and not is_refused):
                    for number in broken:
                        yield number, WorkerDied("its process died (killed, out of memory, or a crash in native code)")
                else:
                    suspects.extend(sorted(broken))
                if following is None:
                    for number in (*suspects, *waiting):
                        yield number, WorkerDied("not computed: a process died, and no other can take its place")
                    return
    finally:
        for future in running:
            future.cancel()


# ---- inside a worker ------------------------------------------------------------------------------------------------


class _Ended(BaseException):
    """The task must leave now; no `except Exception` may keep it."""


class _State:
    is_busy = False


def _call(task: Task, text: str) -> str:
    """What every executor calls."""
    _State.is_busy = True
    try:
        return task(text)
    except _Ended:  # all that the task held is given back by now
        os._exit(_ENDED_BY_SIGNAL)
    finally:
        _State.is_busy = False


def _begin_worker(stop: Any) -> None:
    """In a local worker: a terminal's Ctrl-C is the parent's affair, and without the parent there is nothing to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_task)
    threading.Thread(target=_watch, args=(stop,), daemon=True).start()


def _watch(stop: Any) -> None:
    """End this process when the parent says so by closing `stop`, or is gone."""
    parent = multiprocessing.parent_process()
    wait_for_connection([stop] if parent is None else [stop, parent.sentinel])
    if _State.is_busy:
        os.kill(os.getpid(), signal.SIGTERM)
    until = time.monotonic() + _GRACE_S
    while _State.is_busy and time.monotonic() < until:
        time.sleep(0.01)
    os._exit(_ENDED_BY_SIGNAL)


def _end_task(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not disturb the first one's tidying up
    if _State.is_busy:
        raise _Ended
    os._exit(_ENDED_BY_SIGNAL)


# ---- the pools ------------------------------------------------------------------------------------------------------


class _InlineExecutor(Executor):
    """Computes in the calling process, while it is asked."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class _Inline:
    num_workers = 1
    num_in_flight = 1

    def __init__(self) -> None:
        self.executor: Executor = _InlineExecutor()

    def restarted(self) -> Pool | None:
        return None

    def stop(self, *, interrupted: bool = False) -> None:
        pass

    def close(self) -> None:
        pass


class _Processes:
    """Spawned, never forked: a fork would copy threads' locks, and MPI or CUDA if the caller has them."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self.num_in_flight = num_workers  # no more, so that few are suspects when one dies
        self._context = multiprocessing.get_context("spawn")
        self._others = set(multiprocessing.active_children())
        self._start()

    def _start(self) -> None:
        told, self._stop = self._context.Pipe(duplex=False)
        self._told = told  # kept open for the workers that are started later
        self.executor: Executor = ProcessPoolExecutor(
            self.num_workers, mp_context=self._context, initializer=_begin_worker, initargs=(told,)
        )

    def restarted(self) -> Pool | None:
        self.stop()
        self._start()
        return self

    def stop(self, *, interrupted: bool = False) -> None:
        self._stop.close()
        self.executor.shutdown(wait=False, cancel_futures=True)
        until = time.monotonic() + _GRACE_S
        while (left := set(multiprocessing.active_children()) - self._others) and time.monotonic() < until:
            time.sleep(0.02)
        for process in left:
            process.kill()
        self._told.close()

    def close(self) -> None:
        self.executor.shutdown()  # before the pipe: its end would end the workers
        self._stop.close()
        self._told.close()


class _Mpi:
    """Ranks 1 … n − 1 of the world that this process is rank 0 of, through `mpi4py.futures`."""

    def __init__(self, executor: Executor, comm: Any) -> None:
        self.executor = executor
        self.num_workers = comm.Get_size() - 1
        self.num_in_flight = 2 * self.num_workers
        self._comm = comm

    def restarted(self) -> Pool | None:
        return None

    def stop(self, *, interrupted: bool = False) -> None:
        if interrupted:
            self._comm.Abort(EXIT_INTERRUPTED)  # a rank that computes hears nothing else
        self.executor.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        self.executor.shutdown()


@contextmanager
def _mpi_executor() -> Iterator[tuple[Any, Any] | None]:
    too_small = ResourceError(
        "--executor mpi needs an MPI world of at least 2 ranks, of which rank 0 hands out: mpiexec -n 5 disagg …"
    )
    if not any(name in os.environ for name in _SET_BY_MPIEXEC):
        raise too_small  # before the import: it would initialise MPI for one process, and leave its shared memory behind
    from ..runtime.mpi_world import quick_start

    quick_start()
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor
    except ImportError as error:
        raise ConfigError(f"--executor mpi needs mpi4py ({error}): pip install 'disagg[runtime]'") from None
    comm = MPI.COMM_WORLD
    if comm.Get_size() < 2:
        raise too_small
    with MPICommExecutor(comm, root=0, main=False) as executor:
        yield None if executor is None else (executor, comm)


class _Dask:
    """The workers of a Dask cluster. Dask itself gives a dead worker's task to another one, three times."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.executor: Executor = client.get_executor(pure=False)
        self.num_workers = max(1, sum(client.ncores().values()))
        self.num_in_flight = 2 * self.num_workers

    def restarted(self) -> Pool | None:
        return None

    def stop(self, *, interrupted: bool = False) -> None:
        self.executor.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        self.executor.shutdown()


@contextmanager
def _dask_client(num_workers: int) -> Iterator[Any]:
    """A client of the scheduler in DASK_SCHEDULER_ADDRESS; without one, of `num_workers` processes of this machine."""
    try:
        from distributed import Client, LocalCluster
    except ImportError:
        raise ConfigError("--executor dask needs Dask: pip install 'disagg[dask]'") from None
    address = os.environ.get("DASK_SCHEDULER_ADDRESS")
    if address:
        try:
            client = Client(address)
        except OSError as error:
            raise ResourceError(f"--executor dask: no scheduler at DASK_SCHEDULER_ADDRESS={address}: {error}") from None
        with client:
            yield client
        return
    with (
        LocalCluster(n_workers=num_workers, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        yield client
