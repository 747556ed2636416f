"""The command line as a whole: what is told of a line that cannot be understood."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("line", ["ask a.png Q --pair", "eval --json", "bench --svg", "config --nope"])
def test_the_help_that_is_named_is_that_of_the_command(cli, line):
    run = cli(*line.split())
    assert run.code == 2
    assert f"(`localvlm {line.split()[0]} --help` tells more)" in run.err
