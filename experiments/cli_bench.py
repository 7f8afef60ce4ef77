"""`disagg bench …`: the options of its commands. Each does its work in a module loaded when called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_format import Format, Json, wants_json

bench_app = typer.Typer(
    name="bench",
    help="Benchmarks: of a cluster, of the engine, of the KV transfer, of the two at once, of a GPU's idle time.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Quick = Annotated[bool, typer.Option("--quick", help="Fewer sizes and repetitions.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="FILE.json", help="Write the rows there, too.")]
PER_INSTANCE = "One value, or one for each instance, with commas."


@bench_app.command()
def cluster(
    file: Annotated[Path, typer.Argument(help="Experiment file (YAML).", show_default=False)],
    backend: Annotated[str, typer.Option(help="hardware or simulation.")] = "hardware",
    host: Annotated[str | None, typer.Option(metavar="A:4,B:4", help="Hosts, and ranks of executors on each.")] = None,
    hostfile: Annotated[Path | None, typer.Option(help="The same as lines `NAME slots=N`.")] = None,
    launch_agent: Annotated[
        str | None, typer.Option(help="Instead of ssh: called as AGENT HOST COMMAND… to start what runs on a host.")
    ] = None,
    request_rate: Annotated[float | None, typer.Option(metavar="RATE", help="Requests a second.")] = None,
    concurrency: Annotated[int | None, typer.Option(metavar="N", help="Closed loop of N requests.")] = None,
    poisson_delays: Annotated[
        bool | None, typer.Option("--poisson-delays/--no-poisson-delays", help="Off: constant gaps. [default: on]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of arrivals, lengths and tokens.")] = None,
    streaming: Annotated[bool | None, typer.Option("--streaming/--no-streaming", help="[default: on]")] = None,
    warm_up: Annotated[int, typer.Option(metavar="N", help="Requests over every pair of executors first.")] = 1,
    max_samples: Annotated[int | None, typer.Option(metavar="N", help="Measured requests at most.")] = None,
    max_prompt_length: Annotated[int | None, typer.Option(metavar="TOKENS", help="Longer prompts are cut.")] = None,
    eos_id: Annotated[int | None, typer.Option(metavar="ID", help="Token that ends an output; -1: none.")] = None,
    max_batch_size: Annotated[str | None, typer.Option(metavar="N[,N…]", help=PER_INSTANCE)] = None,
    max_num_tokens: Annotated[str | None, typer.Option(metavar="N[,N…]", help="Of a step. " + PER_INSTANCE)] = None,
    kv_fraction: Annotated[
        str | None, typer.Option(metavar="SHARE[,…]", help="KV share of the memory left. " + PER_INSTANCE)
    ] = None,
    kv_max_tokens: Annotated[
        str | None, typer.Option(metavar="N[,N…]", help="KV tokens instead. " + PER_INSTANCE)
    ] = None,
    kv_reuse: Annotated[bool | None, typer.Option("--kv-reuse/--no-kv-reuse", help="Reuse of prefix blocks.")] = None,
    chunked_context: Annotated[str | None, typer.Option(metavar="true|false[,…]", help=PER_INSTANCE)] = None,
    scheduler_policy: Annotated[str | None, typer.Option(help="guaranteed_no_evict or max_utilization.")] = None,
    dataset: Annotated[Path | None, typer.Option(help="A trace or data set instead of the file's.")] = None,
    dataset_type: Annotated[str | None, typer.Option(help="azure, mooncake or tensorrt_llm.")] = None,
    output_csv: Annotated[Path | None, typer.Option(help="One row under disaggServerBenchmark's names.")] = None,
    iteration_stats: Annotated[
        bool, typer.Option("--iteration-stats/--no-iteration-stats", help="Also a table of the executors' steps.")
    ] = False,
    kv_transfer_time: Annotated[
        bool, typer.Option("--kv-transfer-time/--no-kv-transfer-time", help="KV transfer latency and throughput.")
    ] = True,
    output: Annotated[Path | None, typer.Option(help="Folder of the run; default: runs/bench-NAME.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the runs in the output folder.")] = False,
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", help="Give up a run after this long.")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override any key of the file.")
    ] = None,
    format: Format = "text",
    json: Json = False,
) -> None:
    """Run an experiment on your cluster and report what TensorRT-LLM's disaggServerBenchmark reports."""
    from .bench_cluster import BenchRun, bench_cluster
    from .bench_options import BenchOptions

    options = BenchOptions(
        request_rate=request_rate,
        concurrency=concurrency,
        poisson_delays=poisson_delays,
        streaming=streaming,
        max_samples=max_samples,
        max_prompt_length=max_prompt_length,
        eos_id=eos_id,
        max_batch_size=max_batch_size,
        max_num_tokens=max_num_tokens,
        kv_fraction=kv_fraction,
        kv_max_tokens=kv_max_tokens,
        kv_reuse=kv_reuse,
        chunked_context=chunked_context,
        scheduler_policy=scheduler_policy,
        dataset=dataset,
        dataset_type=dataset_type,
    )
    how = BenchRun(
        backend=backend,
        hosts=host,
        hostfile=hostfile,
        launch_agent=launch_agent,
        warm_up=warm_up,
        seed=seed,
        output=output,
        overwrite=overwrite,
        timeout_s=timeout,
        output_csv=output_csv,
        iteration_stats=iteration_stats,
        kv_transfer_time=kv_transfer_time,
        as_json=wants_json(format, json),
    )
    raise typer.Exit(bench_cluster(file, options, how, sets or []))


