"""A checkpoint is a directory: config, tokenizer, safetensors. Read lazily, written safely.

Tensors are read one at a time with plain file reads, never mapped: what is freed leaves the
process, and a shard that is damaged says so before anything is computed. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from prune_llm.experts import slice_name, split_name

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
REPORT_FILE = "prune_report.json"
# figures of exactly these weights: see `card_facts`
MEASURED_FILE = "measured.json"
# a header describes tensors only; the reference implementation has the same bound
MAX_HEADER_BYTES = 100_000_000
SHARD_BYTES = 5_000_000_000
COPY_BYTES = 1 << 24
# what travels with the weights: configuration, tokenizer, generation settings, licences
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
HUB_FILES = [*COMPANIONS, "*.safetensors", "README.md"]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies: ``nbytes`` bytes at ``start`` (absolute) in ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    nbytes: int

    def read(self) -> Tensor:
        """Read into memory of its own, in its stored dtype, on the CPU."""
        data = torch.empty(self.nbytes, dtype=torch.uint8)
        with self.file.open("rb") as file:
            file.seek(self.start)
            if file.readinto(memoryview(data.numpy())) != self.nbytes:  # type: ignore[arg-type]
                raise ValueError(f"{self.file}: ends inside tensor {self.name!r}; get it again")
        return data.view(DTYPES[self.dtype]).reshape(self.shape)

    @property
    def is_fused(self) -> bool:
        """Whether it may hold the experts of a block, one behind the other."""
        return len(self.shape) > 2 and self.shape[0] > 0

    def slice(self, index: int) -> StoredTensor:
        """Where one entry of the first dimension lies."""
        count = self.shape[0]
        assert 0 <= index < count, f"{self.name} has {count} slices"
        size = self.nbytes // count
        name, start = slice_name(self.name, index), self.start + index * size
        return replace(self, name=name, shape=self.shape[1:], start=start, nbytes=size)

    def chunks(self) -> Iterator[bytes]:
        """The raw bytes, at most COPY_BYTES at a time."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            left = self.nbytes
            while left:
                chunk = file.read(min(left, COPY_BYTES))
                if not chunk:
                    raise ValueError(f"{self.file}: ends inside tensor {self.name!r}; get it again")
                left -= len(chunk)
                yield chunk


def read_header(file: Path) -> list[StoredTensor]:
    """List the tensors of a safetensors file.

    Raises:
        ValueError: truncated, not safetensors, or a header that contradicts the file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        header = _header_json(stream, file, size)
    data_start = size - _data_bytes(header, file, size)
    tensors = []
    for name, entry in header.items():
        if name != "__metadata__":
            tensors.append(_stored_tensor(name, entry, file, data_start, size))
    _refuse_overlaps(tensors, file, data_start)
    return tensors


def _header_json(stream: BinaryIO, file: Path, size: int) -> dict[str, Any]:
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(f"{file}: truncated or not a safetensors file ({size} bytes)")
    try:
        header = json.loads(stream.read(length))
    except (ValueError, RecursionError):
        raise ValueError(f"{file}: damaged, its safetensors header is not JSON") from None
    if not isinstance(header, dict):
        raise ValueError(f"{file}: damaged, its safetensors header is not a table")
    return header


def _data_bytes(header: dict[str, Any], file: Path, size: int) -> int:
    """Bytes of tensor data the header promises; they must end exactly where the file does."""
    try:
        ends = [
            _whole(e["data_offsets"][1]) for name, e in header.items() if name != "__metadata__"
        ]
        with file.open("rb") as stream:
            have = size - 8 - int.from_bytes(stream.read(8), "little")
    except (KeyError, TypeError, IndexError, ValueError):
        raise ValueError(f"{file}: damaged, a tensor in its header has no offsets") from None
    promised = max(ends, default=0)
    if promised != have:
        kind = "truncated" if have < promised else "damaged"
        raise ValueError(
            f"{file}: {kind}, its header promises {promised} bytes of tensors and it holds {have}"
        )
    return have


def _stored_tensor(
    name: str, entry: dict[str, Any], file: Path, data_start: int, size: int
) -> StoredTensor:
    try:
        dtype, shape = str(entry["dtype"]), tuple(_whole(n) for n in entry["shape"])
        start, end = (_whole(n) for n in entry["data_offsets"])
        nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    except KeyError as missing:
        raise ValueError(f"{file}: tensor {name!r}: unknown or missing {missing}") from None
    except (TypeError, ValueError):
        raise ValueError(f"{file}: damaged, the header entry of {name!r} is malformed") from None
    if min(shape, default=0) < 0 or start < 0 or end - start != nbytes or data_start + end > size:
        raise ValueError(f"{file}: damaged, the offsets of {name!r} do not fit its shape {shape}")
    return StoredTensor(name, dtype, shape, file, data_start + start, nbytes)


def _whole(number: Any) -> int:
    if type(number) is not int:
        raise ValueError(f"{number!r} is not a whole number")
    return number


def _refuse_overlaps(tensors: list[StoredTensor], file: Path, data_start: int) -> None:
    """Bytes that belong to many tensors would be far more in memory than on disk."""
    position = data_start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.nbytes)):
        if tensor.start != position:
            raise ValueError(
                f"{file}: damaged, {tensor.name!r} does not begin where the tensor before it ends"
            )
        position += tensor.nbytes


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint directory; ``tensors`` is keyed by the names on disk."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def tensor(self, name: str) -> StoredTensor:
        """A tensor by its name, or an expert of a fused one: "experts.down_proj[3]"."""
        whole, index = split_name(name)
        return self.tensors[name] if index is None else self.tensors[whole].slice(index)

    def sha256(self, progress: Callable[[int], None] | None = None) -> str:
        """Hash of names, dtypes, shapes and bytes; the same however the tensors are sharded."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
            for chunk in tensor.chunks():
                digest.update(chunk)
                if progress is not None:
                    progress(len(chunk))
        return digest.hexdigest()


