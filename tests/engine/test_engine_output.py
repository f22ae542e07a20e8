"""Text, tokens and log-probabilities of an answer stay together, whatever is held back."""

from __future__ import annotations

from pathlib import Path

import pytest

from aphrodite.core.plan import TokenLogprobs, TokenTrace
from aphrodite.core.request import RequestUpdate
from aphrodite.engine.output import RequestStream, merge_outputs
from aphrodite.matching import regex as regex_module
from aphrodite.matching.regex import compile_regexes
from aphrodite.outputs import FinishReason, RequestOutput
from aphrodite.sampling.params import SamplingParams
from aphrodite.tokenizer.loader import load_tokenizer
from aphrodite.tokenizer.tokenizer import Tokenizer

STORY = "The old ship 🚢🏴‍☠️ sailed on.\n\nस्टॉर्म came: «END» of the tale."


@pytest.fixture(scope="module")
def tokenizer(smollm2_path: Path) -> Tokenizer:
    return load_tokenizer(smollm2_path)


def logprobs(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -1.0, 1, [token_id], [-1.0])


def stream_tokens(
    tokenizer: Tokenizer, ids: list[int], params: SamplingParams, *, reason: str | None = "length"
) -> list[RequestOutput]:
    """One update a token, the last with the finish reason; pieces as they come out."""
    stream = RequestStream("r", ["0"], [1], params, tokenizer)
    pieces = []
    for position, token_id in enumerate(ids):
        last = position == len(ids) - 1
        piece = stream.push(
            RequestUpdate("0", [token_id], [logprobs(token_id)], finish_reason=reason if last else None)  # type: ignore[arg-type]
        )
        if piece is not None:
            pieces.append(piece)
        if stream.finished:
            break
    return pieces


def test_pieces_join_to_the_whole_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(STORY, add_special_tokens=False)
    whole = merge_outputs(stream_tokens(tokenizer, ids, SamplingParams(logprobs=1))).outputs[0]
    assert whole.text == STORY
    assert whole.token_ids == ids
    assert whole.logprobs is not None
    assert [entry.token_id for entry in whole.logprobs] == ids
    assert whole.num_tokens == len(ids)
    assert whole.finish_reason == "length"


def test_no_piece_has_half_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(STORY, add_special_tokens=False)
    assert all(
        "\ufffd" not in part.text for piece in stream_tokens(tokenizer, ids, SamplingParams()) for part in piece.outputs
    )


