"""``python -m localvlm`` and the ``localvlm`` command."""

import _signal  # type: ignore[import-not-found]  # signal imports more, a Ctrl-C in which leaves with a traceback

if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)  # Ctrl-C while modules load: leave without a traceback

from localvlm.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
