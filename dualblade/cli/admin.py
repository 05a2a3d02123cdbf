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
from dualblade.cli import memory_info
from dualblade.cli.messages import for_admin
from dualblade.errors import DualbladeError, DualbladeWarning
from dualblade.header import HEADER_BYTES, Header
from dualblade.memory import format_size, limits
from dualblade.opening import check_options
from dualblade.safety import check_targets

EXAMPLES = """\
examples:
  dualblade format kv.img --size 8GiB       a new store in a file
  dualblade format /dev/nvme1n1             a new store on a raw device; asks before it overwrites
  dualblade format /dev/nvme1n1 --discard   and none of what it held is left to be read
  dualblade format a.img b.img --size 8GiB --stripe 1MiB
                                            a new store that is striped over several
  dualblade info kv.img                     what it is: size, blocks, engine, memory
  dualblade info --memory                   what memory tensors may take, its parts, its sources
  dualblade info --memory kv.img            and what of this file is in memory, also while in use
  dualblade stat kv.img                     what is in it
  dualblade check kv.img                    read everything against its checksums

exit status: 0 done, 1 failed or problems found, 2 wrong usage
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command's entry point; returns its exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not options.targets and not options.memory:
        parser.error("info wants a target, or --memory")
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
        print(f"dualblade: {for_admin(error)}", file=sys.stderr)
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
        command = commands.add_parser(
            name,
            help=words,
            description=f"{words.capitalize()}.",
            epilog=_examples_of(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument(
            "targets",
            nargs="*" if name == "info" else "+",
            metavar="target",
            help="a file, or a block device such as /dev/nvme1n1; several, in the order of their "
            "format, are one striped store",
        )
        command.set_defaults(run=run)
        if name == "format":
            command.add_argument("--size", help="of a file, or all together: 8GiB, 500MB, or bytes")
            command.add_argument("--stripe", help="of several: 1MiB (the default), 256KiB, ...")
            command.add_argument(
                "--discard",
                action="store_true",
                help="tell the drive first that all it holds may go (TRIM, deallocate)",
            )
            command.add_argument("--yes", action="store_true", help="do not ask")
        else:
            command.add_argument("--json", action="store_true", help="for scripts")
        if name == "info":
            command.add_argument(
                "--memory",
                action="store_true",
                help="what memory there is instead, and what of the targets, if any, is in it",
            )
    return parser


def _examples_of(command: str) -> str:
    """The lines of EXAMPLES that show it."""
    start = f"  dualblade {command} "
    lines = [line for line in EXAMPLES.splitlines() if line.startswith(start)]
    return "\n".join(["examples:", *lines])


def _name(options: argparse.Namespace) -> str:
    return ", ".join(options.targets)


def _format(options: argparse.Namespace) -> int:
    check_options(options.targets, options.size, options.stripe)
    present = [target for target in options.targets if os.path.lexists(target)]
    if present:
        held = [
            f"{found.path} ({format_size(found.size_bytes)}) holds {what}."
            for found in check_targets(present, formatting=True)
            if (what := _content(found.path, options.targets))
        ]
        if held and not options.yes and not _confirm(held):
            return 1
    with dualblade.open(
        options.targets,
        size=options.size,
        stripe=options.stripe,
        format=True,
        discard=options.discard,
    ) as store:
        size = format_size(store.stats()["free_bytes"])
    verb = "are" if len(options.targets) > 1 else "is"
    print(f"{_name(options)} {verb} an empty store with room for {size}")
    return 0


def _content(target: str, members: Sequence[str]) -> str:
    """What would be lost; empty if there is nothing but zeros at the beginning."""
    with open(target, "rb") as file:
        beginning = file.read(1 << 20)
    if beginning[:HEADER_BYTES].strip(b"\0"):
        try:
            if Header.find(beginning[:HEADER_BYTES].ljust(HEADER_BYTES, b"\0"), target, members):
                return "a dualblade store"
        except DualbladeError as error:
            return f"a dualblade store that can't be opened ({error})"
    signature = _core.find_signature(target)
    if signature:
        return signature
    return "data that dualblade does not know" if beginning.strip(b"\0") else ""


def _confirm(held: Sequence[str]) -> bool:
    print(*held, "Formatting loses all of it.")
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


def _headers(options: argparse.Namespace) -> list[Header]:
    """Those that there are. Several targets are members of one store, in order, or of none."""
    found = check_targets(options.targets, formatting=True)
    headers = []
    for member in found:
        if member.size_bytes < HEADER_BYTES:
            raise ValueError(
                f"{member.path} has {format_size(member.size_bytes)}: it holds no store, and is "
                f"too small to say more of"
            )
        with open(member.path, "rb") as file:
            header = Header.find(file.read(HEADER_BYTES), member.path, options.targets)
        if header is not None:
            headers.append(header)
    if headers and len(found) > 1:
        check_targets(options.targets, formatting=False)
    return headers


def _info(options: argparse.Namespace) -> int:
    if options.memory:
        about_memory = memory_info.collect(options.targets)
        if options.json:
            print(json.dumps(memory_info.as_json(about_memory), indent=2))
        else:
            print(memory_info.as_text(about_memory))
        return 0
    headers = _headers(options)
    header = headers[0] if headers else None
    stripe = {"stripe_bytes": header.stripe_bytes} if header and header.stripe_bytes else {}
    with dualblade.Device.open(options.targets, read_only=True, **stripe) as device:
        about = device.info._asdict()
    kind = "block" if about["block_device"] else "file"
    memory = limits()
    report = {
        "kind": kind,
        "device": about,
        "store": None if header is None else vars(header),
        "signature": ", ".join(filter(None, map(_core.find_signature, options.targets))),
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
    if header and len(options.targets) < header.members:
        is_store = f"member {header.member} of {header.members} of a dualblade store"
    print(f"{_name(options)}: {kind}, {format_size(about['size'])}, {is_store}")
    _print_table(
        {
            "stripe": format_size(header.stripe_bytes) if stripe and header else "",
            "logical block": f"{about['lba_size']} bytes",
            "physical block": f"{about['physical_block_size']} bytes",
            "memory alignment": f"{about['memory_align']} bytes",
            "largest transfer": format_size(about["max_transfer"]),
            "data placement": "yes" if about["placement"] else "",
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


def _refuse_unclean(options: argparse.Namespace) -> None:
    """Opening a store whose process was killed drops what it holds; looking at it must not."""
    found = check_targets(options.targets, formatting=False)[0]
    if found.header is None:
        given = " ".join(options.targets)
        raise ValueError(
            f"{_name(options)} is empty: `dualblade format {given} --size ...` makes a store"
        )
    path = catalog_path(found.path, found.kind, found.header.store_id)
    with Catalog.open(path, found.header.store_id) as catalog:
        if catalog.clean:
            return
        count = sum(1 for _ in catalog.records())
    raise DualbladeError(
        f"the store on {_name(options)} was changed and not closed or flushed when its process "
        f"ended: the {count} tensors of its last save can't be trusted, and the next open starts "
        f"empty. Nothing was written"
    )


def _stat(options: argparse.Namespace) -> int:
    _refuse_unclean(options)
    with dualblade.open(options.targets, create=False) as store:
        stats = store.stats()
        tensors = [store.info(key)._asdict() for key in store.keys()]
    if options.json:
        print(json.dumps({**stats, "keys": tensors}, indent=2))
        return 0
    used = stats["total_bytes"] - stats["free_bytes"]
    print(f"{_name(options)}: {len(tensors)} tensors")
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
    _refuse_unclean(options)
    with dualblade.open(options.targets, create=False, policy="direct") as store:
        count = len(store)
        problems = store.check()
    if options.json:
        print(json.dumps({"tensors": count, "problems": problems}, indent=2))
    else:
        for problem in problems:
            print(problem)
        print(f"{_name(options)}: {count} tensors read, {len(problems)} problems")
    return 1 if problems else 0


def _print_table(rows: dict[str, Any]) -> None:
    for name, value in rows.items():
        if value not in ("", None):
            print(f"  {name:<20} {value}")


if __name__ == "__main__":
    sys.exit(main())
