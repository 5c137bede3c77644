"""The command `lmconnector`: one parser, one verb a function.  It starts without torch and vLLM."""

import argparse
import sys
from pathlib import Path

from cache_server.protocol.presence import why_no_socket
from lmconnector import __version__, launch
from lmconnector.config import Options
from lmconnector.errors import ConfigError

EXIT_USAGE = 2
ALGORITHMS = ("sha256", "sha256_cbor", "xxhash", "xxhash_cbor")


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    try:
        sys.exit(_run(options))
    except ConfigError as error:
        print(f"lmconnector: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)


def _run(options: argparse.Namespace) -> int:
    match options.verb:
        case "config":
            return _config(options)
        case "doctor":
            from lmconnector.doctor import examination  # noqa: PLC0415  `config` does without

            question = examination.Question(options.dir, options.model, options.prefix_caching_hash_algo)
            return examination.run(question, json=options.json)
        case "bench":
            from lmconnector.bench import main as bench  # noqa: PLC0415

            return bench.run(options.dir, json=options.json)
        case _:
            from lmconnector.demo.main import main as demo  # noqa: PLC0415

            return demo(Path(options.out))


def _config(options: argparse.Namespace) -> int:
    fields = Options.__struct_fields__
    flags = {name: value for name in fields if (value := getattr(options, name)) is not None}
    given = launch.options(options.options, flags)
    print(launch.serve_command(options.serve, given) if options.serve else launch.transfer_config(given))
    return 0


def _dir(text: str) -> Path:
    try:
        path = Path(text).expanduser().absolute()
    except RuntimeError as error:  # no such user
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
    if why := why_no_socket(path):
        raise argparse.ArgumentTypeError(f"{text!r}: {why}")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lmconnector", description="Connects vLLM to the cache server of this host."
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verb = verbs.add_parser("config", help="print the JSON for vLLM's --kv-transfer-config")
    verb.add_argument("options", nargs="*", metavar="key=value", help="an option of the connector")
    defaults = Options()
    for name in Options.__struct_fields__:
        text = f"default {getattr(defaults, name)}"
        verb.add_argument(f"--{name.replace('_', '-')}", dest=name, metavar="…", help=text)
    verb.add_argument("--serve", metavar="MODEL", help="print the whole command `vllm serve MODEL …`")
    verb = verbs.add_parser("doctor", help="look at server, arena and engine, and say what to do")
    verb.add_argument("--dir", type=_dir, default=defaults.dir, metavar="DIR", help=f"default {defaults.dir}")
    verb.add_argument("--model", metavar="MODEL", help="can this model's KV cache be cached?")
    verb.add_argument(
        "--prefix-caching-hash-algo", choices=ALGORITHMS, default=ALGORITHMS[0], help="as vLLM is given it"
    )
    verb.add_argument("--json", action="store_true", help="for machines")
    verb = verbs.add_parser("bench", help="how fast copies and round trips are on this machine; 10 s")
    verb.add_argument(
        "--dir",
        type=_dir,
        metavar="DIR",
        help="of a running server; default: one is started, and ended, for this",
    )
    verb.add_argument("--json", action="store_true", help="for machines")
    verb = verbs.add_parser("demo", help="a real vLLM through the cache server's death and return")
    verb.add_argument(
        "--out", default="out", metavar="DIR", help="where picture, figures and logs go; default out"
    )
    return parser


if __name__ == "__main__":
    main()
