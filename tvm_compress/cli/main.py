"""`tvm-compress`: the table of commands, and what happens to errors."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer

from tvm_compress import __version__
from tvm_compress.cli import compress, cost, device, inspect, report, search, tune, use
from tvm_compress.cli.output import print_json
from tvm_compress.errors import TvmCompressError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Makes trained neural networks small and fast on the CPUs that people have.",
)

# The base of every usage error, ClickException: typer carries click inside itself without exporting the name.
UsageProblem: Any = typer.BadParameter.__mro__[2]

COMMANDS: dict[str, Callable[..., None]] = {
    "inspect": inspect.inspect,
    "search": search.search,
    "compress": compress.compress,
    "compile": compress.compile_artifact,
    "tune": tune.tune,
    "verify": use.verify,
    "run": use.run,
    "benchmark": use.benchmark,
    "report": report.report,
    "demo": search.demo,
}
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)
app.add_typer(device.app, name="device")
app.add_typer(cost.app, name="cost")


def _version(show: bool) -> None:
    if show:
        typer.echo(f"tvm-compress {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version."
    ),
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code: 0, 2 for what the user can mend, 130 when interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        result = app(words, prog_name="tvm-compress", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        return _interrupted()
    except UsageProblem as error:
        if "--json" in words:
            print_json({"error": {"type": "UsageError", "message": error.format_message(), "hint": ""}})
        error.show()
        return 2
    except TvmCompressError as error:
        if "--debug" in words:
            raise
        if "--json" in words:
            print_json(
                {"error": {"type": type(error).__name__, "message": error.message, "hint": error.hint}}
            )
        else:
            typer.echo(f"Error: {' '.join(str(error).split())}", err=True)
        return 2
    return result if isinstance(result, int) else 0


def _interrupted() -> int:
    typer.echo("Interrupted. A search goes on from its last checkpoint with the same --study.", err=True)
    return 130


def entry() -> None:
    """Console script."""
    sys.exit(main())