def test_a_stop_regex_that_costs_too_much_is_given_up_with_a_warning(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_regexes(("«[A-Z]{2,9}»",))  # before the budget is taken away, which would have it refused
    monkeypatch.setattr(regex_module, "WORK_PER_CHARACTER", 0)
    monkeypatch.setattr(regex_module, "WORK_AT_ONCE", 0)
    ids = tokenizer.encode(STORY, add_special_tokens=False)
    params = SamplingParams(stop_regex=("«[A-Z]{2,9}»",), stop=("tale",))
    whole = merge_outputs(stream_tokens(tokenizer, ids, params)).outputs[0]
    assert whole.text == STORY.removesuffix("tale.")  # stop strings are still searched for
    assert whole.stop_reason == "tale"
    assert any("`stop_regex` took too much work" in warning for warning in whole.warnings)


@pytest.mark.parametrize("stop", ["«END»", "sailed", "T", ".\n\nस"])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_cuts_text_and_tokens_alike(tokenizer: Tokenizer, stop: str, include: bool) -> None:
    ids = tokenizer.encode(STORY, add_special_tokens=False)
    params = SamplingParams(stop=(stop, "never"), include_stop_str_in_output=include, logprobs=0)
    pieces = stream_tokens(tokenizer, ids, params)
    answer = merge_outputs(pieces).outputs[0]
    before = STORY[: STORY.index(stop)]
    assert answer.text == before + (stop if include else "")
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    assert answer.logprobs is not None
    assert [entry.token_id for entry in answer.logprobs] == answer.token_ids
    kept = tokenizer.decode(answer.token_ids)
    assert kept.startswith(answer.text) or answer.text.startswith(kept.rstrip("\ufffd"))
    assert answer.num_tokens >= len(answer.token_ids)


def test_stop_strings_wait_for_min_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one stop two stop three", add_special_tokens=False)
    assert len(ids) == 5
    answer = merge_outputs(stream_tokens(tokenizer, ids, SamplingParams(stop=("stop",), min_tokens=3))).outputs[0]
    assert answer.text == "one stop two "


def test_a_stop_token_is_counted_but_not_shown(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("Hello there!", add_special_tokens=False)
    for include, text in ((False, "Hello there"), (True, "Hello there!")):
        params = SamplingParams(include_stop_str_in_output=include)
        answer = merge_outputs(stream_tokens(tokenizer, ids, params, reason="stop")).outputs[0]
        assert answer.text == text
        assert answer.token_ids == ids


def test_a_cut_character_becomes_one_replacement_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("so 🚢", add_special_tokens=False)[:-1]
    answer = merge_outputs(stream_tokens(tokenizer, ids, SamplingParams(logprobs=0))).outputs[0]
    assert answer.text == "so \ufffd"
    assert answer.token_ids == ids
    assert answer.logprobs is not None
    assert len(answer.logprobs) == len(ids)


def test_what_answers_share_counts_as_cached_only_if_it_was_there_before(tokenizer: Tokenizer) -> None:
    for first, further in ((0, 16), (16, 48)):
        stream = RequestStream("r", ["0", "1"], [1] * 50, SamplingParams(n=2), tokenizer)
        pieces = [
            stream.push(RequestUpdate(answer, [300], finish_reason="length", num_cached_tokens=cached))
            for answer, cached in (("1", further), ("0", first))
        ]
        assert merge_outputs([piece for piece in pieces if piece is not None]).num_cached_tokens == first


def test_answers_of_one_request_end_one_by_one(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a stop", add_special_tokens=False)
    stream = RequestStream("r", ["0", "1"], [1], SamplingParams(n=2, stop=("stop",)), tokenizer)
    pieces = [stream.push(RequestUpdate("0", [token_id])) for token_id in ids]
    assert stream.aborts == ["0"]
    assert not stream.finished
    pieces.append(stream.push(RequestUpdate("1", ids[:1], finish_reason="length")))
    assert stream.finished
    merged = merge_outputs([piece for piece in pieces if piece is not None])
    assert [(answer.index, answer.text) for answer in merged.outputs] == [(0, "a "), (1, "a")]


@pytest.mark.parametrize("reason", ["length", "stop", "error", "abort"])
@pytest.mark.parametrize("update_size", [1, 3])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(logprobs=1, sampler_trace=True),
        SamplingParams(include_stop_str_in_output=True, skip_special_tokens=False),
        SamplingParams(stop=("of",), min_tokens=2),
    ],
)
def test_a_whole_answer_equals_its_pieces(
    tokenizer: Tokenizer, params: SamplingParams, update_size: int, reason: FinishReason
) -> None:
    ids = tokenizer.encode(STORY, add_special_tokens=False)
    special = tokenizer.eos_token_ids[0]
    # Cut inside a character, with a special token in the middle and at the end, and ending without a token.
    for tokens in (ids, ids[:6], [*ids[:9], special, *ids[9:]], [*ids, special], []):
        merged = []
        for whole in (True, False):
            stream = RequestStream("r", ["0"], [1], params, tokenizer, whole=whole)
            pieces = [stream.push(update) for update in updates_of(tokens, update_size, reason)]
            assert stream.finished
            if whole and not params.stop:
                assert [piece is None for piece in pieces] == [True] * (len(pieces) - 1) + [False]
            merged.append(merge_outputs([piece for piece in pieces if piece is not None]))
        assert merged[0] == merged[1]


def updates_of(ids: list[int], size: int, reason: FinishReason) -> list[RequestUpdate]:
    """`ids` in updates of `size` tokens, the last with the end."""
    parts = [ids[first : first + size] for first in range(0, len(ids), size)] or [[]]
    return [
        RequestUpdate(
            "0",
            part,
            [logprobs(token_id) for token_id in part],
            finish_reason=reason if number == len(parts) - 1 else None,
            num_cached_tokens=number,
            error="it failed" if reason == "error" and number == len(parts) - 1 else None,
            traces=[TokenTrace(token_id, True, []) for token_id in part],
            warning="banned" if number == 1 else None,
            queue_seconds=0.5 if number == 0 else None,
        )
        for number, part in enumerate(parts)
    ]
