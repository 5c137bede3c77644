"""The command `cache-server`: one parser, one verb a function."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from cache_server import __version__
from cache_server import config as configuration
from cache_server.config import Config, ConfigError
from cache_server.values import duration_ms

EXIT_FAILED = 1
EXIT_USAGE = EXIT_UNKNOWN = 2
TOOLS = {
    "status": "what the server holds and does",
    "ping": "ask whether it answers, and how fast",
    "clear": "drop every chunk",
    "workers": "the engine processes it knows",
    "top": "a live table",
}
PROBES = {
    "live": "does it move? A restart would help if not",
    "ready": "may traffic come?",
    "deep": "does a whole job work: store, look up, read back?",
}
ORDERS = {
    "pause": "take no new work; what is held is kept (ends by itself after pause_limit)",
    "resume": "take work again",
}
HOLDS = {
    "hold": "keep readiness red for an owner; it serves on, and the hold ends by itself after --ttl",
    "unhold": "end that owner's hold",
}
HOLD_TTL = duration_ms("1s", "24h")
OWNER_CHARACTERS_MAX = 64
REASON_CHARACTERS_MAX = 200


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
    for words in configuration.misspelt(os.environ):
        print(f"cache-server: warning: {words}", file=sys.stderr)
    if options.verb == "config":
        width = max(map(len, settings))
        paths = {"dir": config.runtime_dir, "arena": config.arena_path, "log_file": config.log_path}
        for name, setting in settings.items():
            text = str(paths.get(name, setting.text)) or "(none)"
            print(f"{name:{width}}  {text:32}  {setting.source}")
        return 0
    if options.verb in TOOLS:
        from cache_server import tools  # noqa: PLC0415  the server starts without them

        return tools.run(options.verb, config.runtime_dir, as_json=getattr(options, "json", False))
    if options.verb == "check":
        from cache_server import check  # noqa: PLC0415

        return check.run(config, options.probe)
    if options.verb == "k8s-probes":
        return _print_probes(config, by_exec=options.exec)
    return _hold(config, options) if options.verb in HOLDS else _operate(config, options)


def _operate(config: Config, options: argparse.Namespace) -> int:
    from cache_server import control, daemon, orders, runtime  # noqa: PLC0415  the tools start without them

    try:
        match options.verb:
            case "stop":
                print("stopped" if control.stop(config) else f"no server runs on {config.dir}")
                if options.purge:
                    arena = config.arena_path if config.arena else None
                    removed = runtime.purge(config.runtime_dir, arena)
                    print(
                        f"removed {', '.join(map(str, removed))}"
                        if removed
                        else "there was nothing to remove"
                    )
            case "pause" | "resume":
                control.order(config, orders.PAUSE if options.verb == "pause" else orders.RESUME)
            case "run" if options.daemon:
                print(f"serving {config.dir}, pid {daemon.run_in_background(config)}")
            case _:
                daemon.log_to_stderr(config.log_level)
                daemon.run(config)
    except runtime.CannotTellError as error:
        print(f"cache-server: {error}", file=sys.stderr)
        return EXIT_UNKNOWN
    except (daemon.StartError, control.ControlError, runtime.RuntimeDirError) as error:
        print(f"cache-server: {error}", file=sys.stderr)
        return EXIT_FAILED
    return 0


def _hold(config: Config, options: argparse.Namespace) -> int:
    from cache_server import hold_file, runtime  # noqa: PLC0415  the server's start needs none of it
    from cache_server.clock import monotonic_ms  # noqa: PLC0415
    from cache_server.holds import Hold  # noqa: PLC0415

    now_ms = monotonic_ms()
    try:
        if not runtime.is_served(config.runtime_dir):
            print(f"cache-server: no server runs on {config.dir}", file=sys.stderr)
            return EXIT_FAILED
        if options.verb == "hold":
            until_ms = now_ms + options.ttl
            hold_file.hold(config.runtime_dir, Hold(options.owner, options.reason, until_ms), now_ms)
        elif not hold_file.unhold(config.runtime_dir, options.owner, now_ms):
            print(f"cache-server: {options.owner} holds nothing", file=sys.stderr)
            return EXIT_FAILED
    except runtime.CannotTellError as error:
        print(f"cache-server: {error}", file=sys.stderr)
        return EXIT_UNKNOWN
    except hold_file.HoldError as error:
        print(f"cache-server: {error}", file=sys.stderr)
        return EXIT_FAILED
    except OSError as error:
        advice = "run this as the user of the server, or as a member of its `group`"
        print(f"cache-server: {error.filename}: {error.strerror}: {advice}", file=sys.stderr)
        return EXIT_FAILED
    return 0


def _text(most: int) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not 1 <= len(text.strip()) <= most or not text.isprintable():
            raise argparse.ArgumentTypeError(f"expected 1 to {most} printable characters")
        return text.strip()

    return parse


def _ttl(text: str) -> int:
    try:
        return HOLD_TTL(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _print_probes(config: Config, *, by_exec: bool) -> int:
    from cache_server.probes import ProbeError, as_yaml, probes  # noqa: PLC0415  nobody else needs them

    try:
        print(as_yaml(probes(config, by_exec=by_exec)))
    except ProbeError as error:
        print(f"cache-server: {error}", file=sys.stderr)
        return EXIT_USAGE
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cache-server",
        description="Keeps the KV cache of finished prompts in shared memory for the engines of this host.",
        epilog="Every option can also be set as CACHE_SERVER_<OPTION> in the environment, or in a TOML file.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    common = argparse.ArgumentParser(add_help=False)
    server = common.add_argument_group("options of the server")
    server.add_argument("--config", metavar="FILE", help="TOML file with any of these options")
    for name, key in configuration.KEYS.items():
        default = f" (default {key.default})" if key.default else ""
        server.add_argument(f"--{name.replace('_', '-')}", dest=name, metavar="…", help=key.help + default)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verb = verbs.add_parser("run", parents=[common], help="serve, in the foreground")
    verb.add_argument("--daemon", action="store_true", help="serve in the background; returns when it serves")
    verb = verbs.add_parser("stop", parents=[common], help="drain the server and wait for its end")
    verb.add_argument("--purge", action="store_true", help="then remove the arena and all other files")
    for name, text in TOOLS.items():
        verb = verbs.add_parser(name, parents=[common], help=text)
        if name in ("status", "workers"):
            verb.add_argument("--json", action="store_true", help="for machines")
    for name, text in ORDERS.items():
        verbs.add_parser(name, parents=[common], help=text)
    for name, text in HOLDS.items():
        verb = verbs.add_parser(name, parents=[common], help=text)
        verb.add_argument("--owner", required=True, type=_text(OWNER_CHARACTERS_MAX), help="who holds")
        if name == "hold":
            verb.add_argument("--ttl", required=True, type=_ttl, help="1s to 24h; said again it is prolonged")
            verb.add_argument("--reason", required=True, type=_text(REASON_CHARACTERS_MAX), help="for people")
    verb = verbs.add_parser("check", parents=[common], help="is it well? exit 0: yes, 1: no, 2: can't tell")
    probes = verb.add_mutually_exclusive_group(required=True)
    for name, text in PROBES.items():
        probes.add_argument(f"--{name}", dest="probe", action="store_const", const=name, help=text)
    verb = verbs.add_parser("k8s-probes", parents=[common], help="probes for Kubernetes, for these options")
    verb.add_argument("--exec", action="store_true", help="by `check` in the container, not over HTTP")
    verbs.add_parser("config", parents=[common], help="the effective options and where each comes from")
    for verb in verbs.choices.values():
        verb.allow_abbrev = False  # `--pu` is not to purge
        verb.usage = f"{verb.prog} [OPTION …]"
    return parser
