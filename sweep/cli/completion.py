"""Complete words in bash, zsh or fish, once the shell has read what `--completion SHELL` prints.

In bash and zsh that is `source <(python -m sweep --completion bash)`, in fish
`python -m sweep --completion fish | source`. The shell then runs `python -m sweep --complete WORD` for each word.

Hydra has its own completion, but that needs a program that is a file, not `python -m`. For a key it
offers only the current value. This one offers every key that the config models know, and the values
that can be listed. It loads nothing heavy and takes a quarter of a second.
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.errors import InputError
from sweep.cli.config_keys import keys, sections, space_paths
from sweep.config.conf_files import APPENDED, groups

OPTIONS = ("doctor", "list", "show-sample", "--help", "--cfg", "--completion")
FILES = ("resume", "model.path", "data.train", "data.eval", "data.chat_template", "lora.start_from", "sweep.output_dir")
# Bash breaks words at `=` and `:`. The script joins the parts again, and cuts the part before the
# last break off the answers. Other Python commands keep their own completion.
BASH = r"""
_qlora_sweep() {
    local i line="${COMP_LINE:0:COMP_POINT}" word
    if [[ ! "$line" =~ [[:space:]]-m[[:space:]]+sweep[[:space:]] ]]; then
        COMPREPLY=($(compgen -o default -- "${COMP_WORDS[COMP_CWORD]}"))
        return
    fi
    [[ "$line" == *[[:space:]] ]] && word="" || word="${line##*[[:space:]]}"
    local before="${word%"${COMP_WORDS[COMP_CWORD]}"}"
    case "${COMP_WORDS[COMP_CWORD]}" in '='|':') before="$word" ;; esac
    COMPREPLY=()
    while IFS= read -r i; do
        if [[ "$i" == "<files>" ]]; then
            compopt -o default -o nospace 2>/dev/null
            COMPREPLY+=($(compgen -f -- "${word#*=}"))
        else
            COMPREPLY+=("${i#"$before"}")
        fi
    done < <("${COMP_WORDS[0]}" -m sweep --complete "$word" 2>/dev/null)
    [[ ${#COMPREPLY[@]} -eq 1 && "${COMPREPLY[0]}" == *[=.] ]] && compopt -o nospace 2>/dev/null
    return 0
}
complete -o bashdefault -o default -F _qlora_sweep python python3
"""
# zsh breaks words at spaces alone, so a candidate is the whole word.
ZSH = r"""
_qlora_sweep() {
    local -a found open closed
    local -i at=${words[(I)-m]}
    if (( ! at || CURRENT < at + 2 )) || [[ "${words[at+1]}" != sweep ]]; then
        if (( $+functions[_python] )); then _python; else _default; fi
        return
    fi
    found=("${(@f)$("${(Q)words[1]}" -m sweep --complete "${(Q)PREFIX}" 2>/dev/null)}")
    if [[ "${found[1]}" == "<files>" ]]; then
        compset -P '*='
        _files
        return
    fi
    found=("${(@)found:#}")
    open=("${(@M)found:#*[=.]}")
    closed=("${(@)found:#*[=.]}")
    compadd -S '' -a open
    compadd -a closed
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _qlora_sweep python python3
"""
FISH = r"""
function __qlora_sweep_is_meant
    set -l words (commandline -opc)
    set -l at (contains -i -- -m $words)
    or return 1
    test "$words[(math $at + 1)]" = sweep
end
function __qlora_sweep_words
    set -l words (commandline -opc)
    set -l word (commandline -ct)
    for found in ($words[1] -m sweep --complete "$word" 2>/dev/null)
        if test "$found" = "<files>"
            set -l key (string replace -r -- '=.*' '=' "$word")
            for file in (__fish_complete_path (string replace -r -- '^[^=]*=' '' "$word"))
                echo "$key$file"
            end
        else
            echo "$found"
        end
    end
end
complete -c python -c python3 -n __qlora_sweep_is_meant -f -a '(__qlora_sweep_words)'
"""
SHELLS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def script(shell: str) -> str:
    """Return the script that the shell must source. Raises InputError for a shell that has none."""
    if shell not in SHELLS:
        raise InputError("--completion", shell, f"must be one of {', '.join(SHELLS)}")
    return SHELLS[shell].strip()


def candidates(word: str) -> list[str]:
    """Return the whole words that `word` may become, or `<files>` where a path is expected."""
    key, equals, value = word.partition("=")
    if not equals:
        offered = _starts(key)
        found = sorted(name for name in offered if name.startswith(word))
        return _up_to_next_dot(found, word)
    bare = key.lstrip("+~")
    if bare in FILES:
        return ["<files>"]
    return [f"{key}={name}" for name in _values(bare) if name.startswith(value)]


def _starts(key: str) -> Iterator[str]:
    yield from OPTIONS
    for group in groups():
        yield f"+{group}=" if group in APPENDED else f"{group}="
    yield from ("resume=", "dry_run=")
    yield from (f"{path}=" for section in sections() for path in dict.fromkeys(key.path for key in keys(section)))
    yield from (f"{path}." for path in space_paths())


def _values(key: str) -> list[str]:
    if key in groups():
        return groups()[key]
    if key == "--completion":
        return list(SHELLS)
    if key == "dry_run":
        return ["true", "false"]
    section = key.split(".")[0]
    found = [known for known in (keys(section) if section in sections() else []) if known.path == key]
    return sorted({value for known in found for value in known.values})


def _up_to_next_dot(names: list[str], word: str) -> list[str]:
    """Cut each name after its next dot: `lora.` stands for the eight keys of lora.

    A list of two hundred words would help no one.
    """
    shortened = []
    for name in names:
        dot = name.find(".", len(word))
        shortened.append(name[: dot + 1] if dot >= 0 else name)
    return list(dict.fromkeys(shortened))
