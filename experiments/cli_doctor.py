"""`disagg doctor`: prints what the runtime finds out about this machine."""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:
    from ..runtime.doctor import Diagnosis


def examine(*, quick: bool, as_json: bool) -> int:
    """Print the diagnosis and return the exit code: 0, or 3 where nothing can run on hardware."""
    try:
        from ..runtime.doctor import diagnose
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "mpi4py", "safetensors"):
            raise
        raise ConfigError(f"disagg doctor needs {error.name}: pip install 'disagg[runtime]'") from None
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        diagnosis = diagnose(quick=quick)
    if as_json:
        import msgspec

        plain = msgspec.to_builtins(diagnosis)
        for values, row in zip(plain["paths"], diagnosis.paths, strict=True):
            values["ratio"] = row.ratio
        plain["exit_code"] = diagnosis.exit_code
        print(msgspec.json.format(msgspec.json.encode(plain), indent=2).decode())
    else:
        _show(diagnosis)
    return diagnosis.exit_code


def _show(diagnosis: Diagnosis) -> None:
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    console.width = max(console.width, 120)
    facts = diagnosis.facts
    about = _table("this machine", ["what", "found"])
    for what, found in _about(diagnosis):
        about.add_row(what, escape(found))
    console.print(about)
    if facts.gpus:
        gpus = _table("GPUs", ["device", "name", "memory, free of total GiB", "reads", "NVLink GB/s", "PCIe GB/s"])
        for gpu in facts.gpus:
            memory = f"{gpu.free_bytes / 2**30:.1f} of {gpu.total_bytes / 2**30:.1f}"
            peers = ", ".join(f"cuda:{peer}" for peer in gpu.peers) or "no other"
            pcie = f"{_number(gpu.pcie_gb_per_s)} {gpu.pcie}".strip()
            gpus.add_row(f"cuda:{gpu.index}", escape(gpu.name), memory, peers, _number(gpu.nvlink_gb_per_s), pcie)
        console.print(gpus)
    transports = _table(
        "KV transports (cluster.cache_transceiver.backend)", ["device", "backend", "works here", "why not"]
    )
    for row in diagnosis.transports:
        transports.add_row(row.device, row.backend, "no" if row.problem else "yes", escape(row.problem or ""))
    console.print(transports)
    if diagnosis.paths:
        paths = _table("paths", ["path", "measured", "should give", "unit", "ratio", "by"])
        for path in diagnosis.paths:
            words = path.expected_from if path.problem is None else path.problem
            numbers = [_number(path.measured), _number(path.expected), path.unit, _number(path.ratio)]
            paths.add_row(path.name, *numbers, escape(words))
        console.print(paths)
    for advice in diagnosis.advice:
        console.print(
            f"{'PROBLEM' if advice.is_fatal else 'note'}: {escape(advice.text)}\n  -> {escape(advice.remedy)}"
        )
    if not diagnosis.advice:
        console.print("nothing is wrong")


def _about(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    facts = diagnosis.facts
    rows = [("Python", facts.python), ("platform", facts.platform)]
    rows += sorted(facts.versions.items())
    rows.append(("mpiexec", facts.mpiexec or "none"))
    rows.append(("MPI", facts.mpi_version or "unknown"))
    rows.append(("MPI_THREAD_MULTIPLE", _yes(facts.mpi_threads)))
    rows.append(("ULFM (a dead rank is survived)", _yes(facts.mpi_fault_tolerant)))
    rows.append(("MPI components", ", ".join(facts.mpi_components) or "unknown"))
    rows.append(("UCX", f"{facts.ucx_version} ({facts.ucx_source})" if facts.ucx_version else "none"))
    rows.append(("CUDA of torch", facts.torch_cuda or "none"))
    rows.append(("driver", facts.driver or "none"))
    if facts.cuda_problem is not None:
        rows.append(("GPUs", f"none: {facts.cuda_problem}"))
    if facts.sums is not None:
        rows.append(("tensor-parallel ranks sum", facts.sums))
    rows += sorted(facts.settings.items())
    return rows


def _table(title: str, columns: list[str]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def _yes(value: bool | None) -> str:
    return "unknown" if value is None else "yes" if value else "no"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
