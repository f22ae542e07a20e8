"""The settings table: sources, precedence, checks, and that everything made from it agrees with it."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from aphrodite.config import EngineConfig, ServerSettings, make_engine_config, settings_table
from aphrodite.config_file import example_config
from aphrodite.config_values import format_value, parse_scaled, parse_value
from aphrodite.errors import ConfigError
from aphrodite.settings import OTHER_ENV, resolve


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


class TestPrecedence:
    def test_nothing_given_gives_defaults(self):
        settings = resolve(environ={})
        assert settings.engine == EngineConfig()
        assert settings.server == ServerSettings()
        assert settings.origins == {}

    def test_flags_over_environment_over_file_over_default(self, tmp_path):
        file = write(tmp_path / "a.yaml", "port: 1\nmax_num_seqs: 2\nmax_logprobs: 3\n")
        environ = {"APHRODITE_PORT": "10", "APHRODITE_MAX_NUM_SEQS": "20"}
        settings = resolve({"port": "100", "host": None}, config_file=file, environ=environ)
        assert (settings.server.port, settings.engine.max_num_seqs, settings.engine.max_logprobs) == (100, 20, 3)
        assert settings.server.host == "127.0.0.1"
        assert settings.origins == {
            "port": "--port",
            "max_num_seqs": "environment variable APHRODITE_MAX_NUM_SEQS",
            "max_logprobs": f"{file}:3: max_logprobs",
        }

    def test_the_file_can_be_named_by_a_variable(self, tmp_path):
        file = write(tmp_path / "a.yaml", "port: 77\n")
        assert resolve(environ={"APHRODITE_CONFIG": str(file)}).server.port == 77

    def test_a_flag_that_says_false_beats_a_file_that_says_true(self, tmp_path):
        file = write(tmp_path / "a.yaml", "log_requests: true\n")
        assert resolve({"log_requests": False}, config_file=file, environ={}).server.log_requests is False

    def test_an_empty_variable_is_not_set(self):
        assert resolve(environ={"APHRODITE_MODEL": "", "APHRODITE_PORT": ""}).engine.model is None

    def test_every_setting_can_come_from_every_source(self, tmp_path):
        for name, row in settings_table().items():
            value = row.default
            if row.kind == "list":
                value = ("a", "b")
            text = format_value(row, value)
            plain = ",".join(value) if row.kind == "list" else text.strip('"')
            file = write(tmp_path / "one.yaml", f"{name}: {text}\n")
            if value is None and row.kind == "str":
                text = plain = None
            expected = {name: value}
            for settings in (
                resolve({name: plain}, environ={}),
                resolve(environ={row.env: plain} if plain else {}),
                resolve(config_file=file, environ={}),
            ):
                config = settings.engine if row.owner is EngineConfig else settings.server
                assert {name: getattr(config, name)} == expected


class TestNames:
    @pytest.mark.parametrize(
        ("environ", "message"),
        [
            ({"APHRODITE_MAX_MODL_LEN": "1"}, "Did you mean APHRODITE_MAX_MODEL_LEN?"),
            ({"APHRODITE_PORT": "tcp://10.0.0.1:80"}, "Kubernetes"),
            ({"APHRODITE_SERVICE_HOST": "10.0.0.1"}, "enableServiceLinks"),
        ],
    )
    def test_unknown_variables_are_refused(self, environ, message):
        with pytest.raises(ConfigError, match=re.escape(message)):
            resolve(environ=environ)

    def test_other_programs_variables_are_left_alone(self):
        assert resolve(environ={"PATH": "x", "MY_APHRODITE_X": "y"}).origins == {}

    def test_documented_variables_without_a_setting_are_accepted(self):
        assert resolve(environ={name: "" if name == "APHRODITE_CONFIG" else "avx2" for name in OTHER_ENV}).origins == {}

    def test_unknown_keys_name_file_line_and_a_guess(self, tmp_path):
        file = write(tmp_path / "a.yaml", "port: 1\n\nmax-modl-len: 4\n")
        with pytest.raises(
            ConfigError, match=r"a\.yaml:3: max-modl-len is not a setting\. Did you mean max_model_len\?"
        ):
            resolve(config_file=file, environ={})

    def test_keys_may_be_spelled_as_flags(self, tmp_path):
        file = write(tmp_path / "a.yaml", "max-model-len: 32K\n")
        assert resolve(config_file=file, environ={}).engine.max_model_len == 32768

    def test_a_repeated_key_is_refused_with_both_lines(self, tmp_path):
        file = write(tmp_path / "a.yaml", "max_model_len: 1\nmax-model-len: 2\n")
        with pytest.raises(ConfigError, match=r":2: max-model-len is already set in line 1"):
            resolve(config_file=file, environ={})

    @pytest.mark.parametrize("text", ["- a\n", "just text\n", "a: [1\n", "port: !!python/object:os.system {}\n"])
    def test_files_that_are_no_settings_are_refused(self, tmp_path, text):
        with pytest.raises(ConfigError):
            resolve(config_file=write(tmp_path / "a.yaml", text), environ={})

    def test_missing_and_unreadable_files_are_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="No such file"):
            resolve(config_file=tmp_path / "none.yaml", environ={})
        (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ConfigError, match="UTF-8"):
            resolve(config_file=tmp_path / "b.yaml", environ={})

    def test_an_empty_file_sets_nothing(self, tmp_path):
        assert resolve(config_file=write(tmp_path / "a.yaml", "# nothing\n"), environ={}).origins == {}


class TestValues:
    @pytest.mark.parametrize(
        ("name", "text", "value"),
        [
            ("max_model_len", "4096", 4096),
            ("max_model_len", "32k", 32_000),
            ("max_model_len", "32K", 32_768),
            ("max_model_len", "1.5k", 1_500),
            ("max_model_len", "1m", 1_000_000),
            ("max_model_len", "131_072", 131_072),
            ("max_model_len", "auto", None),
            ("max_model_len", 4096, 4096),
            ("kv_cache_memory", "4GiB", 4 * 2**30),
            ("kv_cache_memory", "1.5 GiB", 3 * 2**29),
            ("kv_cache_memory", "2GB", 2 * 10**9),
            ("kv_cache_memory", "512MiB", 2**29),
            ("kv_cache_memory", 123456, 123456),
            ("async_depth", "0", 0),
            ("enable_prefix_caching", "no", False),
            ("enable_prefix_caching", "TRUE", True),
            ("api_key", "a, b,,", ("a", "b")),
            ("api_key", ["a", "b"], ("a", "b")),
            ("api_key", [], ()),
            ("root_path", "", ""),
            ("shutdown_timeout", "2.5", 2.5),
            ("shutdown_timeout", 2, 2.0),
            ("activations", "int8", "int8"),
            ("model", "auto", "auto"),
        ],
    )
    def test_accepted(self, name, text, value):
        assert parse_value(settings_table()[name], text, "here") == value

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("max_model_len", "32Q"),
            ("max_model_len", "0"),
            ("max_model_len", "-1"),
            ("max_model_len", "1.0001k"),
            ("max_model_len", "1e3"),
            ("max_model_len", ""),
            ("max_model_len", str(2**63)),
            ("max_model_len", 1.5),
            ("max_model_len", True),
            ("max_model_len", [1]),
            ("kv_cache_memory", "4G"),
            ("kv_cache_memory", "4k"),
            ("block_size", "17"),
            ("block_size", None),
            ("async_depth", "2"),
            ("threads", "2k"),
            ("port", "65536"),
            ("port", "0x10"),
            ("activations", "int9"),
            ("activations", 8),
            ("enable_prefix_caching", "maybe"),
            ("enable_prefix_caching", 2),
            ("api_key", 5),
            ("api_key", [5]),
            ("api_key", ""),
            ("api_key", [""]),
            ("api_key", ["a", " "]),
            ("served_model_name", ","),
            ("model", ""),
            ("host", " "),
            ("shutdown_timeout", "nan"),
            ("shutdown_timeout", "inf"),
            ("shutdown_timeout", "-1"),
            ("model", 5),
            ("host", None),
        ],
    )
    def test_refused_with_the_origin(self, name, value):
        with pytest.raises(ConfigError, match=r"^here: .*expected|^here: needs a value"):
            parse_value(settings_table()[name], value, "here")

    def test_a_wrong_choice_gets_a_guess(self):
        with pytest.raises(ConfigError, match=r"one of int16, int8, float32\. Did you mean int8\?"):
            resolve({"activations": "int-8"}, environ={})

    @given(st.integers(0, 2**40), st.sampled_from(["", "k", "m", "K", "M"]))
    def test_scaled_numbers_are_exact(self, number, suffix):
        scale = {"": 1, "k": 10**3, "m": 10**6, "K": 2**10, "M": 2**20}
        assert parse_scaled(f"{number}{suffix}", scale) == number * scale[suffix]

    @given(st.integers(1, 2**62))
    def test_sizes_survive_writing_and_reading(self, size):
        row = settings_table()["kv_cache_memory"]
        assert parse_value(row, format_value(row, size), "x") == size


class TestPython:
    def test_texts_are_read_as_flags_are(self):
        config = make_engine_config({"max_model_len": "32k", "served_model_name": ["a"], "threads": None})
        assert (config.max_model_len, config.served_model_name, config.threads) == (32_000, ("a",), None)

    def test_unknown_names_get_a_guess(self):
        with pytest.raises(ConfigError, match=r"Did you mean max_model_len\?"):
            make_engine_config({"max_model_length": 1})

    @pytest.mark.parametrize(
        "wrong",
        [
            {"max_model_len": "32k"},
            {"max_model_len": 0},
            {"max_num_seqs": True},
            {"activations": "int4"},
            {"served_model_name": "name"},
            {"served_model_name": (1,)},
            {"enable_prefix_caching": 1},
        ],
    )
    def test_construction_checks(self, wrong):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            EngineConfig(**wrong)

    def test_keys_do_not_show_in_logs(self):
        assert "sesame" not in repr(resolve({"api_key": ["sesame"]}, environ={}))


class TestTimes:
    @pytest.mark.parametrize(
        ("text", "seconds"),
        [("5m", 300.0), ("1h30m", 5400.0), ("90s", 90.0), ("1.5h", 5400.0), ("250ms", 0.25), ("7", 7.0)],
    )
    def test_times_have_units(self, text, seconds):
        assert resolve({"keep_alive": text}, environ={}).server.keep_alive == seconds

    @pytest.mark.parametrize("text", ["5 m", "m", "5x", "-5m", "5m-", "1e400"])
    def test_what_is_none_is_refused(self, text):
        with pytest.raises(ConfigError, match="a time such as 5m"):
            resolve({"keep_alive": text}, environ={})


class TestExampleFile:
    def test_it_names_every_setting_once_and_sets_none(self):
        text = example_config()
        assert yaml.safe_load(text) is None
        assert re.findall(r"(?m)^#(\w+):", text) == [*settings_table(), "models"]

    def test_without_the_marks_it_sets_exactly_the_defaults(self, tmp_path):
        text = re.sub(r"(?m)^#(?=\w+:)", "", example_config())
        settings = resolve(config_file=write(tmp_path / "a.yaml", text), environ={})
        assert settings.engine == EngineConfig()
        assert settings.server == ServerSettings()
        assert set(settings.origins) == set(settings_table())

    def test_every_field_is_documented(self):
        for owner in (EngineConfig, ServerSettings):
            for entry in fields(owner):
                assert settings_table()[entry.name].help.rstrip().endswith((".", ";")), entry.name
