"""`disagg bench transfer`: how fast KV travels between two ranks, beside a plain copy of the same size in the same run.

KV of the Llama-3.1-8B shape in bf16, 131,072 bytes a token, its pages scattered in both pools. Each transport is measured
in a world of two ranks of its own (two GPUs where there are two, else both on one).
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

from .bench_rows import BenchRow
from .bench_transfer_marks import Step
from .launcher import LaunchError, launch
from .transport import TransportError
from .transport_facts import TransportFacts, gather_facts, transport_problem
from .transport_world import WorldNeeds, over_ucx

RESULT: Final = "result.json"
JOB: Final = "job.json"
VARIANTS: Final = ("same", "relayout")
_GOALS: Final = {("same", "cuda_ipc"): 0.93, ("same", "mpi"): 0.80, ("relayout", "cuda_ipc"): 0.88}
_REQUEST_TOKENS: Final = 1024
_TIMEOUT_S: Final = 300.0


class TransferJob(Struct, frozen=True):
    """What a world of the benchmark measures. `sizes` in tokens; `layer_interval_s`: pace of the layer-wise prefill."""

    backend: str
    device: str
    variant: str
    sizes: tuple[int, ...]
    layerwise_tokens: int
    num_devices: int = 1
    repeats: int = 7
    layer_interval_s: float = 0.003


class Measured(Struct, frozen=True):
    """What a world found. `name` as in `rows_of`; seconds and bytes."""

    name: str
    num_tokens: int
    num_bytes: int
    seconds: float
    plain_seconds: float  # of a plain copy of as many bytes
    left_bytes: int = 0
    blocking_seconds: float = 0.0
    data_seconds: float = 0.0  # of `seconds`: from the first work on pages to the last byte seen in place
    steps: tuple[Step, ...] = ()


class TransferResult(Struct, frozen=True):
    job: TransferJob
    description: str
    plain_text: str
    measured: tuple[Measured, ...]


def run_transfer_bench(device: str, backends: Sequence[str], quick: bool = False) -> list[BenchRow]:
    """Rows of the transports in `backends` (none: all that work here). Raises TransportError or LaunchError."""
    facts = gather_facts()
    chosen = list(backends) or [
        name
        for name in ("cuda_ipc", "mpi", "host")
        if transport_problem(name, facts, device) is None and not (device == "cpu" and name == "host")
    ]
    rows: list[BenchRow] = []
    for backend in chosen:
        problem = transport_problem(backend, facts, device)
        if problem is not None:
            raise TransportError(f"{backend}: {problem}")
        for variant in VARIANTS:
            rows += rows_of(_in_world(_job(backend, device, variant, facts, quick)))
    return rows


def _job(backend: str, device: str, variant: str, facts: TransportFacts, quick: bool) -> TransferJob:
    if variant == "relayout":
        sizes: tuple[int, ...] = (_REQUEST_TOKENS,)
    elif quick:
        sizes = (64, _REQUEST_TOKENS)
    else:
        sizes = (64, 256, _REQUEST_TOKENS, 4096, 8192) if device == "cuda" else (64, 256, _REQUEST_TOKENS)
    layerwise = 0 if variant == "relayout" else 4096 if device == "cuda" else _REQUEST_TOKENS
    return TransferJob(
        backend, device, variant, sizes, layerwise, facts.num_devices, 3 if quick else 31 if device == "cuda" else 9
    )


def _in_world(job: TransferJob) -> TransferResult:
    needs = over_ucx() if job.device == "cuda" and job.backend == "mpi" else WorldNeeds()
    with tempfile.TemporaryDirectory(prefix="disagg-bench-") as name:
        (Path(name) / JOB).write_bytes(msgspec.json.encode(job))
        code = launch(
            f"{__package__}.bench_transfer_main",
            [name],
            2,
            pml=needs.pml,
            fault_tolerant=needs.fault_tolerant,
            env=needs.env,
            timeout_s=_TIMEOUT_S,
        )
        try:
            found = (Path(name) / RESULT).read_bytes()
        except OSError:
            raise LaunchError(f"the benchmark of {job.backend} left no result; its exit code was {code}") from None
        return msgspec.json.decode(found, type=TransferResult)


def rows_of(result: TransferResult) -> list[BenchRow]:
    """The table of one world. Rates count the bytes that cross between the ranks, in 1e9 bytes a second."""
    job = result.job
    rows = []
    for item in result.measured:
        tokens = f"{item.num_tokens:,} tokens"
        rate, ceiling = item.num_bytes / item.seconds / 1e9, item.num_bytes / item.plain_seconds / 1e9
        ratio: float | None = rate / ceiling
        judged = job.device == "cuda" and item.num_tokens == _REQUEST_TOKENS and item.name in ("copy", "transfer")
        goal = _GOALS.get((job.variant, job.backend)) if judged else None
        note = f"{item.seconds * 1e6:,.0f} µs; ceiling: {result.plain_text}"
        if item.name == "layer-wise":
            share = item.left_bytes / item.num_bytes
            after = item.seconds / item.blocking_seconds
            text = f"{job.backend}, layer-wise, {tokens}"
            note = f"of {item.num_bytes / 1e6:,.0f} MB, a layer every {job.layer_interval_s * 1e3:g} ms"
            name = f"{text}: left at the end"
            rows.append(_at_most(BenchRow(name, item.left_bytes / 1e6, None, share, 0.10, None, "MB", note), job))
            control = 1e6 * max(0.0, item.seconds - item.data_seconds)
            note = f"beside the blocking transfer; both with their control messages, {control:,.0f} µs of this one"
            name = f"{text}: time after it"
            blocking = item.blocking_seconds * 1e3
            rows.append(_at_most(BenchRow(name, item.seconds * 1e3, blocking, after, 0.25, None, "ms", note), job))
            continue
        kind = {
            "plain": "one plain copy, from the host's call to its end seen by the host",
            "copy": "copy alone",
            "batch": "copy alone, by copy engines",
            "transfer": "transfer",
            "asked first": "transfer, the reader asked before it was sent",
            "both ways": "both ways at once, each",
            "many": "8 in flight",
        }[item.name]
        layout = ", heads re-laid out" if job.variant == "relayout" else ""
        met = None if goal is None or ratio is None else ratio >= goal
        text = f"{job.backend}, {tokens}{layout}"
        rows.append(BenchRow(f"{text}: {kind}", rate, ceiling, ratio, goal, met, "GB/s", note))
        if item.data_seconds:
            rows += _parts(item, text + (", asked first" if item.name == "asked first" else ""), goal)
    return rows


def _parts(item: Measured, text: str, goal: float | None) -> list[BenchRow]:
    """What a whole transfer consists of: its data path by itself, the rest, and when what happened."""
    rate, ceiling = item.num_bytes / item.data_seconds / 1e9, item.num_bytes / item.plain_seconds / 1e9
    ratio = rate / ceiling
    met = None if goal is None else ratio >= goal
    note = (
        f"{item.data_seconds * 1e6:,.0f} µs, from the first work on pages at either end to the last byte seen in place"
    )
    data = BenchRow(f"{text}: data path alone, without control messages", rate, ceiling, ratio, goal, met, "GB/s", note)
    control = 1e6 * (item.seconds - item.data_seconds)
    rows = [data, BenchRow(f"{text}: control messages", control, unit="µs", note="transfer less data path")]
    for step in item.steps:
        rows.append(
            BenchRow(f"{text}: {step.who}, {step.what}", step.seconds * 1e6, unit="µs", note="since both were called")
        )
    return rows


def _at_most(row: BenchRow, job: TransferJob) -> BenchRow:
    """The row with its goal judged, which is one of GPUs."""
    if job.device != "cuda" or row.ratio is None or row.goal is None:
        return msgspec.structs.replace(row, goal=None)
    return msgspec.structs.replace(row, met=row.ratio <= row.goal)
