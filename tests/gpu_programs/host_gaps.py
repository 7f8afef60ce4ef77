"""What a mixed executor's GPU waits for between two steps with chunks: the host's stages, from a real executor under load.

`python tests/gpu_programs/host_gaps.py [REQUESTS [PROMPT [OUTPUT]]]`: an executor of its own in this process, so many requests
at a time, each replaced when it ends. Prints the mean of each stage between the end of one step and the launch of the next,
in µs, then where the two threads that matter spend their time.
"""

from __future__ import annotations

import cProfile
import io
import itertools
import os
import pstats
import random
import statistics
import sys
import time
from collections import defaultdict
from typing import Any

import torch

from disagg.core.config import ExecutorConfig, OrchestratorConfig, SchedulerConfig
from disagg.core.model_shapes import PRESETS
from disagg.policies.vocabulary import Request, Role
from disagg.runtime import engine as engines
from disagg.runtime import executor_engine, executor_leader, executor_rank, fused_stepper
from disagg.runtime.api import Executor, HardwareSpec, ModelSource, Placement

ON_GPU = torch.cuda.is_available()
SHAPE = PRESETS["llama-3.1-8b" if ON_GPU else "tiny-llama"]
SECONDS = 4.0 if ON_GPU else 1.0

STAGES = ("step over", "reported", "taken up", "granted", "begins", "begun", "launching", "launched")

marks: dict[str, int] = {}
stages: dict[str, list[float]] = defaultdict(list)
events: list[tuple[bool, Any, Any]] = []  # (with chunks, before the step, behind it)
profiled: list[str] = []  # the thread that is profiled now
profiler = cProfile.Profile()


def around(owner: Any, name: str, before: str | None, after: str | None, thread: str = "") -> None:
    """Mark when `owner.name` is called and when it returns; profile it while its thread is looked at."""
    found = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            marks[before] = time.monotonic_ns()
        is_profiled = thread in profiled
        if is_profiled:
            profiler.enable()
        try:
            return found(*args, **kwargs)
        finally:
            if is_profiled:
                profiler.disable()
            if after is not None:
                marks[after] = time.monotonic_ns()

    setattr(owner, name, wrapped)


def watch() -> None:
    """Marks on the way from a step's tokens to the next step's launch, and events on the device around each step."""
    around(fused_stepper._Reading, "__call__", None, "step over")
    around(executor_rank.ExecutorRank, "_on_step", "reported", None)
    around(executor_leader.LeaderSession, "_step_ended", "taken up", None)
    around(executor_leader.LeaderSession, "wake", None, None, "leader")
    around(executor_engine.EngineThread, "grant", "granted", None)
    around(executor_engine.EngineThread, "_steps", None, None, "engine")
    around(engines.Engine, "begin", "begins", "begun")
    launch = fused_stepper.FusedStepper.launch

    def launched(self: Any, batch: Any, runs_decodes: bool, chunks: Any, on_layers: Any = None) -> Any:
        marks["launching"] = time.monotonic_ns()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(self._stream)
        found = launch(self, batch, runs_decodes, chunks, on_layers)
        after.record(self._stream)
        marks["launched"] = time.monotonic_ns()
        if events and events[-1][0]:  # behind a step with chunks nothing is launched ahead: the marks are of this way
            for first, then in itertools.pairwise(STAGES):
                stages[f"{first} to {then}"].append((marks.get(then, 0) - marks.get(first, 0)) / 1e3)
        events.append((bool(chunks), before, after))
        return found

    fused_stepper.FusedStepper.launch = launched  # type: ignore[method-assign]


def tell() -> None:
    """What was seen since the last call."""
    torch.cuda.synchronize()
    took: dict[str, list[float]] = defaultdict(list)
    names = ("decodes", "chunks")
    for (had, begun, ended), (has, begins, _) in itertools.pairwise(events):
        took[f"between {names[had]} and {names[has]}"].append(ended.elapsed_time(begins) * 1e3)
        took[f"a step with {names[had]}"].append(begun.elapsed_time(ended) * 1e3)
    for where, found in (("device", took), ("host", stages)):
        for name, times in found.items():
            middle = statistics.median(times)
            print(f"{where}, {name}: {statistics.fmean(times):7.0f} us (median {middle:.0f} of {len(times)})")
    events.clear()
    stages.clear()


def load(executor: Executor, num: int, prompt: int, output: int, seconds: float) -> int:
    """Keep `num` requests running for so long; how many have ended."""
    rng = random.Random(1)
    text = tuple(rng.randrange(SHAPE.vocab_size) for _ in range(10 * prompt))

    def one() -> int:
        length = max(1, int(rng.uniform(0.5, 1.5) * prompt))
        at = rng.randrange(len(text) - length)
        ids = text[at : at + length]  # cheap to make: whoever asks is a thread of this process
        most = rng.randint(max(1, output // 2), output * 3 // 2)
        return executor.enqueue_request(Request(0, length, most, input_token_ids=ids), most)

    ends, ended = time.monotonic() + seconds, 0
    running = {one() for _ in range(num)}
    while running:
        for response in executor.await_responses(timeout=10.0):
            if response.result is None or response.result.is_final:
                ended += 1
                running.discard(response.request_id)
                if time.monotonic() < ends:
                    running.add(one())
    return ended


def main() -> None:
    num, prompt, output = (int(given) for given in (sys.argv[1:] + ["32", "600", "32"][len(sys.argv) - 1 :]))
    scheduler = SchedulerConfig(max_batch_size=128, max_num_tokens=2048)
    config = ExecutorConfig(1, Role.MIXED, 8000 if ON_GPU else 2000, scheduler=scheduler)
    place = Placement(1, (0,), (0,) if ON_GPU else (), pipeline_depth=2, plan_ahead=True)
    spec = HardwareSpec(
        OrchestratorConfig((config,)),
        ModelSource(SHAPE, seed=1),
        (place,),
        device="cuda" if ON_GPU else "cpu",
        leader_mode=True,
    )
    with Executor(spec) as executor:
        load(executor, num, prompt, output, 1.0)
        if ON_GPU:
            watch()
        for interval in (1e-4, 2e-5, 5e-6):
            sys.setswitchinterval(interval)
            ended = load(executor, num, prompt, output, SECONDS)
            print(
                f"switch interval {interval * 1e6:.0f} us: {ended} requests in {SECONDS:g} s, {num} at a time, "
                f"prompts of {prompt}, outputs of {output} tokens"
            )
            if ON_GPU:
                tell()
        for thread in ("leader", "engine") if ON_GPU else ():
            profiled[:] = [thread]
            load(executor, num, prompt, output, SECONDS / 2)
            profiled.clear()
            text = io.StringIO()
            pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(28)
            print(thread, "\n".join(line for line in text.getvalue().splitlines() if line.strip()))
            profiler.clear()


if __name__ == "__main__":
    if os.environ.get("OMPI_COMM_WORLD_SIZE"):
        main()
    else:
        from disagg.runtime.launcher import launch

        sys.exit(launch(__file__, sys.argv[1:], 1, timeout_s=100))
