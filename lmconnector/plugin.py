"""vLLM's way to the connector by its name alone: the entry point `vllm.general_plugins`.

vLLM calls `register` in every process it starts, with any connector or none; and `connector.py` calls it too,
as MultiConnector looks its members' statistics up by name also where the module path was given.
"""

import contextlib
import logging

import lmconnector.cores  # noqa: F401  it notes what cores there are before vLLM binds this process to some

CONNECTOR = "LMConnector"
MODULE = "lmconnector.connector"

log = logging.getLogger(f"vllm.{__name__}")


def register() -> None:
    """Tells the name and where it would be found; nothing is imported before somebody asks for it."""
    try:
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory  # noqa: PLC0415

        with contextlib.suppress(ValueError):  # registered already
            KVConnectorFactory.register_connector(CONNECTOR, MODULE, CONNECTOR)
    except Exception:  # it is no reason for an engine not to start: most run without this connector
        log.exception(
            'plugin: vLLM could not be told of %s; give "kv_connector_module_path": "%s"', CONNECTOR, MODULE
        )
