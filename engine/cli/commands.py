"""The command ``stepfuse``: its sub-commands, and the one place that turns errors into lines."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from stepfuse._version import __version__
from stepfuse.engine.cli.doctor import doctor
from stepfuse.engine.cli.errors import INTERRUPTED, describe
from stepfuse.engine.cli.printing import printing
from stepfuse.engine.cli.sample import EXAMPLES, sample
from stepfuse.engine.files.signals import terminating

# Commands whose modules load torch, and are therefore imported only when they run:
# name -> (module, function, first line of the help)
DEFERRED = {
    "generate": (
        "stepfuse.engine.cli.generate",
        "generate_command",
        "Make any number of images, resumably, on one machine or many.",
    ),
    "export": (
        "stepfuse.engine.cli.export",
        "export_command",
        "Write a network as ONNX or TensorRT, and check it against the reference.",
    ),
    "train": (
        "stepfuse.engine.cli.train",
        "train_command",
        "Train a network on your own images: a folder of pictures or an .npz file.",
    ),
    "likelihood": (
        "stepfuse.engine.cli.likelihood",
        "likelihood_command",
        "Bound how many bits images cost under a model.",
    ),
    "restore": (
        "stepfuse.engine.cli.restore",
        "restore_command",
        "Restore a picture: fill holes, sharpen, enlarge, reconstruct.",
    ),
    "bench": (
        "stepfuse.bench.command",
        "bench",
        "Time the sampling loop on this machine, beside other libraries.",
    ),
}

HELP = {"help_option_names": ["-h", "--help"]}
EPILOG = (
    "[bold]Start with[/bold]  stepfuse sample --out digits.png\n\n"
    "[bold]Something missing?[/bold]  stepfuse doctor says what this machine can run, and why not."
)

app = typer.Typer(
    name="stepfuse",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=HELP,
    epilog=EPILOG,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"stepfuse {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="With any command: show where an error was raised.")
    ] = False,
) -> None:
    """[bold]stepfuse[/bold] draws images from diffusion models: a trained denoiser goes in, images
    come out, as fast as the machine allows.

    Each command explains itself: [cyan]stepfuse sample --help[/cyan].
    """


app.command(epilog=EXAMPLES)(sample)
app.command()(doctor)


def _register(name: str, module: str, function: str, help_line: str) -> None:
    """Add a command that is imported, and parses its arguments itself, only when it is called."""

    def deferred(context: typer.Context) -> None:
        home = importlib.import_module(module)
        words, called = list(context.args), f"stepfuse {name}"
        chosen, examples = getattr(home, function), getattr(home, "EXAMPLES", None)
        # a first word that is one of the home's own commands, and no folder of that name
        others = getattr(home, "COMMANDS", {})
        if words and words[0] in others:
            called, chosen, examples = f"{called} {words[0]}", others[words.pop(0)], None
        command = typer.Typer(rich_markup_mode="rich", add_completion=False)
        command.command(context_settings=HELP, epilog=examples)(chosen)
        status = typer.main.get_command(command).main(
            args=words, prog_name=called, standalone_mode=False
        )
        raise typer.Exit(status if isinstance(status, int) else 0)

    app.command(
        name,
        help=help_line,
        add_help_option=False,
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    )(deferred)


for _name, (_module, _function, _help) in DEFERRED.items():
    if importlib.util.find_spec(_module) is not None:
        _register(_name, _module, _function, _help)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; never raises an Exception.

    0 is success, 2 a value or a given file that is not accepted, 1 any other failure, 130 Ctrl-C,
    143 SIGTERM, 129 SIGHUP. An error is one line on stderr; ``--debug`` anywhere among the
    arguments puts the traceback above it.

    Files that were written are a success also where the closing lines could not be printed, to a
    full disk say: then a note on stderr names them. Where printing is all that a command does, it
    has failed.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    with printing() as printed, terminating() as ended:
        try:
            status = _status(words, debug)
        except KeyboardInterrupt:
            status = INTERRUPTED
        if status == INTERRUPTED and ended.number is not None:
            status = 128 + ended.number
        return printed.judge(status)


def _status(words: list[str], debug: bool) -> int:
    try:
        status = typer.main.get_command(app).main(
            args=words, prog_name="stepfuse", standalone_mode=False
        )
        if status == INTERRUPTED:
            # before the command could say what is left
            _say("interrupted")
    except typer.Abort:
        return INTERRUPTED
    except Exception as error:
        # the line is empty where no arguments were given: the help has been printed
        line, status = describe(error)
        if debug:
            traceback.print_exc()
        if line:
            _say(line)
    return status if isinstance(status, int) else 0


def _say(line: str) -> None:
    Console(stderr=True).print(
        Text("error: ", style="bold red").append(line, style="default not bold"), soft_wrap=True
    )


def main() -> None:
    """The entry point of the command ``stepfuse``."""
    sys.exit(run())
