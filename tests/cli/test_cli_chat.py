"""The terminal chat: its commands, its loop, what Ctrl-C does, and the clients behind it."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import pytest
import tokenizers
from tokenizers import decoders, models
from typer.testing import CliRunner

from aphrodite.chat.template import ChatTemplate
from aphrodite.cli import chat as chat_module
from aphrodite.cli.chat_session import COMMANDS, ChatSession
from aphrodite.cli.main import app
from aphrodite.cli.options import sampling_from_texts
from aphrodite.cli.server_source import ServerSource
from aphrodite.cli.sources import EngineSource, Piece, printable
from aphrodite.errors import AphroditeError, ConfigError
from aphrodite.outputs import CompletionOutput, RequestOutput
from aphrodite.sampling.params import SamplingParams
from aphrodite.sampling.presets import shipped_presets
from aphrodite.tokenizer.tokenizer import SpecialTokens, Tokenizer


class FakeSource:
    """Answers with the number of messages; records what it was asked."""

    interruptible = False
    sampling_defaults = SamplingParams()

    def __init__(self, pieces: int = 2) -> None:
        self.continued: list[bool] = []
        self.thoughts = ""
        self.asked: list[tuple[Any, SamplingParams]] = []
        self.closed_streams = 0
        self.closed = False
        self.interrupt_after: int | None = None
        self._pieces = pieces

    def chat(self, messages: Any, params: SamplingParams, *, continues: bool = False) -> Iterator[Piece]:
        self.asked.append(([dict(message) for message in messages], params))
        self.continued.append(continues)
        if self.thoughts:
            yield Piece(self.thoughts, 1, thought=True)
        yield from self._answer(f"answer {len(self.asked)}")

    def complete(self, prompt: str, params: SamplingParams) -> Iterator[Piece]:
        self.asked.append((prompt, params))
        return self._answer(" and then")

    def _answer(self, text: str) -> Iterator[Piece]:
        try:
            yield Piece(text, 1)
            for number in range(self._pieces - 1):
                if number == self.interrupt_after:
                    os.kill(os.getpid(), signal.SIGINT)
                yield Piece(".", 1)
            yield Piece("", 0, "stop")
        finally:
            self.closed_streams += 1

    def close(self) -> None:
        self.closed = True


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


class TestSession:
    def session(self) -> ChatSession:
        session = ChatSession(SamplingParams())
        for question, answer in (("one", "1"), ("two", "2")):
            assert session.handle(question).answer
            session.add_answer(answer)
        return session

    def test_messages_begin_with_the_system_prompt(self):
        session = ChatSession(SamplingParams(), system="Be brief.")
        session.handle("hello")
        assert session.messages == [{"role": "system", "content": "Be brief."}, user("hello")]

    def test_regenerate_drops_the_last_answer_only(self):
        session = self.session()
        assert session.handle("/regenerate").answer
        assert session.turns == [user("one"), assistant("1"), user("two")]

    def test_regenerate_moves_a_fixed_seed_on(self):
        session = self.session()
        session.handle("/set seed 5")
        assert "6" in session.handle("/regenerate").note
        assert session.params.seed == 6

    def test_regenerate_after_an_answer_that_never_came(self):
        session = self.session()
        session.handle("three")
        assert session.handle("/regenerate").answer
        assert session.turns[-1] == user("three")

    def test_continue_adds_to_the_last_answer(self):
        session = self.session()
        reply = session.handle("/continue")
        assert reply.answer
        assert reply.continues
        session.add_answer(" and more", continues=True)
        assert session.turns[-2:] == [user("two"), assistant("2 and more")]
        session.handle("three")
        with pytest.raises(ConfigError, match="no answer to go on with"):
            session.handle("/continue")

    def test_a_preset_sets_its_values(self):
        session = self.session()
        assert "roleplay: " in session.handle("/preset").note
        session.handle("/set top_k 7")
        session.handle("/preset roleplay")
        expected = shipped_presets().presets["roleplay"].base(SamplingParams(top_k=7))
        assert session.params == expected
        assert session.params != SamplingParams(top_k=7)
        with pytest.raises(ConfigError, match="Did you mean roleplay"):
            session.handle("/preset rolepaly")

    def test_edit_replaces_the_last_message(self):
        session = self.session()
        assert session.handle("/edit").edit == "two"
        assert session.turns[-1] == assistant("2")
        assert session.handle("/edit three").answer
        assert session.turns == [user("one"), assistant("1"), user("three")]

    def test_undo_goes_back_one_exchange_at_a_time(self):
        session = self.session()
        session.handle("/undo")
        assert session.turns == [user("one"), assistant("1")]
        session.handle("/undo")
        assert session.turns == []

    @pytest.mark.parametrize("command", ["/undo", "/edit", "/edit x", "/regenerate"])
    def test_commands_on_an_empty_conversation_explain(self, command):
        with pytest.raises(ConfigError, match="no message"):
            ChatSession(SamplingParams()).handle(command)

    def test_set_changes_and_checks_parameters(self):
        session = self.session()
        session.handle("/set temperature 0.7")
        session.handle("/set top_k=40")
        session.handle("/set rep_pen 1.1")
        session.handle("/set stop END")
        session.handle("/set ignore-eos true")
        expected = SamplingParams(temperature=0.7, top_k=40, repetition_penalty=1.1, stop=("END",), ignore_eos=True)
        assert session.params == expected
        assert "temperature 0.7" in session.handle("/set").note

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("/set temprature 1", "temperature"),
            ("/set temperature", "needs a value"),
            ("/set temperature hot", "must be a number"),
            ("/set top_p 2", "top_p"),
            ("/sett x 1", "Did you mean /set?"),
        ],
    )
    def test_a_wrong_line_changes_nothing(self, line, words):
        session = self.session()
        with pytest.raises(ConfigError) as refused:
            session.handle(line)
        assert words in str(refused.value)
        assert session.params == SamplingParams()
        assert len(session.turns) == 4

    def test_save_and_load(self, tmp_path):
        session = self.session()
        session.handle("/system Be kind.")
        session.handle("/set temperature 0.5")
        session.handle('/set logit_bias {"5": -1}')
        session.handle(f"/save {tmp_path / 'talk.json'}")
        other = ChatSession(SamplingParams())
        other.handle(f"/load {tmp_path / 'talk.json'}")
        assert (other.messages, other.params) == (session.messages, session.params)

    @pytest.mark.parametrize(
        "content",
        [
            "{",
            "[]",
            '{"messages": [{"role": "root", "content": "x"}]}',
            '{"messages": [], "sampling": {"top_p": 9}}',
            '{"messages": [{"role": "user"}]}',
        ],
    )
    def test_a_damaged_file_is_refused(self, tmp_path, content):
        path = tmp_path / "talk.json"
        path.write_text(content)
        session = self.session()
        with pytest.raises(ConfigError):
            session.handle(f"/load {path}")
        assert len(session.turns) == 4

    @pytest.mark.parametrize("command", ["save", "load"])
    def test_a_file_in_the_home_of_nobody_is_refused(self, command):
        with pytest.raises(ConfigError, match=r"~nobody-of-this-name/talk\.json: No such file or directory"):
            self.session().handle(f"/{command} ~nobody-of-this-name/talk.json")

    def test_help_names_every_command(self):
        note = ChatSession(SamplingParams()).handle("/help").note
        assert all(f"/{name}" in note for name in COMMANDS)

    def test_a_message_may_begin_with_a_slash(self):
        session = ChatSession(SamplingParams())
        session.handle("//etc is a folder")
        assert session.turns == [user("/etc is a folder")]

    def test_clear_system_and_quit(self):
        session = self.session()
        session.handle("/system Be kind.")
        session.handle("/clear")
        assert session.messages == [{"role": "system", "content": "Be kind."}]
        session.handle("/system none")
        assert session.messages == []
        assert session.handle("/quit").quit
        assert not session.handle("   ").answer


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], SamplingParams(temperature=0.6, top_k=20)),
        (["--temperature", "1.0"], SamplingParams(temperature=1.0, top_k=20)),
        (["--top-k", "-1", "--top-p", "0.9"], SamplingParams(temperature=0.6, top_p=0.9)),
    ],
)
def test_what_is_not_given_is_the_models_to_say(monkeypatch, flags: list[str], expected: SamplingParams) -> None:
    source = FakeSource()
    source.sampling_defaults = SamplingParams(temperature=0.6, top_k=20)
    chat_with(monkeypatch, source, "hello\n", *flags)
    result = CliRunner().invoke(app, ["complete", "Once", *flags])
    assert result.exit_code == 0, result.output
    assert [params for _, params in source.asked] == [expected, msgspec.structs.replace(expected, max_tokens=256)]


def chat_with(monkeypatch, source: FakeSource, text: str, *arguments: str) -> str:
    monkeypatch.setattr(chat_module, "_open_source", lambda *ignored: source)
    result = CliRunner().invoke(app, ["chat", *arguments], input=text)
    assert result.exit_code == 0, result.output
    return result.output


class TestLoop:
    def test_a_conversation(self, monkeypatch):
        source = FakeSource()
        output = chat_with(monkeypatch, source, "hello\nand?\n", "--system", "Be brief.", "--temperature", "0.3")
        assert output.split("\n")[:2] == ["answer 1.", "answer 2."]
        messages, params = source.asked[1]
        assert messages == [
            {"role": "system", "content": "Be brief."}, user("hello"), assistant("answer 1."), user("and?"),
        ]  # fmt: skip
        assert params == SamplingParams(temperature=0.3)
        assert source.closed

    def test_an_answer_is_continued(self, monkeypatch):
        source = FakeSource()
        output = chat_with(monkeypatch, source, "hello\n/continue\nand?\n")
        assert source.continued == [False, True, False]
        assert source.asked[1][0] == [user("hello"), assistant("answer 1.")]
        assert source.asked[2][0] == [user("hello"), assistant("answer 1.answer 2."), user("and?")]
        assert output.split("\n")[:3] == ["answer 1.", "answer 2.", "answer 3."]

    def test_thoughts_are_no_part_of_the_conversation(self, monkeypatch):
        source = FakeSource()
        source.thoughts = "Hm. "
        output = chat_with(monkeypatch, source, "hello\nand?\n")
        assert output.split("\n")[:2] == ["answer 1.", "answer 2."]  # shown in terminals only
        assert source.asked[1][0] == [user("hello"), assistant("answer 1."), user("and?")]

    def test_thoughts_are_shown_before_the_answer(self, capsys):
        writer = chat_module._AnswerWriter(shows_thoughts=True)
        for piece in (Piece("Hm", 1, thought=True), Piece(".\x07", 1, thought=True), Piece("", 0), Piece("Hello", 1)):
            writer.write(piece)
        writer.end()
        assert capsys.readouterr().out == "Hm.\n\nHello\n"

    def test_a_preset_lies_under_the_flags(self, monkeypatch):
        source = FakeSource()
        source.sampling_defaults = SamplingParams(top_k=3)
        chat_with(monkeypatch, source, "hello\n", "--preset", "roleplay", "--temperature", "0.3")
        preset = shipped_presets().presets["roleplay"].base(SamplingParams(top_k=3))
        assert source.asked[0][1] == msgspec.structs.replace(preset, temperature=0.3)

    def test_longer_texts(self, monkeypatch):
        source = FakeSource()
        chat_with(monkeypatch, source, 'one\\\ntwo\n"""\na\n\nb\n"""\n"""x"""\n')
        assert [asked[0][-1]["content"] for asked in source.asked] == ["one\ntwo", "a\n\nb", "x"]

    def test_an_error_does_not_end_the_program(self, monkeypatch):
        source = FakeSource()
        output = chat_with(monkeypatch, source, "/nope\nhello\n/quit\nnever\n")
        assert "/nope is not a command" in output
        assert len(source.asked) == 1

    def test_a_failed_answer_keeps_what_was_written(self, monkeypatch):
        class Failing(FakeSource):
            def _answer(self, text: str) -> Iterator[Piece]:
                yield Piece("half", 1)
                if len(self.asked) == 1:
                    raise AphroditeError("the model fell over")

        source = Failing()
        output = chat_with(monkeypatch, source, "hello\ngo on\n")
        assert "the model fell over" in output
        assert source.asked[1][0] == [user("hello"), assistant("half"), user("go on")]

    @pytest.mark.parametrize("interruptible", [False, True])
    def test_ctrl_c_stops_the_answer_and_not_the_program(self, monkeypatch, interruptible):
        source = FakeSource(pieces=1000)
        source.interruptible = interruptible
        source.interrupt_after = 3
        before = signal.getsignal(signal.SIGINT)
        chat_with(monkeypatch, source, "hello\nstill there?\n")
        assert len(source.asked) == 2
        kept = source.asked[1][0][1]["content"]
        assert kept.startswith("answer 1...")
        assert len(kept) < 20
        assert source.closed_streams == 2
        assert signal.getsignal(signal.SIGINT) is before

    def test_edit_reads_the_new_text(self, monkeypatch):
        source = FakeSource()
        chat_with(monkeypatch, source, "helo\n/edit\nhello\n")
        assert source.asked[1][0] == [user("hello")]


class TestComplete:
    def test_prompt_and_flags(self, monkeypatch):
        source = FakeSource()
        monkeypatch.setattr(chat_module, "_open_source", lambda *ignored: source)
        result = CliRunner().invoke(app, ["complete", "Once", "--top-k", "5", "--stop", "a", "--stop", "b"])
        assert result.output == " and then.\n"
        assert source.asked == [("Once", SamplingParams(max_tokens=256, top_k=5, stop=("a", "b")))]
        assert source.closed

    def test_standard_input(self, monkeypatch):
        source = FakeSource()
        monkeypatch.setattr(chat_module, "_open_source", lambda *ignored: source)
        CliRunner().invoke(app, ["complete", "-", "--max-tokens", "7"], input="line one\nline two")
        assert source.asked == [("line one\nline two", SamplingParams(max_tokens=7))]

    def test_ctrl_c_keeps_what_there_is_and_ends_with_130(self, monkeypatch):
        source = FakeSource(pieces=1000)
        source.interrupt_after = 3
        monkeypatch.setattr(chat_module, "_open_source", lambda *ignored: source)
        result = CliRunner().invoke(app, ["complete", "Once"])
        assert result.output.startswith(" and then")
        assert result.exit_code == 130
        assert source.closed


def test_what_the_engine_logs_is_shown(tiny_model, tmp_path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    backend = tokenizers.Tokenizer(models.BPE({chr(code): code - 33 for code in range(33, 127)}, []))
    backend.decoder = decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    flags = ["--load-format", "dummy", "--kv-cache-memory", "1MiB", "--max-tokens", "1", "--threads", "1"]
    for level, shown in (("info", True), ("error", False)):
        result = CliRunner().invoke(app, ["chat", str(tmp_path), *flags, "--log-level", level], input="")
        assert result.exit_code == 0, result.output
        assert ("WARNING aphrodite.chat.library: the checkpoint has no chat template" in result.stderr) == shown


class TestEngineSource:
    class FakeLLM:
        def __init__(self, outputs: list[CompletionOutput]) -> None:
            self.outputs, self.closed = outputs, False
            self.asked: list[SamplingParams] = []

        def stream(self, prompt: Any, params: SamplingParams, **template: Any) -> Iterator[RequestOutput]:
            self.asked.append(params)
            self.template = template
            try:
                for output in self.outputs:
                    yield RequestOutput("0", [1], [output], finished=False)
            finally:
                self.closed = True

    def test_pieces_and_closing(self):
        llm = self.FakeLLM([CompletionOutput(0, "a", [1]), CompletionOutput(0, "b", [2, 3], finish_reason="length")])
        assert list(EngineSource(llm).complete("x", SamplingParams())) == [Piece("a", 1), Piece("b", 2, "length")]
        stream = EngineSource(llm).complete("x", SamplingParams())
        llm.closed = False
        next(stream)
        stream.close()
        assert llm.closed

    @pytest.mark.parametrize("opened", [False, True])
    def test_reasoning_comes_apart(self, opened):
        backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
        opening = "<think>" if opened else "{{ '' if true else '<think>' }}"
        source = "{% for m in messages %}{{ m.content }}{% endfor %}{{ 'A:' if add_generation_prompt }}" + opening
        llm = self.FakeLLM(
            [
                CompletionOutput(0, "Hm." if opened else "<think>Hm.", [5]),
                CompletionOutput(0, "</think>\n\nHel", [6, 7]),
                CompletionOutput(0, "lo<|im_end|>", [8, 3], finish_reason="stop"),
            ]
        )
        llm.chat_template = ChatTemplate(source)
        llm.tokenizer = Tokenizer(backend, SpecialTokens(bos_id=1, eos_ids=(2,)), "test")
        pieces = list(EngineSource(llm).chat([user("hi")], SamplingParams()))
        assert "".join(piece.text for piece in pieces if piece.thought) == "Hm."
        assert "".join(piece.text for piece in pieces if not piece.thought) == "Hello"
        assert sum(piece.num_tokens for piece in pieces) == 5
        assert pieces[-1].finish_reason == "stop"
        assert not llm.asked[0].skip_special_tokens

    def test_an_answer_goes_on(self):
        llm = self.FakeLLM([CompletionOutput(0, "lo", [8], finish_reason="stop")])
        llm.chat_template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}{{ '' or '<think>' if x }}")
        pieces = list(EngineSource(llm).chat([user("hi"), assistant("Hel")], SamplingParams(), continues=True))
        assert pieces == [Piece("lo", 1, "stop")]
        assert llm.template == {"continue_final_message": True}

    def test_a_failed_request_is_an_error(self):
        llm = self.FakeLLM([CompletionOutput(0, error="bad logits", finish_reason="error")])
        with pytest.raises(AphroditeError, match="bad logits"):
            list(EngineSource(llm).complete("x", SamplingParams()))


class Handler(BaseHTTPRequestHandler):
    """Enough of OpenAI's protocol for the client; remembers what came."""

    protocol_version = "HTTP/1.1"
    received: list[tuple[str, Any, str | None]]

    def do_GET(self) -> None:
        second = {"id": "second", "sampling_defaults": {"temperature": 0.6, "top_k": 20}}
        self._json(200, {"data": [{"id": "first"}, second]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.received.append((self.path, body, self.headers.get("Authorization")))
        if body["model"] == "missing":
            self._json(404, {"error": {"message": "no such model"}})
            return
        is_chat = self.path.endswith("/chat/completions")
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        if body["model"] == "thinks":
            self.wfile.write(b'data: {"choices": [{"delta": {"reasoning_content": "Hm.", "reasoning": "Hm."}}]}\n\n')
        for text, reason in (("Hé", None), ("llo", "stop")):
            content: dict[str, Any] = {"delta": {"content": text}} if is_chat else {"text": text}
            event = {"choices": [{**content, "finish_reason": reason}]}
            self.wfile.write(b": ping\n\ndata: " + json.dumps(event).encode() + b"\n\n")
        if body["model"] == "breaks":
            self.wfile.write(b'data: {"error": {"message": "out of luck"}}\n\n')
        self.wfile.write(b"data: [DONE]\n\n")

    def _json(self, status: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *ignored: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Handler.received = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()
        thread.join()


class TestServerSource:
    @pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
    def test_chat(self, server, suffix):
        source = ServerSource(server + suffix, api_key="sesame")
        pieces = list(source.chat([user("hi")], SamplingParams(temperature=0.5, logit_bias={7: 1.0})))
        assert "".join(piece.text for piece in pieces) == "Héllo"
        assert pieces[-1].finish_reason == "stop"
        path, body, key = Handler.received[0]
        assert (path, key) == ("/v1/chat/completions", "Bearer sesame")
        assert body == {
            "model": "first", "stream": True, "messages": [user("hi")], "temperature": 0.5, "logit_bias": {"7": 1.0},
        }  # fmt: skip

    def test_what_a_model_thinks_and_how_an_answer_goes_on(self, server):
        source = ServerSource(server, model="thinks")
        pieces = list(source.chat([user("hi"), assistant("He")], SamplingParams(), continues=True))
        assert pieces[0] == Piece("Hm.", 1, thought=True)
        assert "".join(piece.text for piece in pieces if not piece.thought) == "Héllo"
        body = Handler.received[0][1]
        assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)

    def test_complete(self, server):
        pieces = list(ServerSource(server, model="second").complete("Once", SamplingParams(max_tokens=3)))
        assert "".join(piece.text for piece in pieces) == "Héllo"
        assert Handler.received[0][:2] == (
            "/v1/completions",
            {"model": "second", "stream": True, "prompt": "Once", "max_tokens": 3, "temperature": 1.0, "top_k": 0},
        )  # fmt: skip

    def test_defaults_are_what_the_server_says_of_the_model(self, server):
        assert ServerSource(server, model="second").sampling_defaults == SamplingParams(temperature=0.6, top_k=20)
        assert ServerSource(server).sampling_defaults == SamplingParams()

    @pytest.mark.parametrize(("model", "words"), [("missing", "404: no such model"), ("breaks", "out of luck")])
    def test_errors_are_the_servers_words(self, server, model, words):
        with pytest.raises(AphroditeError, match=words):
            list(ServerSource(server, model=model).complete("x", SamplingParams()))

    def test_no_server(self):
        with pytest.raises(AphroditeError, match="Is it running"):
            ServerSource("http://127.0.0.1:9")

    @pytest.mark.parametrize("url", ["ftp://x", "http://", "http://x:notaport", "http://x:99999"])
    def test_wrong_addresses(self, url):
        with pytest.raises(ConfigError, match="--url"):
            ServerSource(url, model="m")


def test_printable_keeps_text_and_drops_what_steers_a_terminal():
    assert printable("a\x1b[31m\tb\r\n\x07é\x9b漢🙂") == "a[31m\tb\né漢🙂"


def test_sampling_texts_of_every_kind():
    params = sampling_from_texts(
        {"seed": "7", "top-p": "0.9", "stop_token_ids": ["3", "4"], "logprobs_mode": "processed", "n": "2"}
    )
    assert params == SamplingParams(seed=7, top_p=0.9, stop_token_ids=(3, 4), logprobs_mode="processed", n=2)
