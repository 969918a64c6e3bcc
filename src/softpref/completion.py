"""`softpref completion SHELL`: a script that completes commands, flags and choices.

The script is plain text that starts no Python, so that completion is immediate.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from softpref.commands import COMMAND_HELP
from softpref.declared import Declared
from softpref.errors import UsageError
from softpref.flags import declared_options, shown_text

SHELLS = ("bash", "zsh", "fish")
TOP = ("help", "completion", "--help", "--version")
EVERY = ("--config", "--help", "--quiet", "--verbose")
BASH = """\
# Completion of softpref; load it with: source <(softpref completion bash)
_softpref() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} words= i command=${{COMP_WORDS[1]}} flag=
  for ((i = 2; i < COMP_CWORD; i++)); do
    case ${{COMP_WORDS[i]}} in --*) flag=${{COMP_WORDS[i]}} ;; esac
  done
  if [ "$COMP_CWORD" -eq 1 ]; then
    words="{commands}"
  elif [ "${{word#-}}" != "$word" ]; then
    case $command in
{flags}
    esac
  else
    case "$command $flag" in
{choices}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _softpref softpref
"""
ZSH = """\
# Completion of softpref; load it with: source <(softpref completion zsh)
autoload -Uz compinit bashcompinit
(( $+functions[compdef] )) || compinit
bashcompinit
"""


def completion_script(shell: str) -> str:
    """Return the completion script of a shell.

    Raises:
        UsageError: there is none for it.
    """
    if shell not in SHELLS:
        raise UsageError(f"completion {shell!r}: give a shell, one of {', '.join(SHELLS)}.")
    options = {name: declared_options(help) or {} for name, help in COMMAND_HELP.items()}
    if shell == "fish":
        return "\n".join(_fish(options)) + "\n"
    text = _bash(options)
    return text if shell == "bash" else ZSH + text.partition("\n")[2]


def _bash(options: dict[str, dict[str, Declared]]) -> str:
    flags, choices = [], [f'      "help "*) words="{" ".join(COMMAND_HELP)}" ;;']
    choices.append(f'      "completion "*) words="{" ".join(SHELLS)}" ;;')
    for command, declared in options.items():
        names = " ".join([*(f"--{name}" for name in declared), *EVERY])
        flags.append(f'      {command}) words="{names}" ;;')
        choices += [
            f'      "{command} --{name}") words="{" ".join(words)}" ;;'
            for name, option in declared.items()
            if (words := _words(option))
        ]
    commands = " ".join([*COMMAND_HELP, *TOP])
    return BASH.format(commands=commands, flags="\n".join(flags), choices="\n".join(choices))


def _fish(options: dict[str, dict[str, Declared]]) -> Iterator[str]:
    yield "# Completion of softpref; load it with: softpref completion fish | source"
    for command, help in COMMAND_HELP.items():
        sentence = _fish_quoted(help.sentence)
        yield f"complete -c softpref -n __fish_use_subcommand -f -a {command} -d {sentence}"
    yield f"complete -c softpref -n __fish_use_subcommand -f -a '{' '.join(TOP)}'"
    for last, words in (("help", tuple(COMMAND_HELP)), ("completion", SHELLS)):
        under = f"-n '__fish_seen_subcommand_from {last}'"
        yield f"complete -c softpref {under} -f -a '{' '.join(words)}'"
    for command, declared in options.items():
        under = f"-n '__fish_seen_subcommand_from {command}'"
        for name, option in declared.items():
            first = re.split(r"[.;:](?: |$)", shown_text(name, option, show_all=True) or "")[0]
            words = _words(option)
            values = f" -f -a '{' '.join(words)}'" if words else ""
            yield f"complete -c softpref {under} -l {name} -r{values} -d {_fish_quoted(first)}"
        for flag in EVERY:
            yield f"complete -c softpref {under} -l {flag.lstrip('-')}"


def _words(option: Declared) -> tuple[str, ...]:
    return option.kind.choices or (("true", "false") if option.kind.scalar == "bool" else ())


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
