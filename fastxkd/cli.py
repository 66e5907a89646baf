"""The command ``fastxkd``: from typed words to a run, and from an error to one line."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

USER_ERROR, SKIPPED_IMAGES, INTERRUPTED, TERMINATED = 2, 3, 130, 143
EXIT_CODES = (
    "Exit status: 0 done; 2 something asked for cannot be done (one line says what); 3 done, but "
    "some images could not be read (listed in the report, and in metrics.json or errors.jsonl); "
    "130 or 143 interrupted, the same command resumes."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status (see ``EXIT_CODES``).

    ``--debug`` anywhere, or ``FASTXKD_DEBUG=1``, shows the traceback of an error.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given or os.environ.get("FASTXKD_DEBUG", "0") not in ("", "0")
    given = [word for word in given if word != "--debug"]
    try:
        return _stopped(_run(given))
    except KeyboardInterrupt:
        return _stopped(INTERRUPTED)
    except SystemExit as stop:
        return _stopped(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
    # Their texts are written for the person at the keyboard; anything else is a defect of ours.
    except (ValueError, TypeError, ImportError, OSError) as error:
        if debug:
            traceback.print_exc()
        print(f"fastxkd: error: {error}", file=sys.stderr)
        return USER_ERROR


def _stopped(status: int) -> int:
    """Pass a status on, with a word about resuming if it means an interruption."""
    if status in (INTERRUPTED, TERMINATED):
        print("interrupted; the same command resumes where it stopped", file=sys.stderr)
    return status


def _run(arguments: list[str]) -> int:
    from fastxkd._extras import require

    require("typer", extra="cli")
    require("rich", extra="cli")
    from typer.main import get_command

    from fastxkd._commands import app

    command = get_command(app)
    try:
        result = command.main(arguments, prog_name="fastxkd", standalone_mode=False)
    except Exception as error:
        # click's own complaints (unknown option, missing value) know how to show themselves.
        show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
        if callable(show) and isinstance(code, int):
            show()
            return code
        if type(error).__name__ == "Abort":
            return INTERRUPTED
        raise
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())
