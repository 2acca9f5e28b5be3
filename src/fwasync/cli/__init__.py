"""The command line, `fwasync`. Thin: it reads options, runs recipes and tells errors.

Importing this package imports nothing else, so that Ctrl-C is understood from the first moment.
"""

from __future__ import annotations

import sys

__all__ = ("main",)

_INTERRUPTED = 130


def main() -> None:
    """The console script `fwasync`; ends the process with the exit status that the command deserves."""
    try:
        from fwasync.cli.streams import prepare_streams

        prepare_streams()
        from fwasync.cli.app import app

        app(prog_name="fwasync")
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(_INTERRUPTED)
    except SystemExit as error:
        if error.code == _INTERRUPTED:  # typer says nothing when Ctrl-C comes before the command itself begins
            sys.stderr.write("interrupted\n")
        raise
    except Exception as error:
        from fwasync.cli.failures import tell

        sys.exit(tell(error, debug="--debug" in sys.argv))
