"""A message with a prompt takes longer: what the simulator makes of it, what samples tell of it, and the fit of both."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from disagg.core.commands import ORCHESTRATOR, Send
from disagg.core.events import Cancel, Enqueue, FirstTokens, KvRequested, Message, Report
from disagg.core.overheads import MessageLatency, num_token_ids
from disagg.experiments.calibration_messages import fit_messages
from disagg.experiments.calibration_samples import MessageSample, Samples, pair_kind, read_samples, write_samples
from disagg.experiments.errors import CalibrationFailedError
from disagg.experiments.profile_diff import diff_profiles
from disagg.experiments.profile_refit import refitted
from disagg.experiments.profile_show import print_profile
from disagg.policies.vocabulary import PS_PER_MS, PS_PER_US, ContextPhaseParams, Request
from disagg.runtime.session_series import SessionResult
from disagg.simulator.timing import ModelTiming
from tests.profile_examples import a_profile
from tests.simulation_helpers import World, random_world

US = PS_PER_US
FIXED, TOKEN = 640 * US, 230_000  # picoseconds
LATENCY = MessageLatency(FIXED, 600 * US, 700 * US, TOKEN)


def enqueue(prompt: int, params: ContextPhaseParams | None = None) -> Enqueue:
    return Enqueue(Request(1, prompt, 10, context_phase_params=params))


# ---- what carries tokens --------------------------------------------------------------------------------------------


def test_both_phases_are_sent_with_the_prompt_and_one_that_moves_with_what_it_has_so_far() -> None:
    assert num_token_ids(enqueue(500)) == 500
    assert num_token_ids(enqueue(500, ContextPhaseParams(1, 1, 500, is_promised=True))) == 500
    assert num_token_ids(enqueue(500, ContextPhaseParams(1, 1, 500))) == 501
    assert num_token_ids(enqueue(500, ContextPhaseParams(1, 1, 519, num_generated=20))) == 520
    assert not any(num_token_ids(message) for message in (Cancel(1), FirstTokens(1, (7,)), KvRequested(1, 2, 3)))


# ---- in the simulator -----------------------------------------------------------------------------------------------


def test_a_message_with_a_prompt_arrives_later_by_its_tokens_and_others_as_ever() -> None:
    timing = ModelTiming({}, LATENCY)
    assert timing.message_arrives(0, 1, 100, enqueue(4000)) == (100 + FIXED + 4000 * TOKEN, 0)
    assert timing.message_arrives(0, 2, 100, Cancel(1)) == (100 + FIXED, 0)
    assert timing.message_arrives(1, 0, 100, Report(1)) == (100 + 600 * US, 1)
    assert timing.message_arrives(1, 2, 100, KvRequested(1, 1, 2)) == (100 + 700 * US, 1)


def test_nothing_overtakes_a_prompt_on_its_way_to_the_same_executor() -> None:
    timing = ModelTiming({}, LATENCY)
    last, _ = timing.message_arrives(0, 1, 100, enqueue(4000))
    assert timing.message_arrives(0, 1, 200, Cancel(1)) == (last, 0)
    assert timing.message_arrives(2, 1, 300, KvRequested(1, 2, 3)) == (last, 2)  # it may be of that very request
    assert timing.message_arrives(0, 1, last, Cancel(1)) == (last + FIXED, 0)


def test_a_request_reaches_its_executor_by_the_length_of_its_prompt() -> None:
    world = World("m", latency=LATENCY)
    world.submit(1, 0, 100, 3)
    world.submit(2, PS_PER_MS, 2000, 3)
    world.submit(3, PS_PER_MS + US, 100, 3)
    world.run()
    arrivals = [frame.now for frame in world.frames(1) for event in frame.events if isinstance(event, Enqueue)]
    second = PS_PER_MS + FIXED + 2000 * TOKEN
    assert arrivals == [FIXED + 100 * TOKEN, second, second]  # the third would have been there before it


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), prompt_token=st.sampled_from([10**4, 10**6, 10**8]))
def test_each_executor_is_given_what_the_orchestrator_sent_it_in_that_order(seed: int, prompt_token: int) -> None:
    """Through cancels and early binding; deaths apart, after which nothing arrives."""
    world = random_world(seed, prompt_token=prompt_token).run()
    sent: dict[int, list[Message]] = {core: [] for core in world.logs}
    for frame in world.frames(ORCHESTRATOR):
        for command in frame.commands:
            if isinstance(command, Send):
                sent[command.to].append(command.message)
    for executor, simulated in world.cluster.executors.items():
        events = iter([event for frame in world.frames(executor) for event in frame.events])
        came = [message in events for message in sent[executor]]  # each behind the one before it
        assert all(came) or not simulated.is_alive


@settings(max_examples=40, deadline=None)
@given(
    sends=st.lists(
        st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(0, 5 * PS_PER_MS), st.integers(0, 20_000)),
        max_size=40,
    )
)
def test_arrivals_between_two_cores_are_in_the_order_of_sending(sends: list[tuple[int, int, int, int]]) -> None:
    timing, now = ModelTiming({}, LATENCY), 0
    last: dict[tuple[int, int], int] = {}
    for sender, to, after, prompt in sends:
        now += after
        message = enqueue(prompt) if sender == ORCHESTRATOR and prompt else KvRequested(1, sender, 2)
        at, _ = timing.message_arrives(sender, to, now, message)
        assert at >= max(now + FIXED, last.get((sender, to), 0))
        last[sender, to] = at


def test_a_reader_that_was_told_early_never_asks_before_its_source_was_told() -> None:
    """The source is still to open a long prompt; the reader is told at once, and its question is the quicker message."""
    latency = MessageLatency(10 * US, 10 * US, 10 * US, 10 * US)
    world = World("cgg", latency=latency, generation_binding="at_arrival")
    for number, prompt in enumerate((4000, 20, 20, 2000, 20), 1):
        world.submit(number, number * US, prompt, 5)
    world.run()
    assert all(row.finish_reason == "stop" and row.num_attempts == 1 for row in world.table("Request"))
    assert not [f for f in world.frames(1) for c in f.commands if getattr(c, "error", None) is not None]


def test_cores_that_hear_late_what_nobody_waits_for_decide_the_same_where_prompts_take_time() -> None:
    for seed in range(40):
        late, in_time = (random_world(seed, is_late=is_late, prompt_token=10**6).run() for is_late in (True, False))
        assert late.digest() == in_time.digest(), seed


def test_prompts_that_take_no_time_change_nothing() -> None:
    timing = ModelTiming({}, MessageLatency(3, 5, 7, 0))
    assert timing.message_arrives(0, 1, 100, enqueue(10**6)) == (103, 0)
    for seed in range(20):
        assert random_world(seed, prompt_token=0).run().digest() == random_world(seed).run().digest()


# ---- samples and fit ------------------------------------------------------------------------------------------------


def sample(latency: float, num_tokens: int = -1, kind: str = "Enqueue") -> MessageSample:
    return MessageSample(1, 0, 1, pair_kind(0, 1), kind, round(latency), num_tokens)


def with_prompts(random: Random, num: int = 400) -> list[MessageSample]:
    """Prompts of 16 to 16,384 tokens; one in fifty is stalled, up to forty times as long."""
    found = []
    for i in range(num):
        tokens = round(16 * 2 ** random.uniform(0, 10))
        stall = random.uniform(3, 40) if i % 50 == 7 else 1.0
        found.append(sample((FIXED + tokens * TOKEN) * random.gauss(1, 0.05) * stall, tokens))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_the_fit_finds_the_time_of_a_message_and_of_a_token_among_stalls(seed: int) -> None:
    samples = with_prompts(Random(seed))
    latency, spreads = fit_messages([*samples, MessageSample(1, 1, 0, pair_kind(1, 0), "Response", 600 * US, 0)])
    assert latency.prompt_token == pytest.approx(TOKEN, rel=0.03)
    calm = [s for i, s in enumerate(samples) if i % 50 != 7]
    left_over = sum(s.latency_ps - latency.prompt_token * s.num_tokens for s in calm) / len(calm)
    assert left_over == pytest.approx(FIXED, rel=0.05)
    assert latency.into_executor == pytest.approx(FIXED, rel=0.15)  # what is no accident stays part of the mean
    assert latency.from_executor == 600 * US
    assert spreads[pair_kind(0, 1)] < FIXED


def test_messages_without_a_prompt_are_not_shifted_by_those_with_one() -> None:
    random = Random(3)
    samples = [sample(FIXED + n * TOKEN, n) for n in range(100, 9000, 20)]
    samples += [sample(FIXED * random.gauss(1, 0.02), 0, "Cancel") for _ in range(200)]
    latency, _ = fit_messages(samples)
    assert latency.prompt_token == pytest.approx(TOKEN, rel=1e-3)
    assert latency.into_executor == pytest.approx(FIXED, rel=0.01)


def test_quicker_messages_without_a_prompt_leave_the_time_of_a_token_alone_and_count_in_the_mean() -> None:
    samples = [sample(FIXED + n * TOKEN, n) for n in range(100, 8100, 20)] + [sample(FIXED / 2, 0, "Cancel")] * 400
    latency, _ = fit_messages(samples)
    assert latency.prompt_token == pytest.approx(TOKEN, rel=1e-3)
    assert latency.into_executor == pytest.approx(0.75 * FIXED, rel=0.01)


def test_samples_that_do_not_tell_of_tokens_are_fitted_as_before() -> None:
    samples = [replace(s, num_tokens=-1) for s in with_prompts(Random(1))]
    latency, _ = fit_messages(samples)
    ordered = sorted(s.latency_ps for s in samples)[:-4]  # less the longest hundredth
    kept = [ps for ps in ordered if ps <= 10 * (ordered[197] + ordered[198]) / 2]
    assert latency == MessageLatency.same(round(sum(kept) / len(kept)))


def test_prompts_of_one_length_or_too_few_tell_nothing_of_a_token() -> None:
    alike = [sample(FIXED + n, 1000 + n % 9) for n in range(100)]
    assert fit_messages(alike)[0].prompt_token == 0
    few = [sample(FIXED + n * TOKEN, n) for n in (10, 100, 1000, 10_000)]
    assert fit_messages(few)[0].prompt_token == 0
    with pytest.raises(CalibrationFailedError, match="no message"):
        fit_messages([])


def test_what_a_busy_machine_takes_is_no_matter_of_tokens() -> None:
    nothing_without = [sample(n * 16 * US, n) for n in range(20, 260, 5)]
    random = Random(4)
    anything = [sample(FIXED * random.lognormvariate(0, 1) * (1 + n / 500), n) for n in range(20, 260, 5)]
    for samples in (nothing_without, anything):
        latency, _ = fit_messages(samples)
        assert (latency.prompt_token, latency.into_executor > 0) == (0, True)


def test_tokens_take_no_more_than_there_is() -> None:
    """Most prompts on a busy machine came the later the longer they were; long ones that did not leave less than nothing."""
    queued = [sample(20 * US + n * 16 * US, n) for n in range(20, 260, 4)]
    at_once = [sample(100 * US, n) for n in range(130, 260, 6)]
    latency, _ = fit_messages([*queued, *at_once])
    plain, _ = fit_messages([replace(s, num_tokens=-1) for s in (*queued, *at_once)])
    assert latency == plain
    assert latency.into_executor > 0


def test_beside_samples_that_tell_those_that_do_not_are_left_out() -> None:
    told = [sample(FIXED + n * TOKEN, n) for n in range(100, 9000, 20)]
    assert fit_messages([*told, *[sample(5000 * US)] * 300]) == fit_messages(told)


def test_a_latency_that_does_not_depend_on_tokens_is_found_to_be_just_that() -> None:
    random = Random(2)
    samples = [sample(FIXED * random.gauss(1, 0.1), n) for n in range(10, 10_000, 10)]
    latency, _ = fit_messages(samples)
    assert latency.prompt_token < 3000
    assert latency.into_executor + 5000 * latency.prompt_token == pytest.approx(FIXED, rel=0.02)


def test_the_logs_of_a_session_give_both_numbers_back() -> None:
    world = World("cg", latency=LATENCY)
    for number, prompt in enumerate(2 * (20, 50, 200, 500, 1000, 1500, 2000, 3000), 1):
        world.submit(number, number * 200 * PS_PER_MS, prompt, 5)
    world.run()
    samples = Samples()
    logs = {core: b"".join(parts) for core, parts in world.logs.items()}
    samples.add(0, SessionResult("spaced", 1.0, logs, {}, {}, []), is_open_loop=True)
    into = [s.num_tokens for s in samples.messages if s.pair == pair_kind(0, 1)]
    assert sorted(set(into)) == [20, 21, 50, 51, 200, 201, 500, 501, 1000, 1001, 1500, 1501, 2000, 2001, 3000, 3001]
    assert all(s.num_tokens == 0 for s in samples.messages if s.sender != ORCHESTRATOR)
    latency, _ = fit_messages(samples.spaced_messages())
    assert latency.prompt_token == pytest.approx(TOKEN, rel=1e-6)
    assert latency.into_executor == pytest.approx(FIXED, rel=1e-5)
    assert (latency.from_executor, latency.between_executors) == (600 * US, 700 * US)


# ---- files ----------------------------------------------------------------------------------------------------------


def test_samples_keep_their_tokens_in_files_and_older_files_do_without(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    write_samples(Samples(messages=[sample(FIXED, 300)]), tmp_path)
    found = read_samples(tmp_path)
    assert found is not None
    assert [s.num_tokens for s in found.messages] == [300]
    path = tmp_path / "messages.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["num_tokens"]), path)
    found = read_samples(tmp_path)
    assert found is not None
    assert [(s.latency_ps, s.num_tokens) for s in found.messages] == [(FIXED, -1)]


def test_a_profile_fitted_again_and_shown_tells_of_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    told = [sample(FIXED + n * TOKEN, n) for n in range(100, 9000, 20)]
    again = refitted(a_profile(), Samples(messages=told))
    print_profile(again)
    shown = capsys.readouterr().out
    assert "to an executor 0.640 ms and 0.230 us for each token of its prompt, from one" in shown
    assert "standard deviations around that in ms: orchestrator to executor 0.000" in shown
    print_profile(a_profile())
    assert "each token of its prompt" not in capsys.readouterr().out


def test_profiles_are_compared_by_what_messages_with_prompts_take() -> None:
    plain, other = a_profile(messages=MessageLatency(1000, 1000, 1000)), a_profile()
    steeper = a_profile(messages=MessageLatency(1000, 1000, 1000, 1))
    assert "messages with prompts" not in diff_profiles(plain, other)["families"]
    families = diff_profiles(plain, steeper)["families"]
    assert families["messages"]["max_abs"] == 0
    assert families["messages with prompts"]["max_abs"] == pytest.approx(16.384)
    assert diff_profiles(steeper, plain)["families"]["messages with prompts"]["mean"] < 0
