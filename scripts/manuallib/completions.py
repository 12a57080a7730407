"""Completions for bash, zsh and fish, with everything in each file that it needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .commands import Command, Flag

_HEAD = "Made by scripts/manual from the parsers of qcowfuse. Do not edit."


def bash(program: Command) -> str:
    """The file for one program; it needs neither the package bash-completion nor an option of the shell."""
    function = _function(program.name)
    lines = [
        f"# bash completion for {program.name}. {_HEAD}",
        _BASH_COMMON.strip("\n"),
        "",
        f"{function}() {{",
        "    local cur prev done_with_options at",
        "    __qcowfuse_words",
        "    COMPREPLY=()",
    ]
    if program.commands:
        names = [*(each.name for each in program.commands), *(name for flag in program.flags for name in flag.names)]
        lines += ["    case ${COMP_WORDS[1]-} in"]
        for command in program.commands:
            lines += [f"    {command.name})", *_bash_options(command, "        "), "        ;;"]
        lines += [
            "    *)",
            *(_bash_options(program, "        ") if program.by_words else ()),
            "        ;;",
            "    esac",
        ]
        lines += ["    if ((COMP_CWORD == 1)); then", f'        __qcowfuse_choose "{" ".join(names)}"', "    fi"]
    else:
        lines += _bash_options(program, "    ")
    lines += ["}", f"complete -F {function} {program.name}"]
    return "\n".join(lines) + "\n"


_BASH_COMMON = r"""
# The word at the cursor in cur, the one before it in prev; --name=value is one word to the program and three to bash.
__qcowfuse_words() {
    cur=${COMP_WORDS[COMP_CWORD]-}
    prev=${COMP_WORDS[COMP_CWORD-1]-}
    if [[ $cur == "=" ]]; then
        cur=
    elif [[ $prev == "=" ]]; then
        prev=${COMP_WORDS[COMP_CWORD-2]-}
    fi
    done_with_options=
    for ((at = 1; at < COMP_CWORD; at++)); do
        [[ ${COMP_WORDS[at]} == "--" ]] && done_with_options=yes
    done
    return 0
}

__qcowfuse_choose() {
    local word
    while IFS= read -r word; do
        COMPREPLY+=("$word")
    done < <(compgen -W "$1" -- "$cur")
}

__qcowfuse_files() {
    local word
    compopt -o filenames 2>/dev/null
    while IFS= read -r word; do
        COMPREPLY+=("$word")
    done < <(compgen "${1--f}" -- "$cur")
}

