"""dualblade: make, look at and check a store from the command line."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import dualblade
from dualblade import _core
from dualblade.catalog import Catalog, catalog_path
from dualblade.errors import DualbladeError, DualbladeWarning
from dualblade.header import HEADER_BYTES, Header
from dualblade.memory import format_size, limits
from dualblade.safety import check_target

EXAMPLES = """\
examples:
  dualblade format kv.img --size 8GiB       a new store in a file
  dualblade format /dev/nvme1n1             a new store on a raw device; asks before it overwrites
  dualblade info kv.img                     what it is: size, blocks, engine, memory
  dualblade stat kv.img                     what is in it
  dualblade check kv.img                    read everything against its checksums

exit status: 0 done, 1 failed or problems found, 2 wrong usage
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command's entry point; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", DualbladeWarning)
            warnings.showwarning = _show_warning
            status = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read has seen enough. What is left goes nowhere, or the exit would complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (DualbladeError, ValueError, OSError, MemoryError) as error:
        print(f"dualblade: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dualblade: interrupted", file=sys.stderr)
        return 1
    else:
        return int(status)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"dualblade: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dualblade",
        description="Make, look at and check a tensor store.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=dualblade.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run, words in (
        ("format", _format, "make a new, empty store of a file or block device"),
        ("info", _info, "what a file or device is, and which engine works there"),
        ("stat", _stat, "what a store holds and how it is laid out"),
        ("check", _check, "read every tensor against its checksums"),
    ):
        command = commands.add_parser(name, help=words, description=f"{words.capitalize()}.")
        command.add_argument("target", help="a file, or a block device such as /dev/nvme1n1")
        command.set_defaults(run=run)
        if name == "format":
            command.add_argument("--size", help="of a file: 8GiB, 500MB, or bytes")
            command.add_argument("--yes", action="store_true", help="do not ask")
        else:
            command.add_argument("--json", action="store_true", help="for scripts")
    return parser


def _format(options: argparse.Namespace) -> int:
    if os.path.lexists(options.target):
        found = check_target(options.target, formatting=True)
        what = _content(options.target)
        if what and not options.yes and not _confirm(options.target, found.size_bytes, what):
            return 1
    with dualblade.open(options.target, size=options.size, format=True) as store:
        size = format_size(store.stats()["free_bytes"])
    print(f"{options.target} is an empty store with room for {size}")
    return 0


def _content(target: str) -> str:
    """What would be lost; empty if there is nothing but zeros at the beginning."""
    with open(target, "rb") as file:
        beginning = file.read(1 << 20)
    if beginning[:HEADER_BYTES].strip(b"\0"):
        try:
            if Header.find(beginning[:HEADER_BYTES].ljust(HEADER_BYTES, b"\0"), target=target):
                return "a dualblade store"
        except DualbladeError as error:
            return f"a dualblade store that can't be opened ({error})"
    signature = _core.find_signature(target)
    if signature:
        return signature
    return "data that dualblade does not know" if beginning.strip(b"\0") else ""


def _confirm(target: str, size_bytes: int, what: str) -> bool:
    print(f"{target} ({format_size(size_bytes)}) holds {what}. Formatting loses all of it.")
    if not sys.stdin.isatty():
        print("Nothing was changed. Give --yes to format it.", file=sys.stderr)
        return False
    try:
        answer = input("Type yes to format it: ")
    except EOFError:
        answer = ""
        print()
    if answer.strip() != "yes":
        print("Nothing was changed.")
        return False
    return True


