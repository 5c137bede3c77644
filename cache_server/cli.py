"""The command `cache-server`: one parser, one verb a function."""

import argparse
import os
import sys
from pathlib import Path

from cache_server import __version__
from cache_server import config as configuration
from cache_server.config import ConfigError

EXIT_FAILED = 1
EXIT_USAGE = 2
TOOLS = {
    "status": "what the server holds and does",
    "ping": "ask whether it answers, and how fast",
    "clear": "drop every chunk",
    "workers": "the engine processes it knows",
    "top": "a live table",
}


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    try:
        sys.exit(_run(options))
    except ConfigError as error:
        print(f"cache-server: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)


def _run(options: argparse.Namespace) -> int:
    flags = {name: value for name in configuration.KEYS if (value := getattr(options, name)) is not None}
    variable = configuration.ENVIRONMENT_PREFIX + "CONFIG"
    config_file = options.config or os.environ.get(variable)
    settings = configuration.gather(flags, os.environ, Path(config_file) if config_file else None)
    config = configuration.parse(settings)
    if options.verb == "config":
        width = max(map(len, settings))
        for name, setting in settings.items():
            print(f"{name:{width}}  {setting.text or '(none)':24}  {setting.source}")
        return 0
    if options.verb in TOOLS:
        from cache_server import tools  # noqa: PLC0415  the server starts without them

        return tools.run(options.verb, config.runtime_dir, as_json=getattr(options, "json", False))
    from cache_server import daemon  # noqa: PLC0415  the tools start without it

    try:
        match options.verb:
            case "stop":
                running = daemon.stop(config, purge=options.purge)
                print("stopped" if running else f"no server runs on {config.dir}", end="")
                print("; its files are removed" if options.purge else "")
            case "run" if options.daemon:
                print(f"serving {config.dir}, pid {daemon.run_in_background(config)}")
            case _:
                daemon.log_to_stderr(config.log_level)
                daemon.run(config)
    except daemon.StartError as error:
        print(f"cache-server: {error}", file=sys.stderr)
        return EXIT_FAILED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cache-server",
        description="Keeps the KV cache of finished prompts in shared memory for the engines of this host.",
        epilog="Every option can also be set as CACHE_SERVER_<OPTION> in the environment, or in a TOML file.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--config", metavar="FILE", help="TOML file with any of these options")
    for name, key in configuration.KEYS.items():
        default = f" (default {key.default})" if key.default else ""
        common.add_argument(f"--{name.replace('_', '-')}", dest=name, metavar="…", help=key.help + default)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verb = verbs.add_parser("run", parents=[common], help="serve, in the foreground")
    verb.add_argument("--daemon", action="store_true", help="serve in the background; returns when it serves")
    verb = verbs.add_parser("stop", parents=[common], help="drain the server and wait for its end")
    verb.add_argument("--purge", action="store_true", help="then remove the arena and all other files")
    for name, text in TOOLS.items():
        verb = verbs.add_parser(name, parents=[common], help=text)
        if name in ("status", "workers"):
            verb.add_argument("--json", action="store_true", help="for machines")
    verbs.add_parser("config", parents=[common], help="the effective options and where each comes from")
    return parser