# A list with commas: what comes after the last one is completed. An option that needs a value ends with "=".
__qcowfuse_list() {
    local before='' last=$cur word
    if [[ $cur == *,* ]]; then
        before=${cur%,*},
        last=${cur##*,}
    fi
    compopt -o nospace 2>/dev/null
    while IFS= read -r word; do
        COMPREPLY+=("$before$word")
    done < <(compgen -W "$1" -- "$last")
}
"""


def _bash_options(command: Command, indent: str) -> Iterator[str]:
    yield f"{indent}[[ $done_with_options ]] || case $prev in"
    for flag in command.flags:
        if flag.metavar:
            answer = {
                "file": "__qcowfuse_files",
                "directory": "__qcowfuse_files -d",
                "user": "__qcowfuse_files -u",
                "words": f'__qcowfuse_choose "{" ".join(flag.words)}"',
                "list": f'__qcowfuse_list "{" ".join(flag.words)}"',
            }.get(flag.kind, ":")
            yield f"{indent}{' | '.join(flag.names)})"
            yield f"{indent}    {answer}"
            yield f"{indent}    return"
            yield f"{indent}    ;;"
    yield f"{indent}esac"
    names = " ".join(name for flag in command.flags for name in flag.names)
    yield f"{indent}if [[ $cur == -* && ! $done_with_options ]]; then"
    yield f'{indent}    __qcowfuse_choose "{names}"'
    yield f"{indent}else"
    yield f"{indent}    {'__qcowfuse_files' if command.by_words else ':'}"
    yield f"{indent}fi"


def zsh(programs: Iterable[Command]) -> str:
    """One file for both programs, by ``_arguments``."""
    programs = tuple(programs)
    names = " ".join(program.name for program in programs)
    lines = [f"#compdef {names}", f"# {_HEAD}", ""]
    for program in programs:
        lines.append(f"{_function(program.name)}() {{")
        if program.commands:
            lines += ["    local -a commands", "    commands=("]
            lines += [f"        {_quoted(f'{each.name}:{each.summary}')}" for each in program.commands]
            lines += ["    )", "    if (( CURRENT == 2 )) && [[ $words[2] != -* ]]; then"]
            lines.append("        _describe -t commands command commands")
            lines += ["        _files"] if program.by_words else []
            lines += ["        return", "    fi", "    case $words[2] in"]
            for command in program.commands:
                lines += [f"    {command.name})", "        shift words", "        (( CURRENT-- ))"]
                lines += [*_zsh_arguments(command, "        "), "        ;;"]
            lines += ["    *)", *_zsh_arguments(program, "        "), "        ;;", "    esac"]
        else:
            lines += _zsh_arguments(program, "    ")
        lines += ["}", ""]
    lines.append("case $service in")
    lines += [f'{program.name}) {_function(program.name)} "$@" ;;' for program in programs]
    lines.append("esac")
    return "\n".join(lines) + "\n"


def _zsh_arguments(command: Command, indent: str) -> Iterator[str]:
    yield f"{indent}_arguments -s \\"
    for flag in command.flags:
        what = flag.help.replace("\\", r"\\").replace("[", r"\[").replace("]", r"\]")
        value = ""
        if flag.metavar:
            action = {
                "file": "_files",
                "directory": "_files -/",
                "user": "_users",
                "words": f"({' '.join(flag.words)})",
                # The list after -o: names with commas between them.
                "list": f"_values -s , option {' '.join(word.removesuffix('=') for word in flag.words)}",
            }.get(flag.kind, "")
            value = f":{flag.metavar.replace(':', ' ')}:{action}"
        for name in flag.names:
            ends = "=" if value and name.startswith("--") else ""
            yield f"{indent}    {_quoted(f'*{name}{ends}[{what}]{value}')} \\"
    yield f"{indent}    {_quoted('*:file:_files' if command.by_words else '*: :')}"


def fish(program: Command) -> str:
    """The file for one program."""
    lines = [f"# fish completion for {program.name}. {_HEAD}"]
    if not program.commands:
        return "\n".join([*lines, *(_fish_option(program.name, flag, "") for flag in program.flags)]) + "\n"
    first = f"not __fish_seen_subcommand_from {' '.join(command.name for command in program.commands)}"
    if not program.by_words:
        lines.append(f"complete -c {program.name} -f")
    for command in program.commands:
        seen = f"__fish_seen_subcommand_from {command.name}"
        lines.append(
            f"complete -c {program.name} -n {_quoted(first)} -a {command.name} -d {_quoted(command.summary)}"
        )
        lines += [_fish_option(program.name, flag, seen) for flag in command.flags]
        if command.by_words and not program.by_words:
            lines.append(f"complete -c {program.name} -n {_quoted(seen)} -F")
    lines += [_fish_option(program.name, flag, first) for flag in program.flags]
    return "\n".join(lines) + "\n"


def _fish_option(program: str, flag: Flag, condition: str) -> str:
    parts = [f"complete -c {program}"]
    if condition:
        parts.append(f"-n {_quoted(condition)}")
    parts += [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in flag.names]
    if flag.metavar:
        parts.append(
            {
                "file": "-r -F",
                "directory": "-x -a '(__fish_complete_directories)'",
                "user": "-x -a '(__fish_complete_users)'",
                "words": f"-x -a {_quoted(' '.join(flag.words))}",
                "list": f"-x -a {_quoted(f'(__fish_append , {chr(32).join(flag.words)})')}",
            }.get(flag.kind, "-x")
        )
    return " ".join([*parts, f"-d {_quoted(flag.help)}"])


def _function(program: str) -> str:
    return "_" + program.replace("-", "_")


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
