"""A language model continues a long text, its KV cache on storage; then once more in memory.

Run by tools/demo, which sets up what is needed.
"""

import argparse
import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import demo_model
from demo_text import log_book

EXAMPLES = """examples:
  tools/demo                                        the whole show, about a minute
  tools/demo --prompt-tokens 8000 --memory 16MiB    a longer prompt, less memory
  tools/demo --policy direct --engine aio           everything past the page cache, by Linux AIO
  tools/demo --store /dev/nvme1n1                   on a drive that holds a dualblade store
  tools/demo --model ~/models/Qwen3-0.6B            any model folder or GGUF file on this disk
  tools/demo --json | jq .paths                     for programs

exit status: 0 the tokens are identical, 1 a token differs or the run failed, 2 wrong usage
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; exits with status 2 if they make no sense."""
    parser = argparse.ArgumentParser(
        prog="tools/demo",
        description="A language model continues a long text with its KV cache on storage and less "
        "memory for it than it takes; then again with the cache in memory, and both are compared.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--prompt-tokens", type=count, default=2048, metavar="N", help="default: 2048")
    add("--new-tokens", type=count, default=64, metavar="N", help="default: 64")
    add(
        "--memory",
        type=size,
        metavar="SIZE",
        help="for page-cached layers; default: half of the cache",
    )
    add("--store", type=Path, metavar="PATH", help="a file or device; default: a temporary file")
    add("--policy", choices=["dual", "pagecache", "direct"], default="dual")
    add("--engine", choices=["auto", "uring", "aio", "threads"], default="auto")
    add(
        "--model",
        metavar="PATH",
        help="a model folder or GGUF file, or 'random'; default: Gemma 3 270M",
    )
    add("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    add(
        "--chunk",
        type=count,
        default=256,
        metavar="N",
        help="prompt tokens at a time; default: 256",
    )
    add(
        "--threads",
        type=count,
        # One CPU is left to the store: torch's threads wait for each other in a loop that takes
        # every CPU they are on, and all of them are slow when one has to wait.
        default=max(1, len(os.sched_getaffinity(0)) - 1),
        metavar="N",
        help="of torch; default: all CPUs but one",
    )
    add("--json", action="store_true", help="print the results as a JSON object")
    options = parser.parse_args(arguments)
    if options.model not in (None, "random") and not Path(options.model).exists():
        parser.error(f"--model {options.model}: there is no such folder or file")
    if options.store is not None and options.store.is_dir():
        parser.error(f"--store {options.store} is a directory: name a file in it")
    return options


