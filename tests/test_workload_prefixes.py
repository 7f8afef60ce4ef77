"""What prompts have in common: shared prefixes, sessions, classes; equal hashes where, and only where, tokens are equal."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg.core.prefix_names import token_hashes
from disagg.experiments.config import Experiment, validate_mapping
from disagg.experiments.config_checks import check_experiment
from disagg.experiments.config_workload import SyntheticDataset
from disagg.experiments.errors import ConfigError
from disagg.experiments.lengths import token_counts
from disagg.experiments.planned import request_of
from disagg.experiments.segments import Segment, segment_hashes
from disagg.experiments.streams import stream
from disagg.experiments.traces import read_trace
from disagg.experiments.workload import PlannedRequest, Workload


def experiment(dataset: dict[str, Any], requests: int = 60, router: Any = "round_robin", **workload: Any) -> Experiment:
    return validate_mapping(
        {
            "schema_version": 1,
            "name": "w",
            "seed": 5,
            "model": {"id": "tiny-llama"},
            "cluster": {"profile": "spec:cpu-2core", "mixed_servers": {"kv_cache": {"tokens_per_block": 16}}},
            "policy": {"router": router},
            "workload": {
                "dataset": dataset if "type" in dataset else {"type": "synthetic", "isl": 20, "osl": 5, **dataset},
                "max_tokens": 8,
                "phases": [{"name": "p", "type": "constant", "rate": 4.0, "requests": requests}],
                **workload,
            },
        },
        {},
    )


def planned(config: Experiment, vocab_size: int | None = None) -> list[PlannedRequest]:
    return list(Workload(config, vocab_size=vocab_size))


def common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """How many leading elements are equal."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


FULL = {
    "shared_prefixes": {"groups": 3, "length": {"min": 30, "max": 70}, "skew": 1.0, "share": 0.8},
    "sessions": {"concurrent": 4, "turns": {"min": 1, "max": 5}, "turn_isl": {"min": 3, "max": 30}},
    "classes": [{"name": "chat", "share": 3}, {"name": "batch", "isl": 90, "osl": 2, "priority": 0.1}],
}


def test_hashes_are_equal_exactly_where_the_tokens_are() -> None:
    requests = planned(experiment(FULL), vocab_size=1 << 20)
    seen = 0
    for one in requests:
        assert one.input_token_ids is not None
        assert len(one.input_token_ids) == one.num_prompt_tokens
        assert len(one.block_hashes) == one.num_prompt_tokens // 16
        for other in requests:
            assert other.input_token_ids is not None
            shared_blocks = common(one.block_hashes, other.block_hashes)
            blocks = common(one.input_token_ids, other.input_token_ids) // 16
            assert shared_blocks == blocks
            # a hash names its whole prefix: past the first difference nothing is equal
            assert not set(one.block_hashes[shared_blocks:]) & set(other.block_hashes[shared_blocks:])
            seen += one is not other and shared_blocks > 0
    assert seen > 100


def test_a_workload_repeats_with_its_seed_and_is_the_same_with_and_without_tokens() -> None:
    config = experiment(FULL)
    with_tokens, without = planned(config, vocab_size=100), planned(config)
    assert [r.block_hashes for r in with_tokens] == [r.block_hashes for r in without] == [
        r.block_hashes for r in planned(config)
    ]  # fmt: skip
    assert all(r.input_token_ids is None for r in without)


def test_the_length_draws_of_a_plain_data_set_are_what_they_were() -> None:
    config = experiment({"isl": {"mean": 100, "stddev": 30}})
    assert not any(r.block_hashes or r.session for r in planned(config))
    dataset = config.workload.dataset
    assert isinstance(dataset, SyntheticDataset)
    drawn = [
        token_counts(length, stream(5, name, "p")) for length, name in ((dataset.isl, "isl"), (dataset.osl, "osl"))
    ]
    assert [(r.num_prompt_tokens, r.num_output_tokens) for r in planned(config)] == list(islice(zip(*drawn), 60))


def test_each_turn_holds_the_prompts_and_answers_before_it() -> None:
    requests = planned(experiment({"sessions": {"concurrent": 3, "turns": 4}}, requests=24), vocab_size=1 << 20)
    sessions: dict[str, list[PlannedRequest]] = {}
    for request in requests:
        assert request.session is not None
        sessions.setdefault(request.session, []).append(request)
    assert [len(turns) for turns in sessions.values()] == [4] * 6
    for turns in sessions.values():
        assert [turn.num_prompt_tokens for turn in turns] == [20, 45, 70, 95]  # 20 asked and 5 answered a turn
        assert [after.id - before.id for before, after in pairwise(turns)] == [3, 3, 3]
        for before, after in pairwise(turns):
            assert before.input_token_ids is not None
            assert after.input_token_ids is not None
            assert after.input_token_ids[: before.num_prompt_tokens] == before.input_token_ids


