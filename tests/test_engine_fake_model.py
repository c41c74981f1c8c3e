"""Engine, scheduler and block manager on a fake model whose right answer is known."""

import itertools
import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fake_ops import CONFIG, VOCAB_SIZE, WEIGHTS, FakeOps, digest, next_token

from orcd_batch.backend.ops import BLOCK_SIZE
from orcd_batch.engine import Completion, Engine, Request, SamplingParams
from orcd_batch.engine.scheduler import MAX_TURNS_PASSED
from orcd_batch.errors import ConfigError


def engine_with(ops: FakeOps | None = None, **limits: Any) -> Engine:
    chosen = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "num_blocks": 40,
        "max_model_len": 400,
        **limits,
    }
    return Engine(CONFIG, WEIGHTS, ops or FakeOps(), **chosen)  # type: ignore[arg-type]


def request(key: object, prompt: list[int], max_tokens: int = 5, **options: Any) -> Request:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=options.pop("ignore_eos", False))
    return Request(key, tuple(prompt), params, **options)


def run(engine: Engine, requests: list[Request], max_steps: int = 20_000) -> dict[Any, Completion]:
    for item in requests:
        engine.add(item)
    finished: dict[Any, Completion] = {}
    for _ in range(max_steps):
        if not engine.has_unfinished:
            return finished
        for completion in engine.step():
            assert completion.key not in finished, "a request finished twice"
            finished[completion.key] = completion
    raise AssertionError("the engine did not finish")


def expected_tokens(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


both_ways = pytest.mark.parametrize("run_ahead", [False, True], ids=["in step", "run ahead"])

prompts = st.builds(
    lambda shared, own, tail: [3] * shared + [own] * tail,
    st.sampled_from([0, 5, 64, 128, 150]),
    st.integers(0, 3),
    st.sampled_from([1, 2, 64, 65, 90]),
)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(prompts, st.integers(1, 70)), min_size=1, max_size=12),
    max_num_seqs=st.integers(1, 6),
    extra_tokens=st.integers(0, 300),
    num_blocks=st.integers(6, 30),
    prefix_caching=st.booleans(),
    run_ahead=st.booleans(),
    order=st.integers(0, 1000),
)
def test_every_request_gets_its_own_tokens_under_any_limits(
    rows: list[tuple[list[int], int]],
    max_num_seqs: int,
    extra_tokens: int,
    num_blocks: int,
    prefix_caching: bool,
    run_ahead: bool,
    order: int,
) -> None:
    engine = engine_with(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + extra_tokens,
        num_blocks=num_blocks,
        prefix_caching=prefix_caching,
        run_ahead=run_ahead,
    )
    requests = [request(key, prompt, count) for key, (prompt, count) in enumerate(rows)]
    random.Random(order).shuffle(requests)
    finished = run(engine, requests)
    for key, (prompt, count) in enumerate(rows):
        assert finished[key].error is None
        assert finished[key].token_ids == expected_tokens(prompt, count)
        assert finished[key].finish_reason == "length"
    assert engine.block_manager.num_available == num_blocks
    assert engine.ops.max_tokens <= max_num_seqs + extra_tokens


@both_ways
def test_samples_of_one_prompt_compute_its_blocks_once(run_ahead: bool) -> None:
    ops = FakeOps()
    engine = engine_with(ops, max_num_seqs=8, max_num_batched_tokens=512, run_ahead=run_ahead)
    prompt = [7] * (2 * BLOCK_SIZE + 10)
    finished = run(engine, [request(i, prompt, 3) for i in range(8)])
    assert {tuple(done.token_ids) for done in finished.values()} == {
        tuple(expected_tokens(prompt, 3))
    }
    statistics = engine.statistics()
    assert statistics["prefill_tokens"] == len(prompt) + 7
    assert statistics["shared_prompt_tokens"] == 7 * (len(prompt) - 1)
    assert statistics["decode_tokens"] == 8 * 2


