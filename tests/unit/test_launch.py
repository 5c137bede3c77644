"""The JSON to paste into vLLM's command line."""

import json
import shlex

import pytest

from lmconnector.config import parse
from lmconnector.errors import ConfigError
from lmconnector.launch import options, serve_command, transfer_config


def error(*words: str, **flags: str) -> str:
    with pytest.raises(ConfigError) as caught:
        options(words, flags)
    return str(caught.value)


def test_without_options_it_is_what_vllm_needs() -> None:
    assert json.loads(transfer_config({})) == {
        "kv_connector": "LMConnector",
        "kv_connector_module_path": "lmconnector.connector",
        "kv_role": "kv_both",
    }


def test_options_are_typed() -> None:
    given = options(["chunk_tokens=512", "store_decode=true", "dir=/123"], {"heartbeat_interval_s": "2"})
    assert given == {"chunk_tokens": 512, "store_decode": True, "dir": "/123", "heartbeat_interval_s": 2.0}
    assert json.loads(transfer_config(given))["kv_connector_extra_config"] == given


def test_a_value_may_contain_what_parts_key_and_value() -> None:
    assert options(["dir=/dev/shm/a=b"], {}) == {"dir": "/dev/shm/a=b"}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("chunk_token=5", "unknown key 'chunk_token'; did you mean 'chunk_tokens'?"),
        ("chunk_tokens=five", "chunk_tokens = 'five': Expected `int`, got `str`"),
        ("chunk_tokens=0", "chunk_tokens = '0': Expected `int` >= 1"),
        ("store_decode=perhaps", "store_decode = 'perhaps'"),
        ("dir=", "dir = ''"),
        ("lookup_wait_ms=200", "lookup_wait_ms = 200: expected at most lookup_deadline_ms = 100"),
        ("chunk_tokens", "'chunk_tokens': expected key=value"),
    ],
)
def test_a_wrong_option_is_named_with_its_value(word: str, said: str) -> None:
    assert said in error(word)


@pytest.mark.parametrize(
    "key", ["heartbeat_interval_s", "heartbeat_timeout_s", "fail_after", "lookup_wait_ms"]
)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "abc", "", "1e400"])
def test_trap_07_values_that_make_no_sense_are_refused_with_key_and_value(key: str, value: str) -> None:
    assert f"{key} = {value!r}: " in error(f"{key}={value}")


@pytest.mark.parametrize("key", ["heartbeat_interval_s", "heartbeat_timeout_s", "fail_after", "chunk_tokens"])
def test_trap_07_nothing_is_no_interval_and_no_count(key: str) -> None:
    assert f"{key} = '0': " in error(f"{key}=0")


@pytest.mark.parametrize(("key", "least"), [("lookup_deadline_ms", 5), ("request_deadline_ms", 50)])
def test_a_deadline_that_no_answer_can_keep_is_refused_with_its_bound(key: str, least: int) -> None:
    assert error(f"{key}={least - 1}") == f"{key} = '{least - 1}': Expected `int` >= {least}"
    assert options([f"{key}={least}"], {})


def test_vllm_is_told_which_value_of_which_key_is_wrong() -> None:
    with pytest.raises(ConfigError) as wrong:
        parse({"chunk_tokens": "many"})
    assert str(wrong.value) == "kv_connector_extra_config: chunk_tokens = 'many': Expected `int`, got `str`"


def test_options_that_contradict_each_other_are_both_named() -> None:
    assert error("heartbeat_timeout_s=2") == (
        "kv_connector_extra_config: heartbeat_timeout_s = 2.0: expected at most heartbeat_interval_s = 1.0"
    )
    assert error("lookup_wait_ms=101") == (
        "kv_connector_extra_config: lookup_wait_ms = 101: expected at most lookup_deadline_ms = 100"
    )
    assert options(["heartbeat_timeout_s=1", "lookup_wait_ms=100"], {}), "as much as that is fine"


def test_an_option_given_twice_is_an_error() -> None:
    assert "chunk_tokens is given twice: '1' and '2'" in error("chunk_tokens=2", chunk_tokens="1")
    assert "twice" in error("chunk_tokens=2", "chunk_tokens=2")


def test_the_command_survives_a_shell() -> None:
    given = options(["dir=/dev/shm/it's here"], {})
    words = shlex.split(serve_command("some/model", given))
    assert words[:4] == ["vllm", "serve", "some/model", "--kv-transfer-config"]
    assert json.loads(words[4])["kv_connector_extra_config"] == given