def count(text: str) -> int:
    """A number of things, one at least."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def size(text: str) -> int:
    """The bytes of a size such as 16MiB."""
    from dualblade.memory import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


# ---- decoding -----------------------------------------------------------------------------------


@dataclass
class Run:
    """What a model said with one cache, and how long that took."""

    ids: list[int] = field(default_factory=list)
    logits: str = ""
    """A digest of the logits of all steps: equal if every bit of them is."""
    prefill_s: float = 0.0
    decode_s: float = 0.0

    @property
    def ms_per_token(self) -> float:
        """Of decoding: the first token belongs to the prefill."""
        return 1000 * self.decode_s / max(1, len(self.ids) - 1)


class Decoder:
    """Continues a prompt greedily, the same way with any cache."""

    def __init__(
        self, model: Any, prompt: list[int], options: argparse.Namespace, view: Any
    ) -> None:
        self.model = model
        self.prompt = prompt
        self.options = options
        self.view = view

    def run(self, cache: Any, name: str, after_prefill: Any = lambda: None) -> Run:
        """Prefills in chunks, then decodes."""
        import torch

        result, digest = Run(), hashlib.sha256()
        start = time.monotonic()
        with self.view.task(f"{name}: prompt", len(self.prompt)) as advance:
            for first in range(0, len(self.prompt), self.options.chunk):
                chunk = self.prompt[first : first + self.options.chunk]
                logits = self._step(chunk, cache)
                advance(len(chunk))
        result.prefill_s = time.monotonic() - start
        after_prefill()
        start = time.monotonic()
        with self.view.task(f"{name}: decoding", self.options.new_tokens) as advance:
            while True:
                digest.update(logits.view(torch.uint8).numpy())
                result.ids.append(int(logits.argmax()))
                advance(1)
                if len(result.ids) == self.options.new_tokens:
                    break
                logits = self._step(result.ids[-1:], cache)
        result.decode_s = time.monotonic() - start
        result.logits = digest.hexdigest()
        return result

    def _step(self, ids: list[int], cache: Any) -> Any:
        import torch

        with torch.inference_mode():
            output = self.model(torch.tensor([ids]), past_key_values=cache, logits_to_keep=1)
        return output.logits[0, -1]

    def bytes_per_token(self) -> int:
        """What one token takes in the cache; the pass that finds out also warms torch up."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        self._step(self.prompt[:8], cache)
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values) if t is not None]
        return sum(t.numel() * t.element_size() // t.shape[-2] for t in tensors)


# ---- the two runs -------------------------------------------------------------------------------


@contextlib.contextmanager
def opened_store(options: argparse.Namespace, kv_bytes: int) -> Iterator[Any]:
    """The store asked for, or one in a file that is removed afterwards."""
    import dualblade

    memory = options.memory or max(kv_bytes // 2, 1 << 20)
    # Room for the cache twice, since layers are laid out in whole blocks and aligned.
    settings: dict[str, Any] = {
        "size": 2 * kv_bytes + (64 << 20),
        "memory": memory,
        "policy": options.policy,
        "engine": options.engine,
    }
    if options.store is not None:
        if options.store.exists():
            del settings["size"]
        with dualblade.open(options.store, **settings) as store:
            yield store
        return
    folder = demo_model.cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    name = folder / f"demo-{os.getpid()}.img"
    try:
        with dualblade.open(name, **settings) as store:
            yield store
    finally:
        for left in folder.glob(f"{name.name}*"):
            left.unlink()


def run_on_storage(decoder: Decoder, store: Any) -> tuple[Run, dict[str, Any]]:
    """The run with the cache in the store, and what the store did meanwhile."""
    from dualblade.integrations.transformers import DualBladeCache

    tokens = len(decoder.prompt) + decoder.options.new_tokens
    at: list[dict[str, Any]] = [store.stats()["paths"]]

    def note() -> None:
        at.append(store.stats()["paths"])

    with DualBladeCache(store, decoder.model.config, max_tokens=tokens) as cache:
        run = decoder.run(cache, "cache on storage", note)
        note()
        kv = cache.stats()
        stats = store.stats()
        paths = {
            name: {
                "layers": sum(
                    group.startswith(f"{kv['name']}/") and found["path"] == name
                    for group, found in stats["groups"].items()
                ),
                "write_bytes": at[2][name]["write_bytes"] - at[0][name]["write_bytes"],
                "read_bytes": at[2][name]["read_bytes"] - at[0][name]["read_bytes"],
                "decode_read_bytes": at[2][name]["read_bytes"] - at[1][name]["read_bytes"],
                "read_mb_per_s": read_speed(store, kv["name"], name),
            }
            for name in ("direct", "pagecache")
        }
    facts = ("target", "engine", "pagecache_engine", "policy", "memory_budget_bytes", "fallbacks")
    return run, {
        **{name: stats[name] for name in facts},
        "kv_bytes": kv["stored_bytes"],
        "paths": paths,
    }


def read_speed(store: Any, cache_name: str, path: str) -> float | None:
    """MB/s when all that a path holds of the cache is read, and nothing else is done."""
    keys = [key for key in store.keys(f"{cache_name}/") if store.info(key).path == path]
    if not keys:
        return None
    arrays = store.get_many(keys)  # memory that is there already
    start = time.monotonic()
    store.get_many(keys, out=arrays)
    return sum(array.nbytes for array in arrays.values()) / 1e6 / (time.monotonic() - start)


def run_in_memory(decoder: Decoder) -> Run:
    """The run with the cache of transformers."""
    from transformers import DynamicCache

    return decoder.run(DynamicCache(config=decoder.model.config), "cache in memory")


def compare(stored: Run, kept: Run) -> dict[str, Any]:
    """Whether and where the two runs differ."""
    pairs = enumerate(zip(stored.ids, kept.ids, strict=True))
    different = next((at for at, (one, other) in pairs if one != other), None)
    return {
        "identical": different is None,
        "first_difference": different,
        "logits_identical": stored.logits == kept.logits,
    }


# ---- what is shown ------------------------------------------------------------------------------


class View:
    """Progress and results, for people (everything but the results goes to standard error)."""

    def __init__(self) -> None:
        from rich.console import Console

        self.log = Console(stderr=True, highlight=False)
        self.out = Console(highlight=False)

    def say(self, text: str) -> None:
        """One line of what is going on."""
        self.log.print(f"  {text}", style="dim", markup=False)

    @contextlib.contextmanager
    def task(self, name: str, total: int) -> Iterator[Any]:
        """A progress bar; gives the function that moves it on."""
        from rich import progress

        columns = [
            progress.TextColumn("  {task.description:28}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
        ]
        with progress.Progress(*columns, console=self.log, refresh_per_second=4) as bar:
            task = bar.add_task(name, total=total)
            yield lambda steps: bar.advance(task, steps)

    def show(self, report: dict[str, Any], prompt_end: str) -> None:
        """The text, then the table."""
        from rich.table import Table
        from rich.text import Text

        self.out.print()
        self.out.print(Text.assemble((f"... {prompt_end}", "dim"), (report["text"], "bold")))
        self.out.print()
        table = Table(title=f"{report['model']}, {report['dtype']}", title_justify="left")
        table.add_column()
        for name in ("page cache", "direct", "together"):
            table.add_column(name, justify="right")
        cached, direct = report["paths"]["pagecache"], report["paths"]["direct"]
        for label, key in (
            ("layers", "layers"),
            ("written", "write_bytes"),
            ("read", "read_bytes"),
            ("  of that while decoding", "decode_read_bytes"),
        ):
            show = str if key == "layers" else megabytes
            values = (cached[key], direct[key], cached[key] + direct[key])
            table.add_row(label, *(show(value) for value in values))
        speeds = (cached["read_mb_per_s"], direct["read_mb_per_s"])
        table.add_row("reading alone", *(f"{s:,.0f} MB/s" if s else "-" for s in speeds), "")
        engines = (report["pagecache_engine"], report["engine"])
        table.add_row("engine", *engines, "")
        self.out.print(table)
        self.show_comparison(report)

    def show_comparison(self, report: dict[str, Any]) -> None:
        """The cache on storage beside the one in memory."""
        from rich.table import Table

        stored, kept = report["on_storage"], report["in_memory"]
        table = Table()
        for name in ("", "cache on storage", "cache in memory"):
            table.add_column(name, justify="right" if name else "left")
        table.add_row("prompt", f"{stored['prefill_s']:.1f} s", f"{kept['prefill_s']:.1f} s")
        speeds = [f"{run['ms_per_token']:.0f} ms/token" for run in (stored, kept)]
        table.add_row("decoding", *speeds)
        budget = f"{megabytes(report['memory_budget_bytes'])} budget"
        table.add_row("cache", f"{megabytes(report['kv_bytes'])}, {budget}", "no limit")
        self.out.print(table)
        for line in (*report["fallbacks"], report["note"]):
            if line:
                self.out.print(f"Note: {line}", markup=False)
        tokens = report["new_tokens"]
        if report["identical"]:
            bits = "every logit too" if report["logits_identical"] else "but logits differ in bits"
            self.out.print(f"[green]All {tokens} tokens are identical ({bits}).[/green]")
        else:
            first = report["first_difference"] + 1
            self.out.print(f"[red]The tokens differ, first in token {first} of {tokens}.[/red]")


def megabytes(size_bytes: int) -> str:
    """For people."""
    return f"{size_bytes / 1e6:,.1f} MB"


# ---- all of it ----------------------------------------------------------------------------------


def make_prompt(tokenizer: Any, tokens: int) -> list[int]:
    """The first tokens of the log book."""
    text = ""
    pages = log_book()
    while True:
        # Several pages at a time: the text is tokenized from its beginning every time.
        text += "".join(next(pages) for _ in range(1 + tokens // 80))
        ids = tokenizer(text).input_ids
        if len(ids) > tokens:
            return list(ids[:tokens])


def demonstrate(options: argparse.Namespace, view: View) -> dict[str, Any]:
    """Both runs, compared."""
    import torch

    torch.set_num_threads(options.threads)
    if options.model == "random":
        loaded = demo_model.random_model(options.dtype)
    else:
        path = None if options.model is None else Path(options.model)
        loaded = demo_model.load(path, options.dtype, view.say)
    prompt = make_prompt(loaded.tokenizer, options.prompt_tokens)
    decoder = Decoder(loaded.model, prompt, options, view)
    kv_bytes = decoder.bytes_per_token() * (len(prompt) + options.new_tokens)
    with opened_store(options, kv_bytes) as store:
        stored, facts = run_on_storage(decoder, store)
    kept = run_in_memory(decoder)
    report = {
        "model": loaded.name,
        "note": loaded.note,
        "dtype": options.dtype,
        "prompt_tokens": len(prompt),
        "new_tokens": options.new_tokens,
        "text": loaded.tokenizer.decode(stored.ids),
        **compare(stored, kept),
        **facts,
    }
    for name, run in (("on_storage", stored), ("in_memory", kept)):
        report[name] = {**asdict(run), "ms_per_token": run.ms_per_token}
    if options.json:
        print(json.dumps(report))
    else:
        view.show(report, loaded.tokenizer.decode(prompt[-60:]).lstrip())
    return report


def main() -> int:
    """The exit status."""
    options = parse()
    import dualblade

    view = View()
    try:
        report = demonstrate(options, view)
    except (dualblade.DualbladeError, OSError, ValueError) as error:
        view.log.print(f"The demo failed: {error}", style="red", markup=False)
        return 1
    return 0 if report["identical"] else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
