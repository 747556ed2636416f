"""``python -m localvlm`` and the ``localvlm`` command."""

import signal

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules load: leave without a traceback

from localvlm.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
