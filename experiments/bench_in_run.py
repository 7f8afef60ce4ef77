"""The engine's rows inside a real run: two small experiments, and the steps in their tables that a row is about."""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .cli_run import run_file
from .errors import ExperimentError
from .event_files import read_step_ends

if TYPE_CHECKING:
    from ..runtime.bench_rows import BenchRow

DECODE_FILE: Final = Path(__file__).with_name("bench_decode.yaml")
PREFILL_FILE: Final = Path(__file__).with_name("bench_prefill.yaml")
SLACK: Final = 64  # tokens by which the mean context of a step may differ from a row's
_LIMIT_S: Final = 150.0
_PS_PER_S: Final = 1e12


def in_run_steps(
    batches: Sequence[int],
    prompts: Sequence[tuple[int, int]],
    context: int,
    overrides: Sequence[str] = (),
    output: Path | None = None,
) -> dict[str, list[float]]:
    """Seconds of each step of a kind by the name of its row: decodes by `batches`, prefills by (prompts, tokens of each).

    Starts one world for the decodes and one for the prefills; their run directories are left in `output`, if it is given.
    Raises ExperimentError if a run fails.
    """
    with tempfile.TemporaryDirectory(prefix="disagg-in-run-") as name:
        folder = Path(name) if output is None else output
        found: dict[str, list[float]] = {}
        if batches:
            run_dir = _run(DECODE_FILE, overrides, folder / "decode")
            for batch in batches:
                found[decode_name(batch, context)] = decode_steps(run_dir, batch, context)
        if prompts:
            run_dir = _run(PREFILL_FILE, overrides, folder / "prefill")
            for count, tokens in prompts:
                found[prefill_name(count, tokens)] = prefill_steps(run_dir, count, tokens)
        return found


def _run(file: Path, overrides: Sequence[str], output: Path) -> Path:
    code = run_file(file, overrides=overrides, backend="hardware", output=output, overwrite=True, timeout_s=_LIMIT_S)
    if code:
        problem = ExperimentError(f"{file.name}: the run that the engine's rows are taken from failed")
        problem.exit_code = code
        raise problem
    return output


def decode_name(batch: int, context: int) -> str:
    """The name of that row of `disagg bench engine`, on one rank."""
    return f"decode step, batch {batch}, context {context}"


def prefill_name(prompts: int, tokens: int) -> str:
    return f"prefill, {prompts} × {tokens} tokens"


def decode_steps(run_dir: Path, batch: int, context: int, slack: int = SLACK) -> list[float]:
    """Seconds from one step's report to the next, of steps of exactly `batch` decodes about `context` tokens long.

    Steps follow each other within one epoch, so none holds a chunk and none a change of the batch.
    """
    ends = read_step_ends(run_dir)
    found: list[float] = []
    for epoch in _epochs(run_dir):
        if epoch["num_decodes"] != batch or epoch["num_chunks"]:
            continue
        at = ends.get((epoch["executor"], epoch["epoch"]), [])
        start = epoch["num_kv_tokens"] / batch
        found += [
            (then - now) / _PS_PER_S
            for step, (now, then) in enumerate(itertools.pairwise(at), start=1)
            if abs(start + step - context) <= slack
        ]
    return found


def prefill_steps(run_dir: Path, prompts: int, tokens: int) -> list[float]:
    """Seconds of the steps that compute exactly so many whole prompts and nothing else, from their grant to their report."""
    return [
        epoch["end_s"] - epoch["start_s"]
        for epoch in _epochs(run_dir)
        if not epoch["num_decodes"]
        and epoch["num_steps"] == 1
        and (epoch["num_chunks"], epoch["num_chunk_tokens"]) == (prompts, prompts * tokens)
        and not epoch["num_cached_tokens"]
    ]


def _epochs(run_dir: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    yield from pq.read_table(run_dir / "steps.parquet").to_pylist()


def with_in_run_rows(rows: Sequence[BenchRow], steps: dict[str, list[float]], tp: int = 1) -> list[BenchRow]:
    """`rows`, each that was also measured in a run followed by what came out there, beside the same floor."""
    from ..runtime.bench_rows import BenchRow

    found: list[BenchRow] = []
    suffix = f", tp {tp}" if tp > 1 else ""
    for row in rows:
        found.append(row)
        seconds = steps.get(row.name.removesuffix(suffix))
        if not seconds:
            continue
        measured = statistics.median(seconds) * 1e3
        at_most = row.name.startswith("decode")
        ratio = None if row.ceiling is None else (measured / row.ceiling if at_most else row.ceiling / measured)
        met = None if ratio is None or row.goal is None else (ratio <= row.goal if at_most else ratio >= row.goal)
        note = f"median of {len(seconds)} steps; {measured / row.measured:.3f} × the step alone"
        found.append(BenchRow(f"{row.name}, in a run", measured, row.ceiling, ratio, row.goal, met, "ms", note))
    return found
