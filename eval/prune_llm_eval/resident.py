"""What a process holds in memory while it decodes on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from prune_llm.decoder import PlanDecoder
from prune_llm.parts import read_parts


@dataclass(frozen=True)
class Resident:
    """Memory of a process that does nothing but decode, in bytes.

    Attributes:
        imported: after importing everything.
        loaded: more than that, after loading the model and decoding.
        weights: the model's tensors; cache: keys and values.
    """

    imported: int
    loaded: int
    weights: int
    cache: int

    @property
    def other(self) -> int:
        """Beyond weights and cache; negative where some weights were never read."""
        return self.loaded - self.weights - self.cache


def measure_resident(model: str, context: int, tokens: int) -> Resident:
    """What a fresh process holds while it decodes."""
    command = [sys.executable, "-m", "prune_llm_eval.resident", model, str(context), str(tokens)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"measuring memory failed: {result.stderr.strip()[-500:]}")
    return Resident(**json.loads(result.stdout.splitlines()[-1]))


def _decode_alone(model: str, context: int, tokens: int) -> Resident:
    from prune_llm.integration import load

    load_nothing = resident_bytes()
    loaded = load(model).eval()
    parts = read_parts(loaded)
    decoder = PlanDecoder(parts, context + tokens)
    decoder.prefill([1] * context)
    for _ in range(tokens - 1):
        decoder.step(1)
    weights = sum(p.nbytes for p in {id(p): p for p in loaded.parameters()}.values())
    return Resident(load_nothing, resident_bytes() - load_nothing, weights, decoder.cache_bytes)


def resident_bytes() -> int:
    """Physical memory of this process, from the system (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


if __name__ == "__main__":
    import transformers.modeling_utils  # noqa: F401  # counted as imported

    print(json.dumps(asdict(_decode_alone(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))))