def test_an_answer_in_a_later_prompt_is_no_longer_than_it_could_be() -> None:
    requests = planned(experiment({"osl": 50, "sessions": {"concurrent": 1, "turns": 2}}, requests=2))
    assert requests[1].num_prompt_tokens == 20 + 8 + 20  # max_tokens 8


def test_a_session_ends_before_its_prompt_would_be_cut() -> None:
    config = experiment({"sessions": {"concurrent": 2, "turns": 100}}, requests=40, max_prompt_tokens=70)
    requests = planned(config)
    assert len(requests) == 40
    assert {r.num_prompt_tokens for r in requests} == {20, 45, 70}
    assert max(Counter(r.session for r in requests).values()) == 3


def test_prefix_groups_have_lengths_and_popularity_of_their_own() -> None:
    dataset = {"shared_prefixes": {"groups": 4, "length": {"min": 100, "max": 400}, "skew": 1.0, "share": 0.5}}
    requests = planned(experiment(dataset, requests=2000))
    groups = Counter(r.block_hashes[0] for r in requests if r.num_prompt_tokens >= 120)
    assert len(groups) == 4
    most, *_, least = (number for _, number in groups.most_common())
    assert 2.5 < most / least < 6.5  # 1 / (1/4)
    assert sum(r.num_prompt_tokens == 20 for r in requests) / 2000 == pytest.approx(0.5, abs=0.05)
    lengths = {r.block_hashes[0]: r.num_prompt_tokens for r in requests if r.num_prompt_tokens >= 120}
    assert len(set(lengths.values())) > 1


def test_prefixes_are_the_same_in_every_phase() -> None:
    config = experiment(
        {"shared_prefixes": {"groups": 1, "length": 64}},
        phases=[{"name": n, "type": "constant", "rate": 4.0, "requests": 3} for n in ("warmup", "measured")],
    )
    assert len({r.block_hashes[:4] for r in planned(config)}) == 1


def test_classes_are_mixed_in_one_phase_by_their_shares() -> None:
    requests = planned(experiment({"classes": FULL["classes"]}, requests=2000))
    kinds = Counter(r.traffic_class for r in requests)
    assert kinds["chat"] / 2000 == pytest.approx(0.75, abs=0.03)
    told = {r.traffic_class: (r.num_prompt_tokens, r.num_output_tokens, r.priority) for r in requests}
    assert told == {"chat": (20, 5, 0.5), "batch": (90, 2, 0.1)}


@settings(max_examples=100, deadline=None)
@given(
    parts=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 40)), min_size=1, max_size=6),
    cut=st.integers(0, 6),
    tokens_per_block=st.integers(1, 50),
)
def test_prompts_of_parts_share_hashes_as_far_as_their_parts_agree(
    parts: list[tuple[int, int]], cut: int, tokens_per_block: int
) -> None:
    one = [Segment(id, number) for id, number in parts]
    other = [*one[:cut], Segment(99, 200)]
    shared = sum(part.num_tokens for part in one[:cut])
    hashes = [segment_hashes(prompt, sum(p.num_tokens for p in prompt), tokens_per_block) for prompt in (one, other)]
    assert common(*hashes) == shared // tokens_per_block
    assert len(set(hashes[0])) == len(hashes[0])
    assert all(0 <= value < 1 << 63 for value in hashes[0])
    assert segment_hashes(one, 3, tokens_per_block) == hashes[0][: 3 // tokens_per_block]


def test_prompts_of_known_tokens_are_hashed_in_chains() -> None:
    one, other = token_hashes(range(10), 4), token_hashes([*range(7), 99, 98, 97], 4)
    assert len(one) == 2
    assert one[0] == other[0]
    assert one[1] != other[1]
    assert token_hashes([1, 2, 3], 4) == ()


# ---- readers ---------------------------------------------------------------------------------------------------------


def test_burstgpt_rows_are_read_by_the_names_of_their_columns_and_failures_left_out(tmp_path: Path) -> None:
    path = tmp_path / "burst.csv"
    path.write_text(
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n"
        "45.25,GPT-4,1087,0,1087,Conversation log\n"
        "118.5,GPT-4,417,276,693,API log\n"
    )
    first, second = read_trace("burstgpt", path)
    assert (first.num_prompt_tokens, first.num_output_tokens, first.traffic_class) == (472, 18, "Conversation log")
    assert second.at - first.at == 113_500_000_000_000
    path.write_text("Timestamp,Session ID,Model,Request tokens,Response tokens\n1,s7,GPT-4,4,2\n")
    (row,) = read_trace("burstgpt", path)
    assert (row.session, row.traffic_class) == ("s7", "")


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["Timestamp,Request tokens"], ":1: the header has no column Response tokens"),
        (["Timestamp,Request tokens,Response tokens", "1,2"], ":2: 2 fields; allowed: 3"),
        (["Timestamp,Request tokens,Response tokens", "x,2,3"], ":2: Timestamp must be seconds"),
        (["Timestamp,Request tokens,Response tokens", "1,2.5,3"], ":2: Request tokens must be a whole number"),
        (["Timestamp,Request tokens,Response tokens", "1,0,3"], ":2: input length 0"),
        (["Timestamp,Request tokens,Response tokens", "2,1,3", "1,1,3"], ":3: goes back in time"),
    ],
)
def test_a_malformed_burstgpt_line_is_named(tmp_path: Path, lines: list[str], told: str) -> None:
    path = tmp_path / "burst.csv"
    path.write_text("\n".join(lines))
    with pytest.raises(ConfigError) as error:
        list(read_trace("burstgpt", path))
    assert f"{path}{told}" in str(error.value)


