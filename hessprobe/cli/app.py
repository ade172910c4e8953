"""The command line: its commands, how a slip is answered, and what each end's exit code is."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated, Any, NoReturn

import typer

from hessprobe.cli.pages import compare, report, show
from hessprobe.cli.probe import probe_models
from hessprobe.cli.train import train
from hessprobe.cli.validate import validate_machine
from hessprobe.errors import RunFailed, UserError

app = typer.Typer(
    name="hessprobe",
    help="What curvature does a transformer's training throw away? Train, measure, keep, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_COMMANDS = {
    "train": train,
    "probe": probe_models,
    "report": report,
    "show": show,
    "compare": compare,
    "validate": validate_machine,
}
for _name, _command in _COMMANDS.items():
    app.command(_name)(_command)


def _say_version(wanted: bool) -> None:
    if wanted:
        import hessprobe

        print(f"hessprobe {hessprobe.__version__}")
        raise typer.Exit


@app.callback()
def hessprobe_itself(  # noqa: D103 (its words would stand in --help)
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


_INTERRUPTED = 130
_ONE_PROCESS = _COMMANDS.keys() - {"train"}
_MISTAKEN_CALL: Any = typer.BadParameter.__base__  # click's UsageError, wherever this typer keeps it


def main() -> None:
    """Runs the command line: exit 2 for a mistake in the call, 1 for a run that failed.

    Of several processes the first says it, since what one meets all do; but that one is lost, whoever is left says. After
    a mistake the first alone ends with 2: another one that did, torchrun would stop the first before it has said it.
    """
    from hessprobe.machine.torchrun import launched, leave

    try:
        _run_command_line()
    except SystemExit as end:
        if launched():
            leave(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
    except BaseException:
        if launched():  # a mistake of ours ends as one, too, and not in a signal
            traceback.print_exc()
            leave(1)
        raise


def _run_command_line() -> NoReturn:
    from hessprobe.machine.torchrun import is_first, launched

    try:
        if sys.argv[1:2] and sys.argv[1] in _ONE_PROCESS and launched():
            raise UserError(f"hessprobe {sys.argv[1]} runs in one process: call it without torchrun")
        # Not standalone: typer would load its formatter, a quarter of a second, to say that a word is misspelt.
        code = app(standalone_mode=False)
    except _MISTAKEN_CALL as mistake:
        if is_first():
            mistake.show()
        sys.exit(mistake.exit_code if is_first() else 0)
    except UserError as error:
        if is_first():
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if is_first() else 0)
    except RunFailed as error:
        from hessprobe.machine.processes import ProcessLost  # torch, which what has failed had loaded

        if is_first() or isinstance(error, ProcessLost):
            print(f"failed: {error}", file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    if code == _INTERRUPTED and is_first():  # typer, too, turns Ctrl-C into this
        measuring = sys.argv[1:2] == ["probe"]
        kept = (
            "the rows measured so far are kept"
            if measuring
            else "the log and the last checkpoint are kept: go on with --resume"
        )
        print(f"stopped; {kept}", file=sys.stderr)
    sys.exit(code)