@both_ways
@pytest.mark.parametrize("length", [2, 30, 63, 65, 100, 128])
def test_a_twin_of_any_length_computes_its_last_token_only(run_ahead: bool, length: int) -> None:
    engine = engine_with(num_blocks=12, run_ahead=run_ahead)
    prompt = list(range(length // 2)) + [7] * (length - length // 2)
    prompt = [token % VOCAB_SIZE for token in prompt]
    finished = run(engine, [request(i, prompt, 2 + 5 * i) for i in range(7)])
    for i, done in finished.items():
        assert done.token_ids == expected_tokens(prompt, 2 + 5 * i)
    assert engine.statistics()["prefill_tokens"] == length + 6
    assert engine.block_manager.num_available == 12


def test_a_prompt_of_whole_blocks_found_in_the_cache_computes_its_last_token_only() -> None:
    engine = engine_with()
    prompt = [9] * (2 * BLOCK_SIZE)
    run(engine, [request("first", prompt, 2)])
    finished = run(engine, [request("again", prompt, 2)])
    assert finished["again"].token_ids == expected_tokens(prompt, 2)
    assert engine.statistics()["prefill_tokens"] == len(prompt) + 1


def test_others_pass_a_prompt_that_waits_for_its_twin() -> None:
    engine = engine_with(max_num_seqs=3, max_num_batched_tokens=310)
    twin = [5] * 300
    for item in (request("a", twin), request("twin", twin), request("b", [1, 2])):
        engine.add(item)
    engine.step()
    assert [s.request.key for s in engine.scheduler.running] == ["a", "b"]
    assert run(engine, [])["twin"].token_ids == expected_tokens(twin, 5)


def test_who_may_generate_most_is_admitted_first_and_equals_in_order() -> None:
    engine = engine_with(max_num_seqs=1)
    for key, count in (("b", 3), ("long", 9), ("c", 3), ("short", 1)):
        engine.add(request(key, [1, 2], count))
    assert list(run(engine, [])) == ["long", "b", "c", "short"]


def test_prompts_come_several_to_a_step_once_all_places_are_taken() -> None:
    ops = FakeOps()
    engine = engine_with(ops, max_num_seqs=64, max_num_batched_tokens=500, num_blocks=200)
    prompts = [[i % 50, i // 50, 3] for i in range(128)]
    requests = [request(i, prompt, 40 + i % 64) for i, prompt in enumerate(prompts)]
    finished = run(engine, requests)
    for item in requests:
        expected = expected_tokens(list(item.prompt_token_ids), item.params.max_tokens)
        assert finished[item.key].token_ids == expected
    assert ops.num_prompt_steps <= 64 // 3, "one sequence or so finishes in every step"


def test_a_short_request_is_not_passed_for_ever() -> None:
    engine = engine_with(max_num_seqs=2, max_num_batched_tokens=8)
    engine.add(request("short", [1, 2], 1))
    for i in range(2):
        engine.add(request(i, [i], 6))
    order: list[Any] = []
    for step in itertools.count(2):
        order += [done.key for done in engine.step()]
        if "short" in order:
            break
        if engine.num_waiting < 3:
            engine.add(request(step, [step % VOCAB_SIZE], 6))
    assert 2 * MAX_TURNS_PASSED - 2 <= len(order) <= 2 * MAX_TURNS_PASSED + 2


def test_decoding_goes_on_while_a_long_prompt_is_computed_in_chunks() -> None:
    engine = engine_with(max_num_batched_tokens=40)
    engine.add(request("short", [1, 2, 3], 8))
    engine.step()
    engine.add(request("long", [4] * 200, 1))
    keys = [done.key for _ in range(8) for done in engine.step()]
    assert keys == ["long", "short"] or keys == ["short", "long"]
    assert engine.statistics()["steps"] <= 9


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ([], "empty"),
        ([1] * 400, r"400 tokens.*context of 400"),
        ([1, VOCAB_SIZE, 2], rf"id {VOCAB_SIZE} .*{VOCAB_SIZE} tokens"),
        ([1, -1], "id -1 "),
        ([1] * 200, r"need 204 cache positions and the KV cache has 192"),
    ],
)
def test_a_request_that_cannot_run_is_an_error_and_its_neighbours_are_not(
    prompt: list[int], reason: str
) -> None:
    engine = engine_with(num_blocks=3)
    finished = run(engine, [request("good", [1, 2]), request("bad", prompt)])
    bad = finished["bad"]
    assert bad.finish_reason == "error"
    assert bad.error is not None
    assert re.search(reason, bad.error), bad.error
    assert bad.token_ids == []
    assert finished["good"].token_ids == expected_tokens([1, 2], 5)


@both_ways
def test_logits_that_are_not_finite_end_one_request_only(run_ahead: bool) -> None:
    ops = FakeOps()
    bad_prompt, good_prompt = [8, 8], [6] * 70
    third = bad_prompt + expected_tokens(bad_prompt, 1)
    ops.not_finite.add(digest(third))
    engine = engine_with(ops, run_ahead=run_ahead)
    finished = run(engine, [request("bad", bad_prompt), request("good", good_prompt)])
    assert finished["bad"].finish_reason == "error"
    assert finished["bad"].token_ids == finished["bad"].fingerprints == []
    assert "position 2" in (finished["bad"].error or "")
    assert finished["good"].token_ids == expected_tokens(good_prompt, 5)
    assert engine.block_manager.num_available == 40


def test_generation_ends_at_the_context() -> None:
    engine = engine_with(max_model_len=100)
    done = run(engine, [request(0, [2] * 97, 50)])[0]
    assert (len(done.token_ids), done.finish_reason) == (3, "length")


@both_ways
def test_a_stop_token_ends_a_sample_and_is_kept(run_ahead: bool) -> None:
    tokens = expected_tokens([1, 2, 3], 20)
    stop = tokens[4]
    wanted = tokens[: tokens.index(stop) + 1]
    ids = frozenset({stop})
    engine = engine_with(run_ahead=run_ahead)
    finished = run(
        engine,
        [
            request("stops", [1, 2, 3], 20, stop_token_ids=ids),
            request("ignores", [1, 2, 3], 20, stop_token_ids=ids, ignore_eos=True),
            request("last", [1, 2, 3], len(wanted), stop_token_ids=ids),
        ],
    )
    assert finished["stops"].token_ids == wanted
    assert finished["stops"].finish_reason == "stop"
    assert finished["ignores"].token_ids == tokens
    assert finished["last"].finish_reason == "stop"
    assert engine.block_manager.num_available == 40
    assert engine.statistics()["decode_tokens"] == 2 * len(wanted) + len(tokens) - 3


def test_blocks_are_held_until_the_last_launched_step_that_writes_to_them() -> None:
    tokens = expected_tokens([1, 2, 3], 20)
    engine = engine_with(run_ahead=True)
    engine.add(request(0, [1, 2, 3], 20, stop_token_ids=frozenset({tokens[4]})))
    stopped_after = tokens.index(tokens[4]) + 1
    for _ in range(stopped_after):
        assert not engine.step()
    assert [len(done.token_ids) for done in engine.step()] == [stopped_after]
    assert engine.has_unfinished
    assert engine.block_manager.num_available == 39
    assert not engine.step()
    assert not engine.has_unfinished
    assert engine.block_manager.num_available == 40


def test_no_step_is_launched_beyond_the_last_token_of_its_sequences() -> None:
    ops = FakeOps()
    run(engine_with(ops, run_ahead=True), [request(0, [1, 2, 3], 7)])
    assert ops.num_tokens == 3 + 6


@both_ways
def test_a_stop_check_sees_every_token_and_each_sample_has_its_own(run_ahead: bool) -> None:
    seen: list[list[int]] = []

    def make_check() -> Any:
        calls = itertools.count(1)

        def check(ids: Any) -> bool:
            seen.append(list(ids))
            return next(calls) == 3

        return check

    engine = engine_with(run_ahead=run_ahead)
    finished = run(engine, [request(i, [1, 2], 10, make_stop_check=make_check) for i in range(2)])
    for done in finished.values():
        assert (len(done.token_ids), done.finish_reason) == (3, "stop")
    assert sorted(len(ids) for ids in seen) == [1, 1, 2, 2, 3, 3]


@both_ways
def test_a_step_that_fails_can_be_repeated(run_ahead: bool) -> None:
    ops = FakeOps()
    engine = engine_with(ops, run_ahead=run_ahead)
    requests = [request(i, [i + 1] * 70, 4) for i in range(6)]
    for item in requests:
        engine.add(item)
    finished: dict[Any, Completion] = {}
    for turn in itertools.count():
        if not engine.has_unfinished:
            break
        if turn % 3 == 1:
            ops.fail_next = RuntimeError("interrupted")
        try:
            finished.update((done.key, done) for done in engine.step())
        except RuntimeError:
            continue
    for item in requests:
        assert finished[item.key].token_ids == expected_tokens(list(item.prompt_token_ids), 4)
    assert engine.block_manager.num_available == 40


@both_ways
def test_reset_drops_everything_and_leaks_nothing(run_ahead: bool) -> None:
    engine = engine_with(run_ahead=run_ahead)
    for i in range(6):
        engine.add(request(i, [i + 1] * 100))
    engine.step()
    engine.reset()
    assert not engine.has_unfinished
    assert engine.block_manager.num_available == 40
    assert run(engine, [request("x", [1] * 100)])["x"].token_ids == expected_tokens([1] * 100, 5)


def test_a_token_budget_below_the_number_of_sequences_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens=3 is less than"):
        engine_with(max_num_seqs=4, max_num_batched_tokens=3)
