"""``localvlm completion``: what a shell needs to complete our commands, options, models and files.

Click's classes do it, but for what differs here: values after ``--option=``, references with a colon, and descriptions
with commas.
"""

from __future__ import annotations

from collections.abc import Sequence

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
)

__all__ = ["completion"]


class _Bash(BashComplete):
    """Bash takes ``--method=x`` and ``user/repo:Q8_0`` for three words each, and completes the last."""

    def get_completion_args(self) -> tuple[list[str], str]:
        args, incomplete = super().get_completion_args()
        words = _joined([*args, incomplete])
        return words[:-1], words[-1]

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem[str]]:
        begun = incomplete.rpartition("=")[2] if incomplete.startswith("--") else incomplete
        typed = len(begun) - len(begun.rpartition(":")[2])
        found = super().get_completions(args, incomplete)
        return [CompletionItem(i.value[typed:], i.type) if i.type == "plain" else i for i in found]


class _Zsh(ZshComplete):
    """Of ``--option=value`` the value alone is completed; ``-U`` would write it over all of the word."""

    source_template = ZshComplete.source_template.replace(
        "    for type", "    [[ $PREFIX == --*=* ]] && compset -P 1 '*='\n\n    for type", 1
    ).replace(" -U", "")


class _Fish(FishComplete):
    """Only the first comma of a line is a mark, and completions of ``--option=value`` are whole words."""

    source_template = """\
function %(complete_func)s;
    set -l before (commandline -ct | string match -r -- '^--[^=]+=');
    set -l response (env %(complete_var)s=fish_complete COMP_WORDS=(commandline -cp) \
COMP_CWORD=(commandline -t) %(prog_name)s);

    for line in $response;
        set -l part (string split -m 1 "," -- $line);
        switch $part[1];
            case dir;
                string replace -r '^' -- "$before" (__fish_complete_directories $part[2]);
            case file;
                string replace -r '^' -- "$before" (__fish_complete_path $part[2]);
            case plain;
                echo "$before$part[2]";
        end;
    end;
end;

complete --no-files --command %(prog_name)s --arguments "(%(complete_func)s)";
"""


_SHELLS: dict[str, type[ShellComplete]] = {"bash": _Bash, "zsh": _Zsh, "fish": _Fish}
for _name, _shell in _SHELLS.items():
    add_completion_class(_shell, _name)


def _joined(words: Sequence[str]) -> list[str]:
    """Words of bash, with what stands around a lone = or : put together again."""
    out: list[str] = []
    after = False
    for word in words:
        lone = word in ("=", ":")
        if out and (lone or after):
            out[-1] += word
        else:
            out.append(word)
        after = lone
    return out


@click.command()
@click.argument("shell", type=click.Choice(tuple(_SHELLS)), metavar="SHELL")
def completion(shell: str) -> None:
    """Prints what completes commands, options, models and files in SHELL: bash, zsh or fish.

    \b
    bash: localvlm completion bash >> ~/.bashrc
    zsh:  localvlm completion zsh >> ~/.zshrc    (after compinit)
    fish: localvlm completion fish > ~/.config/fish/completions/localvlm.fish
    """  # noqa: D301 - click's mark of lines that are not to be wrapped
    from localvlm.cli.main import cli

    click.echo(_SHELLS[shell](cli, {}, "localvlm", "_LOCALVLM_COMPLETE").source())