CONVERSATIONS = [
    {
        "id": "one",
        "conversations": [
            {"from": "human", "value": "a" * 80},
            {"from": "gpt", "value": "b" * 41},
            {"from": "human", "value": "c" * 8},
            {"from": "gpt", "value": "d" * 4},
            {"from": "human", "value": "nobody answers"},
        ],
    },
    {
        "conversations": [
            {"from": "system", "value": "s" * 40},
            {"from": "user", "value": "u" * 4},
            {"from": "assistant", "value": "v" * 4},
        ]
    },
    {"id": 3, "conversations": [{"from": "human", "value": "a" * 80}, {"from": "gpt", "value": "other"}]},
    {"id": "empty", "conversations": []},
]


def test_sharegpt_turns_hold_what_was_said_before_and_conversations_take_turns(tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text(json.dumps(CONVERSATIONS))
    rows = list(read_trace("sharegpt", tmp_path / "talk.json"))
    assert [(r.session, r.num_prompt_tokens, r.num_output_tokens) for r in rows] == [
        ("one", 20, 11),
        ("2", 11, 1),
        ("3", 20, 2),
        ("one", 33, 1),
    ]
    config = experiment({"type": "sharegpt", "path": "talk.json"}, requests=4)
    config._root = tmp_path
    requests = planned(config, vocab_size=1 << 20)
    hashes = {r.id: r.block_hashes for r in requests}
    assert hashes[0] == hashes[2] == hashes[3][:1]  # equal words, and the later turn of the same conversation
    assert [r.num_prompt_tokens for r in requests] == [len(r.input_token_ids or ()) for r in requests]


@pytest.mark.parametrize("text", ["{", "[{}]", '[{"conversations": [{"from": "human"}]}]', "[1]"])
def test_a_malformed_conversation_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "talk.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=str(path)):
        list(read_trace("sharegpt", path))


# ---- checks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dataset", "place", "told"),
    [
        ({"shared_prefixes": {"groups": 1, "length": {"min": 9, "max": 3}}}, "shared_prefixes.length.min", "min 9"),
        ({"sessions": {"turns": {"min": 9, "max": 3}}}, "sessions.turns.min", "min 9"),
        ({"classes": [{"name": "a"}, {"name": "a"}]}, "classes.1.name", "two traffic classes are named 'a'"),
        ({"classes": [{"name": "a", "osl": {"min": 9, "max": 3}}]}, "classes.0.osl.min", "min 9"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_its_key(dataset: dict[str, Any], place: str, told: str) -> None:
    (problem,) = check_experiment(experiment(dataset))
    assert ".".join(map(str, problem.path)) == f"workload.dataset.{place}"
    assert told in problem.message


def test_conversations_have_no_times_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "talk.json").write_text(json.dumps(CONVERSATIONS))
    phases = [{"name": "p", "type": "trace"}]
    config = experiment({"type": "sharegpt", "path": "talk.json"}, phases=phases)
    config._root = tmp_path
    assert any("a trace's arrivals need a trace" in problem.message for problem in check_experiment(config))


@pytest.mark.parametrize(("router", "told"), [("oracle", 5), ("least_tokens", None)])
def test_the_true_length_is_told_where_an_oracle_decides_and_nowhere_else(router: str, told: int | None) -> None:
    config = experiment({}, requests=1, router=router)
    (one,) = planned(config)
    assert request_of(one, config).true_output_tokens == told