def open_checkpoint(model: str | os.PathLike[str]) -> Checkpoint:
    """Open a local directory, or a hub name after downloading it.

    Raises:
        ValueError: not found, no config, no safetensors weights, damaged, or already quantised.
    """
    directory = locate(model)
    config = _read_config(directory)
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ValueError(
            f"{directory}: already quantised or pruned (quant_method {method or 'unknown'!r}); "
            "give the original checkpoint"
        )
    tensors: dict[str, StoredTensor] = {}
    for file in _weight_files(directory):
        tensors |= {tensor.name: tensor for tensor in read_header(file)}
    if not tensors:
        raise ValueError(f"{directory}: its safetensors files hold no tensor")
    return Checkpoint(directory, config, tensors)


def locate(model: str | os.PathLike[str]) -> Path:
    """The directory of a local path or of a hub snapshot."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"model {str(model)!r}: is a file; give the checkpoint's directory")
    return _download(str(model))


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except HFValidationError:
        raise ValueError(f"model {name!r}: no such directory, and not a hub name") from None
    except OSError as error:  # all of the hub's errors are
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"model {name!r}: no such directory, and the hub did not give it ({reason})"
        ) from None


def read_json(file: Path) -> Any:
    """Raises ValueError where it is none, or nested without end."""
    try:
        return json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from None


def _read_config(directory: Path) -> dict[str, Any]:
    file = directory / "config.json"
    if not file.is_file():
        raise ValueError(f"{directory}: has no config.json; give a Hugging Face model directory")
    config = read_json(file)
    if not isinstance(config, dict):
        raise ValueError(f"{file}: not a JSON object")
    return config


def _weight_files(directory: Path) -> list[Path]:
    if (directory / WEIGHTS_FILE).is_file():
        return [directory / WEIGHTS_FILE]
    index = directory / INDEX_FILE
    if not index.is_file():
        others = sorted(p.name for p in directory.glob("*") if p.suffix in {".bin", ".pt", ".pth"})
        hint = f" (found {others[0]}; convert it to safetensors first)" if others else ""
        raise ValueError(f"{directory}: has no {WEIGHTS_FILE} and no {INDEX_FILE}{hint}")
    return _indexed_files(directory, index)


def _indexed_files(directory: Path, index: Path) -> list[Path]:
    try:
        names = sorted({str(name) for name in read_json(index)["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index}: damaged, it has no readable weight_map") from None
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index}: names {name!r}, which is not a file of this directory")
        if not (directory / name).is_file():
            raise ValueError(f"{directory}: shard {name} is missing; get the checkpoint again")
    return [directory / name for name in names]


def companions(directory: Path) -> list[Path]:
    """Files that travel with the weights: configuration, tokenizer, licences; no index."""
    found = {path for pattern in COMPANIONS for path in directory.glob(pattern) if path.is_file()}
    left_out = {INDEX_FILE, REPORT_FILE, MEASURED_FILE}
    return sorted(path for path in found if path.name not in left_out)


def write_shards(directory: Path, tensors: Iterable[StoredTensor]) -> dict[str, StoredTensor]:
    """Copy tensors, byte for byte, into ``model.safetensors`` or numbered shards with an index.

    Returns where each tensor now lies. The order given is the order on disk.
    """
    shards = _cut_shards(list(tensors))
    if len(shards) == 1:
        names = [WEIGHTS_FILE]
    else:
        total = len(shards)
        names = [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    written: dict[str, StoredTensor] = {}
    for name, shard in zip(names, shards, strict=True):
        written |= _write_file(directory / name, shard)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in written.values())},
            "weight_map": {name: tensor.file.name for name, tensor in sorted(written.items())},
        }
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return written


def _cut_shards(tensors: list[StoredTensor]) -> list[list[StoredTensor]]:
    shards: list[list[StoredTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def _write_file(file: Path, tensors: list[StoredTensor]) -> dict[str, StoredTensor]:
    # the widest elements first, so that every tensor is aligned to its own size
    tensors = sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype].itemsize)
    header, position = layout(tensors)
    written = {}
    with file.open("wb") as out:
        out.write(header)
        for tensor in tensors:
            written[tensor.name] = StoredTensor(
                tensor.name, tensor.dtype, tensor.shape, file, out.tell(), tensor.nbytes
            )
            for chunk in tensor.chunks():
                out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    assert file.stat().st_size == len(header) + position
    return written


def layout(tensors: list[StoredTensor]) -> tuple[bytes, int]:
    """The header (length prefix included, padded to 8 bytes) and the number of data bytes."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, position
