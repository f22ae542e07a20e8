"""The command as a whole: start-up, help, exit codes, and that the flags are those of the tables."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import typer
from typer.testing import CliRunner

from aphrodite import platforms
from aphrodite.cli import report
from aphrodite.cli.main import app, main
from aphrodite.config import EngineConfig, ServerSettings, settings_table
from aphrodite.kernels.cpu import library
from aphrodite.sampling.fields import parameter_table

runner = CliRunner()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for row in settings_table().values():
        monkeypatch.delenv(row.env, raising=False)
    monkeypatch.delenv("APHRODITE_CONFIG", raising=False)
    monkeypatch.setenv("COLUMNS", "200")


def flags_of(*path: str) -> set[str]:
    command = typer.main.get_command(app)
    for name in path:
        command = command.commands[name]
    return {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}


def run_main(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["aphrodite", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, capsys.readouterr().err


class TestStart:
    @pytest.mark.parametrize(
        "code",
        [
            "import aphrodite; aphrodite.EngineConfig; aphrodite.SamplingParams; aphrodite.RequestOutput",
            "import aphrodite.cli.main as m; m.app(['--help'], standalone_mode=False)",
            "import aphrodite.cli.main as m; m.app(['run', '--help'], standalone_mode=False)",
        ],
    )
    def test_no_torch_is_imported(self, code):
        heavy = "{'torch', 'transformers', 'fastapi', 'numpy'} & set(sys.modules)"
        check = f"import sys; sys.exit(str({heavy}) if {heavy} else 0)"
        done = subprocess.run([sys.executable, "-c", f"{code}; {check}"], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def test_the_root_package_names_what_it_lacks(self):
        import aphrodite

        with pytest.raises(AttributeError, match="nothing_here"):
            _ = aphrodite.nothing_here
        assert set(aphrodite.__all__) <= set(dir(aphrodite))

    def test_version(self):
        result = runner.invoke(app, ["--version"])
        assert result.exit_code == 0
        assert result.stdout.startswith("aphrodite ")


class TestFlags:
    def test_run_has_every_setting(self):
        expected = {row.flag for row in settings_table().values() if row.name != "model"}
        assert expected <= flags_of("run")
        assert flags_of("run") == flags_of("serve")

    def test_chat_and_complete_have_every_engine_setting_and_sampling_parameter(self):
        hidden = {"n", "logprobs", "prompt_logprobs", "logprobs_mode", "sampler_trace"}
        sampling = {"--" + row.name.replace("_", "-") for row in parameter_table() if row.name not in hidden}
        engine = {row.flag for row in settings_table().values() if row.owner is EngineConfig}
        server = {row.flag for row in settings_table().values() if row.owner is ServerSettings} - {"--api-key"}
        assert engine | sampling <= flags_of("complete")
        assert (engine | sampling) - {"--model"} <= flags_of("chat")
        assert not server & flags_of("chat")


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["srve"], "Did you mean 'serve'"),
            (["run", "--max-modl-len", "3"], "--max-model-len"),
            (["run", "--activations", "int9"], "Did you mean int8?"),
            (["run", "--port", "65536"], "from 0 to 65535"),
            (["complete"], "PROMPT"),
            (["complete", "x", "--temperature", "hot"], "temperature"),
            (["complete", "x", "--top-p", "1.5"], "top_p"),
            (["complete", "x", "--logit-bias", "{"], "logit_bias"),
            (["bench", "latency", "--batch-size", "0"], "--batch-size"),
        ],
    )
    def test_wrong_usage_ends_with_2_and_says_what_is_meant(self, arguments, words):
        result = runner.invoke(app, arguments)
        assert result.exit_code == 2
        assert words in " ".join(result.output.replace("│", " ").split())

    @pytest.mark.parametrize(
        ("arguments", "environ", "words"),
        [
            (["run"], {"APHRODITE_PROT": "1"}, "Did you mean APHRODITE_PORT?"),
            (["run", "--config", "missing.yaml"], {}, "cannot read the configuration file missing.yaml"),
            (["models", "inspect", "no-such-model"], {}, "no-such-model"),
            (["chat", "--api-key", "x"], {}, "--url"),
            (["complete", "x", "--url", "ftp://x"], {}, "not an address"),
            (["complete", ""], {}, "PROMPT is empty"),
        ],
    )
    def test_a_users_error_is_one_line_and_1(self, monkeypatch, capsys, tmp_path, arguments, environ, words):
        monkeypatch.chdir(tmp_path)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        code, error = run_main(monkeypatch, capsys, *arguments)
        assert code == 1
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert words in error

    def test_a_damaged_model_is_one_line_and_1(self, monkeypatch, capsys, tmp_path):
        broken = tmp_path / "broken.gguf"
        broken.write_bytes(b"GGUF" + bytes(range(60)))
        code, error = run_main(monkeypatch, capsys, "models", "inspect", str(broken))
        assert (code, error.count("\n")) == (1, 1)
        assert "broken.gguf" in error


class TestConfigCommands:
    def test_init_then_check(self, tmp_path):
        path = tmp_path / "a.yaml"
        assert runner.invoke(app, ["config", "init", str(path)]).exit_code == 0
        text = path.read_text() + "port: 8080\napi_key: [sesame]\nkv_cache_memory: 2GiB\n"
        path.write_text(text)
        result = runner.invoke(app, ["config", "check", str(path)])
        assert result.exit_code == 0
        assert "port: 8080" in result.stdout
        assert "kv_cache_memory: 2GiB" in result.stdout
        assert "sesame" not in result.stdout

    def test_check_tells_which_models_are_offered(self, monkeypatch, capsys, tmp_path):
        path = tmp_path / "a.yaml"
        (tmp_path / "tale.gguf").touch()
        path.write_text(f"models_dir: {tmp_path}\nmodels: [{{name: writer, model: ORG/NAME}}]\n")
        result = runner.invoke(app, ["config", "check", str(path)])
        assert result.exit_code == 0
        assert "models offered: writer, tale" in result.stdout
        assert "it sets 2 names" in result.stdout
        path.write_text("models: [{name: writer}]\n")
        code, error = run_main(monkeypatch, capsys, "config", "check", str(path))
        assert (code, "names no `model`" in error) == (1, True)

    def test_init_does_not_replace_a_file(self, monkeypatch, capsys, tmp_path):
        path = tmp_path / "a.yaml"
        path.write_text("port: 1\n")
        code, error = run_main(monkeypatch, capsys, "config", "init", str(path))
        assert code == 1
        assert "--force" in error
        assert path.read_text() == "port: 1\n"
        assert runner.invoke(app, ["config", "init", str(path), "--force"]).exit_code == 0
        assert "#port: 2242" in path.read_text()

    def test_check_reports_the_line(self, monkeypatch, capsys, tmp_path):
        path = tmp_path / "a.yaml"
        path.write_text("\nprot: 1\n")
        code, error = run_main(monkeypatch, capsys, "config", "check", str(path))
        assert code == 1
        assert "a.yaml:2: prot is not a setting. Did you mean port?" in error


class TestDoctor:
    def test_json_has_every_part(self):
        result = runner.invoke(app, ["doctor", "--json", "--no-load"])
        assert result.exit_code == 0
        content = json.loads(result.stdout)
        assert {"Software", "Machine", "Devices", "Native CPU library", "Settings", "Model"} == set(content)
        assert content["Software"]["python"] == ".".join(map(str, sys.version_info[:3]))

    def test_it_says_what_is_set_and_where(self, monkeypatch):
        monkeypatch.setenv("APHRODITE_THREADS", "1")
        monkeypatch.setenv("APHRODITE_API_KEY", "sesame")
        output = runner.invoke(app, ["doctor", "--json", "--no-load"]).stdout
        assert json.loads(output)["Settings"] == {
            "threads": "1 (environment variable APHRODITE_THREADS)",
            "api_key": "(hidden) (environment variable APHRODITE_API_KEY)",
        }
        assert "sesame" not in output

    def test_an_instruction_set_that_the_library_lacks_is_told_of(self, monkeypatch):
        """Of the processor's, that is."""
        loaded = library.NativeLibrary(SimpleNamespace(aph_select_isa=lambda name: b"avx2" * (name == b"avx2")), "avx2")
        monkeypatch.setattr(library, "load", lambda: loaded)
        for flags, told in ((library.ISA_FLAGS["avx512"], "avx512, which"), (library.ISA_FLAGS["avx2"], None)):
            monkeypatch.setattr("aphrodite.cli.machine.instruction_sets", lambda flags=flags: list(flags))
            rows = json.loads(runner.invoke(app, ["doctor", "--json", "--no-load"]).stdout)["Native CPU library"]
            assert rows["instruction set"] == "avx2"
            assert rows.get("left out", "").startswith(told) if told else "left out" not in rows

    def test_a_full_card_is_told_of(self, monkeypatch):
        def refuse(device):
            raise RuntimeError("CUDA error: out of memory\nmore")

        card = platforms.Platform(kind="cuda", name="Card", architecture="sm_90", capability=(9, 0))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(platforms, "unusable_reason", lambda: None)
        monkeypatch.setattr(platforms, "platform_of", lambda device: card)
        monkeypatch.setattr(platforms, "memory", refuse)
        output = runner.invoke(app, ["doctor", "--json", "--no-load"]).stdout
        shown = json.loads(output)["Devices"]["cuda:0"]
        assert shown.startswith("Card")
        assert shown.endswith("it does not tell its memory: CUDA error: out of memory")


@pytest.mark.parametrize("needs_key", [False, True])
def test_the_curl_line_is_a_shell_command_with_a_valid_body(needs_key):
    words = shlex.split(report.curl_line("http://127.0.0.1:2242", 'it\'s "quoted"', needs_key=needs_key))
    assert words[:3] == ["curl", "-N", "http://127.0.0.1:2242/v1/chat/completions"]
    body = json.loads(words[words.index("-d") + 1])
    assert body["model"] == 'it\'s "quoted"'
    assert body["messages"][0]["role"] == "user"
    assert any(word.startswith("Authorization: Bearer ") for word in words) is needs_key
