"""What to give to vLLM so that it uses the cache: the JSON of --kv-transfer-config, or the whole command."""

import json
import shlex
from collections.abc import Mapping, Sequence

import msgspec

from lmconnector.config import KINDS, parse
from lmconnector.errors import ConfigError
from lmconnector.plugin import CONNECTOR, MODULE


def options(words: Sequence[str], flags: Mapping[str, str]) -> dict[str, object]:
    """`words` are key=value; a key given twice, or as a flag too, is an error.  Raises `ConfigError`."""
    texts = dict(flags)
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"{word!r}: expected key=value, for instance chunk_tokens=512")
        if key in texts:
            raise ConfigError(f"{key} is given twice: {texts[key]!r} and {text!r}")
        texts[key] = text
    given = {key: _typed(key, text) for key, text in texts.items()}
    parse(given)
    return given


def transfer_config(given: Mapping[str, object]) -> str:
    config = {"kv_connector": CONNECTOR, "kv_connector_module_path": MODULE, "kv_role": "kv_both"}
    return json.dumps(config | ({"kv_connector_extra_config": given} if given else {}))


def serve_command(model: str, given: Mapping[str, object]) -> str:
    return shlex.join(["vllm", "serve", model, "--kv-transfer-config", transfer_config(given)])


def _typed(key: str, text: str) -> object:
    if key not in KINDS:
        return text  # `parse` knows what to say of an unknown key
    try:
        return msgspec.convert(text, KINDS[key], strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{key} = {text!r}: {error}") from error