def _info(options: argparse.Namespace) -> int:
    found = check_target(options.target, formatting=True)
    if found.size_bytes < HEADER_BYTES:
        raise ValueError(
            f"{options.target} has {format_size(found.size_bytes)}: it holds no store, and is too "
            f"small to say more of"
        )
    with open(options.target, "rb") as file:
        header = Header.find(file.read(HEADER_BYTES), target=options.target)
    with dualblade.Device.open(options.target, read_only=True) as device:
        about = device.info._asdict()
    memory = limits()
    report = {
        "kind": found.kind,
        "device": about,
        "store": None if header is None else vars(header),
        "signature": _core.find_signature(options.target),
        "memory": {
            "available_bytes": memory.available_bytes,
            "cgroup_limit_bytes": memory.cgroup_limit_bytes,
            "budget_bytes": memory.budget_bytes,
        },
    }
    if options.json:
        print(json.dumps(report, indent=2))
        return 0
    is_store = "a dualblade store" if header else "not a dualblade store"
    print(f"{options.target}: {found.kind}, {format_size(about['size'])}, {is_store}")
    _print_table(
        {
            "logical block": f"{about['lba_size']} bytes",
            "physical block": f"{about['physical_block_size']} bytes",
            "memory alignment": f"{about['memory_align']} bytes",
            "largest transfer": format_size(about["max_transfer"]),
            "direct I/O": "yes" if about["direct"] else "no: this filesystem has no O_DIRECT",
            "direct path": about["engine"],
            "page-cache path": about["pagecache_engine"],
            "can't be used": ", ".join(f"{k} ({v})" for k, v in about["engines_refused"].items()),
            "store id": header.store_id if header else "",
            "checksummed chunk": format_size(header.chunk_bytes) if header else "",
            "memory that is free": format_size(memory.budget_bytes),
        }
    )
    return 0


def _refuse_unclean(target: str) -> None:
    """Opening a store whose process was killed drops what it holds; looking at it must not."""
    found = check_target(target, formatting=False)
    if found.header is None:
        raise ValueError(f"{target} is empty: `dualblade format {target} --size ...` makes a store")
    path = catalog_path(target, found.kind, found.header.store_id)
    with Catalog.open(path, found.header.store_id) as catalog:
        if catalog.clean:
            return
        count = sum(1 for _ in catalog.records())
    raise DualbladeError(
        f"the store on {target} was changed and not closed or flushed when its process ended: the "
        f"{count} tensors of its last save can't be trusted, and the next open starts empty. "
        f"Nothing was written"
    )


def _stat(options: argparse.Namespace) -> int:
    _refuse_unclean(options.target)
    with dualblade.open(options.target, create=False) as store:
        stats = store.stats()
        tensors = [store.info(key)._asdict() for key in store.keys()]
    if options.json:
        print(json.dumps({**stats, "keys": tensors}, indent=2))
        return 0
    used = stats["total_bytes"] - stats["free_bytes"]
    print(f"{options.target}: {len(tensors)} tensors")
    _print_table(
        {
            "used": f"{format_size(used)} of {format_size(stats['total_bytes'])}",
            "largest free run": format_size(stats["largest_free_bytes"]),
            "free runs": stats["free_extents"],
            "fragmentation": f"{stats['fragmentation']:.0%}",
            "groups": len(stats["groups"]),
        }
    )
    for about in tensors:
        shape = "x".join(map(str, about["shape"])) or "scalar"
        key = about["key"] if about["key"].isprintable() else repr(about["key"])
        print(f"  {key}  {shape} {about['dtype']}  {format_size(about['nbytes'])}")
    return 0


def _check(options: argparse.Namespace) -> int:
    _refuse_unclean(options.target)
    with dualblade.open(options.target, create=False, policy="direct") as store:
        count = len(store)
        problems = store.check()
    if options.json:
        print(json.dumps({"tensors": count, "problems": problems}, indent=2))
    else:
        for problem in problems:
            print(problem)
        print(f"{options.target}: {count} tensors read, {len(problems)} problems")
    return 1 if problems else 0


def _print_table(rows: dict[str, Any]) -> None:
    for name, value in rows.items():
        if value not in ("", None):
            print(f"  {name:<20} {value}")


if __name__ == "__main__":
    sys.exit(main())