@bench_app.command()
def transfer(
    quick: Quick = False,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="mpi, cuda_ipc or host; may be repeated; default: all that work here; on a CPU mpi."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: cuda where there is one.")] = None,
    out: Out = None,
    format: Format = "text",
    json: Json = False,
) -> None:
    """Measure KV transfers between two executors beside a plain copy of the same size."""
    from .bench_rows_table import bench_transfer

    bench_transfer(device, backend or [], quick=quick, out=out, as_json=wants_json(format, json))


@bench_app.command()
def engine(
    quick: Quick = False,
    model: Annotated[str, typer.Option(help="A preset; `disagg list models` lists them.")] = "llama-3.1-8b",
    tp: Annotated[int, typer.Option(help="Tensor parallel size.")] = 1,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: cuda where there is one.")] = None,
    in_run: Annotated[bool, typer.Option("--in-run", help="Also the same steps inside `disagg run`.")] = False,
    reference: Annotated[
        bool, typer.Option("--reference", help="Also transformers' generate on the same work.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="With --in-run: keep the run directories there.")] = None,
    out: Out = None,
    format: Format = "text",
    json: Json = False,
) -> None:
    """Measure the engine's steps beside the time that its GEMMs and its memory traffic alone need."""
    from .bench_rows_table import bench_engine

    bench_engine(
        model,
        tp,
        device,
        quick=quick,
        in_run=in_run,
        reference=reference,
        output=output,
        out=out,
        as_json=wants_json(format, json),
    )


@bench_app.command()
def overlap(
    quick: Quick = False,
    model: Annotated[str, typer.Option(help="A preset; `disagg list models` lists them.")] = "llama-3.1-8b",
    programs: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="Programs of the copy kernel; may be repeated; the first is judged."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; default: cuda where there is one.")] = None,
    out: Out = None,
    format: Format = "text",
    json: Json = False,
) -> None:
    """Measure decode steps while KV arrives from another GPU at full rate, and what of its arrival they cover."""
    from .bench_rows_table import bench_overlap

    bench_overlap(model, programs or [], device, quick=quick, out=out, as_json=wants_json(format, json))


@bench_app.command()
def idle(
    file: Annotated[Path, typer.Argument(help="Experiment file (YAML).", show_default=False)],
    after: Annotated[float, typer.Option(metavar="SECONDS", help="From an executor's start to the window.")] = 4.0,
    window: Annotated[float, typer.Option(metavar="SECONDS", help="How long to look.")] = 5.0,
    output: Annotated[
        Path | None, typer.Option(help="Keep the runs and the profiles there, in place of an earlier call's.")
    ] = None,
    timeout: Annotated[float | None, typer.Option(metavar="SECONDS", help="Give up a run after this long.")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override any key of the file.")
    ] = None,
    out: Out = None,
    format: Format = "text",
    json: Json = False,
) -> None:
    """Measure how much of the time a GPU runs no kernel while an experiment's sequences decode."""
    from .bench_rows_table import bench_idle

    bench_idle(
        file, sets or [], after, window, output=output, timeout_s=timeout, out=out, as_json=wants_json(format, json)
    )
