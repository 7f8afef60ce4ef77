"""`disagg bench transfer`, `engine`, `overlap` and `idle`: checks their options, prints their rows, writes them to a file."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..core.model_shapes import PRESETS, ModelError
from .errors import ConfigError, ExperimentError, ResourceError, did_you_mean

if TYPE_CHECKING:
    from ..runtime.bench_rows import BenchRow

DEVICES: Final = ("cuda", "cpu")
BACKENDS: Final = ("mpi", "cuda_ipc", "host")
MOST_PROGRAMS: Final = 1 << 20
_RUNTIME: Final = ("torch", "mpi4py", "safetensors", "triton")


def bench_transfer(
    device: str | None, backends: Sequence[str], *, quick: bool, out: Path | None, as_json: bool
) -> None:
    """Raises ConfigError for bad options, ResourceError for what this machine lacks, ExperimentError for a failure."""
    for backend in backends:
        if backend not in BACKENDS:
            raise ConfigError(
                f"--backend {backend}: must be one of {', '.join(BACKENDS)}{did_you_mean(backend, BACKENDS)}"
            )
    _check_out(out)
    chosen = _device(device)
    if chosen == "cpu" and "cuda_ipc" in backends:
        raise ConfigError("--backend cuda_ipc needs --device cuda; allowed on a CPU: mpi, host")
    run = _function("bench_transfer", "run_transfer_bench")
    rows = _measured(lambda: run(device=chosen, backends=list(dict.fromkeys(backends)), quick=quick))
    _tell("KV transfer", rows, out, as_json)


def bench_engine(
    model: str,
    tp: int,
    device: str | None,
    *,
    quick: bool,
    out: Path | None,
    as_json: bool,
    in_run: bool = False,
    reference: bool = False,
    output: Path | None = None,
) -> None:
    """As `bench_transfer`, for the engine; `in_run` and `reference` add rows, of `disagg run` and of transformers."""
    _check_model(model)
    heads = PRESETS[model].num_attention_heads
    if tp < 1 or heads % tp:
        raise ConfigError(f"--tp {tp}: must divide the {heads} attention heads of {model}")
    if output is not None and not in_run:
        raise ConfigError("--output is where --in-run leaves its runs; allowed: both, or neither")
    _check_out(out)
    chosen = _device(device)
    if device is None and chosen != "cuda":
        raise ResourceError("bench engine measures a GPU; torch finds none here")
    if in_run and chosen != "cuda":
        raise ResourceError("--in-run measures a GPU; torch finds none here")
    run = _function("bench_engine", "run_engine_bench")
    # first, while the device is empty: the engine's own process keeps its memory
    steps = _in_run_steps(model, tp, output, as_json) if in_run else {}
    rows = _measured(lambda: run(model=model, tp=tp, device=chosen, quick=quick))
    if steps:
        from .bench_in_run import with_in_run_rows

        rows = with_in_run_rows(rows, steps, tp)
    if reference:
        rows = [*rows, *_reference(model, chosen)]
    _tell(f"engine, {model}, tp {tp}", rows, out, as_json)


def _in_run_steps(model: str, tp: int, output: Path | None, as_json: bool) -> dict[str, list[float]]:
    from ..runtime.bench_engine import CONTEXT, DECODES, PREFILLS
    from .bench_in_run import in_run_steps

    overrides = [f"model.id={model}", f"cluster.mixed_servers.tensor_parallel_size={tp}"]
    prompts = [(count, tokens) for count, tokens, _ in PREFILLS]
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        steps = in_run_steps([batch for batch, _ in DECODES], prompts, CONTEXT, overrides, output)
    for name, found in steps.items():
        if not found:
            print(f"warning: {name}: the run had no such step", file=sys.stderr)
    return steps


def _reference(model: str, device: str) -> list[BenchRow]:
    from ..runtime.bench_reference import ReferenceMissing, run_reference_bench

    _release(device)
    try:
        return run_reference_bench(model, device)
    except ReferenceMissing as error:
        print(f"warning: no reference: {error}", file=sys.stderr)
        return []


def _release(device: str) -> None:
    """Give the device back what the benchmark before held."""
    import gc

    import torch

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def bench_overlap(
    model: str, programs: Sequence[int], device: str | None, *, quick: bool, out: Path | None, as_json: bool
) -> None:
    """As `bench_transfer`, for decode steps while KV arrives."""
    _check_model(model)
    for number in programs:
        if not 1 <= number <= MOST_PROGRAMS:
            raise ConfigError(f"--programs {number}: allowed: 1 to {MOST_PROGRAMS}")
    _check_out(out)
    chosen = _device(device)
    if chosen != "cuda":
        raise ResourceError("bench overlap measures a GPU; torch finds none here")
    run = _function("bench_overlap", "run_overlap_bench")
    more: dict[str, Any] = {"programs": list(dict.fromkeys(programs))} if programs else {}
    rows = _measured(lambda: run(model=model, device=chosen, quick=quick, **more))
    _tell(f"decode while receiving, {model}", rows, out, as_json)


def bench_idle(
    file: Path,
    overrides: Sequence[str],
    after_s: float,
    window_s: float,
    *,
    output: Path | None,
    timeout_s: float | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """As `bench_transfer`, for the time without a kernel in a serving run of `file`."""
    from .bench_idle import measure_idle

    _check_out(out)
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        rows = measure_idle(file, overrides, after_s, window_s, output, timeout_s)
    _tell(f"idle time, {file.name}", rows, out, as_json)


def _check_model(model: str) -> None:
    if model not in PRESETS:
        raise ConfigError(
            f"--model {model}: unknown{did_you_mean(model, PRESETS)} (allowed: {', '.join(sorted(PRESETS))})"
        )


def _check_out(out: Path | None) -> None:
    if out is not None and (out.is_dir() or not out.resolve().parent.is_dir()):
        raise ConfigError(f"--out {out}: {'is a folder' if out.is_dir() else f'there is no folder {out.parent}'}")


def _device(device: str | None) -> str:
    """Raises ConfigError for another word, ResourceError for a device that is not here."""
    if device is not None and device not in DEVICES:
        raise ConfigError(f"--device {device}: must be one of {', '.join(DEVICES)}")
    if device == "cpu":
        return device
    try:
        import torch
    except ModuleNotFoundError:
        raise ConfigError("benchmarks of the runtime need torch: pip install 'disagg[runtime]'") from None
    if torch.cuda.is_available():
        return "cuda"
    if device == "cuda":
        raise ResourceError("--device cuda: torch finds no GPU here; allowed: --device cpu")
    return "cpu"


def _function(module: str, name: str) -> Callable[..., list[BenchRow]]:
    """A benchmark of the runtime, loaded only now."""
    package = __package__.rpartition(".")[0]
    try:
        function: Callable[..., list[BenchRow]] = getattr(import_module(f"{package}.runtime.{module}"), name)
    except ModuleNotFoundError as error:
        if error.name in _RUNTIME:
            raise ConfigError(f"this benchmark needs {error.name}: pip install 'disagg[runtime]'") from None
        if error.name == f"{package}.runtime.{module}":
            raise ResourceError(f"this build of disagg has no runtime.{module}, which does the measuring") from None
        raise
    return function


def _measured(run: Callable[[], list[BenchRow]]) -> list[BenchRow]:
    """What `run` gives; errors of the runtime in the CLI's words."""
    from ..runtime.executor_spec import SpecError
    from ..runtime.hardware_run import HardwareRunError
    from ..runtime.launcher import LaunchError
    from ..runtime.transport import TransportError

    try:
        return run()
    except (SpecError, TransportError, ModelError) as error:
        raise ConfigError(str(error)) from error
    except LaunchError as error:
        raise ResourceError(str(error)) from error
    except HardwareRunError as error:
        problem = ExperimentError(str(error))
        problem.exit_code = error.exit_code
        raise problem from error


