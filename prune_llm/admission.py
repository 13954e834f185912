"""What a model's directory must keep to before transformers builds anything of it.

A directory from somewhere may lie about its sizes, to take memory or time, or name files and code
of others. The headers of its weights say how much there is; nothing may claim more.

Symbolic links are followed: hub snapshots consist of them, and what they lead to is only ever read
as what its name says.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from prune_llm.checkpoint import COMPANIONS, MAX_HEADER_BYTES, locate, read_json
from prune_llm.sparse_checkpoint import SparseCheckpoint, open_stored

# of what config.json counts, some configurations make a list before any layer is built
_COUNTS = re.compile(r"(num|n)_(.*_)?(layers?|blocks?|labels)|.*layers")
_FEW = 1000
# a model may hold buffers, and its weights in other pieces than the files
_SLACK = 4
_SLACK_ELEMENTS = 2**26


def admit(model: str | os.PathLike[str], trust_remote_code: bool = False) -> Path:
    """The directory of a model that may be loaded.

    Raises:
        ValueError: not a checkpoint, damaged, weights that are not safetensors, files that are none
            or too large, code of its own that is not trusted, a config.json that promises more than
            the weights hold.
    """
    directory = locate(model)
    _check_files(directory)
    stored = open_stored(directory)
    check_config(directory, stored.config, len(stored.names), trust_remote_code)
    _check_size(stored, trust_remote_code)
    return directory


class TooLarge(ValueError):
    """A model that is larger than its weights."""


def check_config(
    directory: Path, config: dict[str, Any], tensors: int, trust_remote_code: bool = False
) -> None:
    """What config.json alone tells about a model of so many tensors.

    Raises:
        ValueError: it names code or files of others, or promises more layers than tensors.
    """
    _check_references(directory, config, trust_remote_code)
    _check_counts(directory, config, max(_FEW, tensors))


def check_built(directory: Path, tensors: int, elements: int) -> None:
    """Build the model without memory, of a config.json that may ask for any amount of it.

    What else goes wrong is told where it is built for good.

    Raises:
        ValueError: it is far larger than the weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        with _bounded(directory, tensors, elements), torch.device("meta"):
            AutoModelForCausalLM.from_config(config)
    except TooLarge:
        raise
    except Exception:
        return


@contextmanager
def one_line(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Tell what foreign code raises over a directory as a ValueError: nobody can foresee what a
    loader of files does with those that were made to confuse it."""
    try:
        yield
    except (ValueError, OSError, ImportError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"model {str(directory)!r}: cannot be loaded ({type(error).__name__}: {reason})"
        ) from error


def _check_files(directory: Path) -> None:
    for file in sorted(directory.iterdir()):
        if not file.is_file() and not file.is_dir():
            raise ValueError(f"{file}: is no regular file, or a link that leads nowhere; remove it")
    for file in sorted({file for pattern in COMPANIONS for file in directory.glob(pattern)}):
        if file.is_file() and file.stat().st_size > MAX_HEADER_BYTES:
            raise ValueError(
                f"{file}: has {file.stat().st_size} bytes, more than the {MAX_HEADER_BYTES} that a "
                "file of its kind may have"
            )
        if file.is_file() and file.suffix == ".json":
            read_json(file)


def _check_references(directory: Path, config: dict[str, Any], trust: bool) -> None:
    """Raise where it would have other files read or other code run."""
    from transformers import CONFIG_MAPPING

    if (directory / "adapter_config.json").exists():
        raise ValueError(f"{directory}: is an adapter of another model; merge the two first")
    kind = config.get("model_type")
    # where transformers knows the model, its own code runs, and the one named here never does
    if "auto_map" in config and not trust and kind not in CONFIG_MAPPING:
        raise ValueError(
            f"{directory}: model_type {kind!r} needs code that comes with the model; read it, and "
            "give --trust-remote-code if you trust it"
        )
    for key, value in _entries(config):
        if key == "transformers_weights":
            raise ValueError(f"{directory}: config.json names its weights' file; remove {key}")
        if key.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise ValueError(f"{directory}: config.json has {key} {value[:100]!r}; remove it")


def _check_counts(directory: Path, config: dict[str, Any], most: int) -> None:
    for key, value in _entries(config):
        if _COUNTS.fullmatch(key) and isinstance(value, int | float) and value > most:
            raise ValueError(
                f"{directory}: config.json has {key} {value!r}, and the weights are {most} tensors "
                "or fewer"
            )


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """All keys and values of nested JSON."""
    below = value.items() if isinstance(value, dict) else ()
    yield from below
    for nested in value if isinstance(value, list) else (entry for _, entry in below):
        yield from _entries(nested)


def _check_size(stored: SparseCheckpoint, trust: bool) -> None:
    """Build the model without memory, and stop where it outgrows what is stored."""
    from transformers import AutoConfig, AutoModelForCausalLM

    directory = stored.directory
    with one_line(directory):
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust)
        with _bounded(directory, len(stored.names), stored.elements), torch.device("meta"):
            AutoModelForCausalLM.from_config(config, trust_remote_code=trust)


@contextmanager
def _bounded(directory: Path, stored_tensors: int, stored_elements: int) -> Iterator[None]:
    """While modules are built: raise TooLarge as soon as they hold more than is stored."""
    most_tensors = _SLACK * stored_tensors + _FEW
    most_elements = _SLACK * stored_elements + _SLACK_ELEMENTS
    tensors = elements = 0

    def note(_owner: nn.Module, _name: str, tensor: Tensor | None) -> None:
        nonlocal tensors, elements
        if tensor is None:
            return
        tensors, elements = tensors + 1, elements + tensor.numel()
        if tensors > most_tensors or elements > most_elements:
            raise TooLarge(
                f"{directory}: config.json describes a larger model than the weights, which "
                f"are {stored_tensors} tensors of {stored_elements} elements together"
            )

    handles = [
        module_hooks.register_module_parameter_registration_hook(note),
        module_hooks.register_module_buffer_registration_hook(note),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
