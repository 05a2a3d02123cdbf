"""Messages of the library in the words of the command line: which option, not which argument."""

from __future__ import annotations

_COMMON = {
    "Check the path; to create a file of that name, pass size=.": "Check the path; {missing}.",
    "with size= to create it": "with --size to create it",
    "too little for a store: give size=": "too little for a store: give --size",
    "engine='threads'": "--engine threads",
    "engine='auto'": "--engine auto",
}
_FIO = {
    "leave iopoll out": "leave --hipri out",
    "sqpoll and iopoll need": "--sqthread-poll and --hipri need",
    "leave them out": "leave both out",
}


def for_admin(error: BaseException) -> str:
    """What went wrong, as `dualblade` says it."""
    return _translated(error, _COMMON, "`dualblade format PATH --size 8GiB` makes a store")


def for_fio(error: BaseException) -> str:
    """What went wrong, as `dualblade-fio` says it."""
    return _translated(error, _COMMON | _FIO, "to create a file of that name, give --size")


def _translated(error: BaseException, words: dict[str, str], missing: str) -> str:
    text = str(error)
    for argument, option in words.items():
        text = text.replace(argument, option.format(missing=missing))
    return text