def _tell(title: str, rows: Sequence[BenchRow], out: Path | None, as_json: bool) -> None:
    command = shlex.join(["disagg", *sys.argv[1:]])
    date = datetime.now(UTC).isoformat(timespec="seconds")
    plain = [row_columns(row) | {"command": command, "date": date} for row in rows]
    text = json.dumps(plain, indent=2)
    if out is not None:
        partial = out.with_name(f".{out.name}.partial")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(out)
    if as_json:
        print(text)
    else:
        print_rows(title, rows)


def row_columns(row: BenchRow) -> dict[str, Any]:
    """A row as JSON-ready values."""
    names = ("name", "measured", "ceiling", "ratio", "goal", "met", "unit", "note")
    return {name: getattr(row, name) for name in names}


def print_rows(title: str, rows: Sequence[BenchRow]) -> None:
    """One table: what was measured, beside what the hardware can do and what was to be reached."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.width = max(console.width, 160)  # lines that wrap lose nothing, columns that shrink do
    table = Table(title=escape(title), title_justify="left")
    for name in ("name", "floor", "measured", "unit", "ratio", "goal", "met", "note"):
        table.add_column(name, justify="left" if name in ("name", "unit", "note") else "right")
    for row in rows:
        met = "" if row.met is None else ("yes" if row.met else "NO")
        numbers = [_number(row.ceiling), _number(row.measured), escape(row.unit), _number(row.ratio)]
        table.add_row(escape(row.name), *numbers, _number(row.goal), met, escape(str(row.note or "")))
    console.print(table)


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
