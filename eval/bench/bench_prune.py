"""Time and peak memory of one-shot pruning: prune_llm against llm-compressor.

The parent writes a random-weight Llama checkpoint, a word-level tokenizer and a calibration
text, then starts one fresh process per (tool, method, round), tools interleaved, so that both
see the same checkpoint, the same token windows and the same number of threads.

Clock: starts after the imports of the tool, stops when the pruned checkpoint is on disk.
Memory: ``VmHWM`` (peak resident set) of the worker, in bytes, beside the resident set right
after the imports.  The sparsity count happens after both have been read.

Peer settings (llm-compressor 0.14): the documented load / ``oneshot`` / ``save_pretrained``
sequence, default sequential pipeline, error propagation on, no shuffling, pre-tokenised windows,
block size 128, damping 0.01, batch size from ``--peer-batch-size`` (default 1, its own default).

Example::

    PYTHONPATH=.:kernels:eval python eval/bench/bench_prune.py --rounds 3 --threads 2
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import random
import re
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TOOLS = ("ours", "llmcompressor")
# a quality of ours is timed beside the peer's method of its price
QUALITIES = {"balanced": "sparsegpt"}
METHODS = ("sparsegpt", "wanda", *QUALITIES)
MODULE_OF = {"ours": "prune_llm", "llmcompressor": "llmcompressor"}
VERSIONED = ("torch", "transformers", "llmcompressor", "compressed_tensors", "prune_llm")
SPARSITY = 0.5
DAMPING = 0.01
BLOCK_SIZE = 128
MIB = 1024 * 1024
LINEAR_WEIGHT = re.compile(r"\.layers\.\d+\..*_proj\.weight$")

# Options that decide what is measured; folders of this machine stay out of the report.
SHOWN = frozenset(
    (
        "blocks",
        "hidden",
        "intermediate",
        "heads",
        "kv_heads",
        "vocab",
        "dtype",
        "samples",
        "seq_len",
        "methods",
        "tools",
        "rounds",
        "threads",
        "peer_batch_size",
    )
)

Result = dict[str, Any]


# ---------------------------------------------------------------- inputs (parent process)


def make_tokenizer(directory: Path, vocab: int) -> None:
    """Save a word-level tokenizer of ``vocab`` entries that AutoTokenizer can load."""
    tokenizers = importlib.import_module("tokenizers")
    transformers = importlib.import_module("transformers")
    names = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(vocab - 3))]
    table = {name: index for index, name in enumerate(names)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(table, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    core.decoder = tokenizers.decoders.WordPiece(cleanup=False)  # spaces between words
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        model_max_length=1 << 30,
    )
    fast.save_pretrained(str(directory))


def make_model(directory: Path, args: argparse.Namespace) -> None:
    """Save a random-weight, untied Llama of the requested shape (seed 0)."""
    torch = importlib.import_module("torch")
    transformers = importlib.import_module("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=args.blocks,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        vocab_size=args.vocab,
        max_position_embeddings=max(2048, args.seq_len),
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, args.dtype))
    model.save_pretrained(str(directory))


def make_text(path: Path, vocab: int, tokens: int) -> None:
    """Write ``tokens`` pseudo-random words (seed 0), each of them exactly one token."""
    rng = random.Random(0)
    words = [f"w{min(int(rng.paretovariate(0.5)) - 1, vocab - 4)}" for _ in range(tokens)]
    path.write_text(" ".join(words), encoding="utf-8")


# ---------------------------------------------------------------- measurements (worker process)


def status_bytes(key: str) -> int:
    """One memory field of this process (``VmHWM``, ``VmRSS``) in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{key} is not in the process status")


def checkpoint_sparsity(directory: Path) -> tuple[float, int]:
    """Fraction of zeros over the linears of all blocks, and how many linears were counted."""
    safetensors = importlib.import_module("safetensors")
    zeros = total = count = 0
    for shard in sorted(directory.glob("*.safetensors")):
        with safetensors.safe_open(str(shard), framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 (not a dict)
                if LINEAR_WEIGHT.search(key):
                    tensor = handle.get_tensor(key)
                    zeros += int((tensor == 0).sum())
                    total += tensor.numel()
                    count += 1
    return (zeros / total if total else 0.0), count


def directory_bytes(directory: Path) -> int:
    """Size of all files below a directory, in bytes."""
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())


def token_windows(tokenizer: Any, text: str, samples: int, seq_len: int) -> list[list[int]]:
    """The first ``samples`` consecutive windows of ``seq_len`` tokens of a text."""
    ids = tokenizer(text)["input_ids"]
    windows = [ids[i : i + seq_len] for i in range(0, len(ids) - seq_len + 1, seq_len)][:samples]
    if len(windows) < samples:
        raise ValueError(f"the text gives {len(windows)} windows, {samples} are needed")
    return windows


def run_ours(args: argparse.Namespace) -> dict[str, float]:
    """Prune with prune_llm; its one call loads, prunes and saves, so no split is reported."""
    package = importlib.import_module("prune_llm")
    presets = importlib.import_module("prune_llm.presets").PRESETS
    config = package.PruneConfig(
        **presets.get(args.method, {"method": args.method}),
        pattern=str(SPARSITY),
        calibration=str(args.calibration),
        samples=args.samples,
        seq_len=args.seq_len,
        seed=0,
        sampling="first",
        device="cpu",
        dtype="auto",
        damping=DAMPING,
        format="dense",
    )
    package.prune(str(args.model_dir), config, output=str(args.output))
    return {}


def peer_recipe(method: str) -> Any:
    """The llm-compressor modifier for 50 % unstructured, output head left out."""
    method = QUALITIES.get(method, method)
    common = {
        "sparsity": SPARSITY,
        "mask_structure": "0:0",
        "targets": ["Linear"],
        "ignore": ["re:.*lm_head"],
    }
    if method == "wanda":
        module = importlib.import_module("llmcompressor.modifiers.pruning.wanda")
        return module.WandaPruningModifier(**common)
    module = importlib.import_module("llmcompressor.modifiers.pruning.sparsegpt")
    return module.SparseGPTModifier(block_size=BLOCK_SIZE, dampening_frac=DAMPING, **common)


def peer_dataset(tokenizer: Any, args: argparse.Namespace) -> Any:
    """The calibration windows as a pre-tokenised dataset."""
    datasets = importlib.import_module("datasets")
    text = Path(args.calibration).read_text(encoding="utf-8")
    windows = token_windows(tokenizer, text, args.samples, args.seq_len)
    ones = [[1] * args.seq_len for _ in windows]
    return datasets.Dataset.from_dict({"input_ids": windows, "attention_mask": ones})


def run_peer(args: argparse.Namespace) -> dict[str, float]:
    """Prune with llm-compressor; returns the seconds of each of its steps."""
    transformers = importlib.import_module("transformers")
    llmcompressor = importlib.import_module("llmcompressor")
    marks = [time.perf_counter()]
    model = transformers.AutoModelForCausalLM.from_pretrained(str(args.model_dir), dtype="auto")
    marks.append(time.perf_counter())
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(args.model_dir))
    dataset = peer_dataset(tokenizer, args)
    marks.append(time.perf_counter())
    llmcompressor.oneshot(
        model=model,
        processor=tokenizer,
        dataset=dataset,
        recipe=peer_recipe(args.method),
        num_calibration_samples=args.samples,
        max_seq_length=args.seq_len,
        shuffle_calibration_samples=False,
        batch_size=args.peer_batch_size,
    )
    marks.append(time.perf_counter())
    model.save_pretrained(str(args.output), save_compressed=True)
    tokenizer.save_pretrained(str(args.output))
    marks.append(time.perf_counter())
    names = ("load_s", "tokenize_s", "prune_s", "save_s")
    return {name: marks[i + 1] - marks[i] for i, name in enumerate(names)}


def preload(tool: str, method: str) -> None:
    """Import everything the tool needs, so that the clock sees no import."""
    for name in ("torch", "transformers", "safetensors.torch"):
        importlib.import_module(name)
    importlib.import_module("transformers.models.llama.modeling_llama")
    if tool == "ours":
        importlib.import_module("prune_llm")
        return
    importlib.import_module("datasets")
    importlib.import_module("llmcompressor")
    peer_recipe(method)


def worker(args: argparse.Namespace) -> int:
    """Run one tool once and print its measurements as one JSON line."""
    preload(args.worker, args.method)
    importlib.import_module("torch").set_num_threads(args.threads)
    baseline = status_bytes("VmRSS")
    cpu_start = time.process_time()
    start = time.perf_counter()
    steps = run_ours(args) if args.worker == "ours" else run_peer(args)
    wall = time.perf_counter() - start
    cpu = time.process_time() - cpu_start
    peak = status_bytes("VmHWM")
    sparsity, linears = checkpoint_sparsity(args.output)
    result: Result = {
        "tool": args.worker,
        "method": args.method,
        "wall_s": wall,
        "cpu_s": cpu,
        **steps,
        "peak_rss_bytes": peak,
        "import_rss_bytes": baseline,
        "sparsity": sparsity,
        "linears": linears,
        "output_bytes": directory_bytes(args.output),
        "major_faults": resource.getrusage(resource.RUSAGE_SELF).ru_majflt,
    }
    print(json.dumps(result), flush=True)
    return 0


# ---------------------------------------------------------------- orchestration (parent process)

PROBE = """
import importlib, importlib.metadata, json, sys
importlib.import_module(sys.argv[1])
found = {"python": sys.version.split()[0]}
for name in sys.argv[2:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        module = sys.modules.get(name)
        if module is not None:
            found[name] = str(getattr(module, "__version__", "unknown"))
print(json.dumps(found))
"""


def last_json(text: str) -> Result:
    """The last line of a text that is a JSON object."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            loaded: Result = json.loads(line)
            return loaded
    raise ValueError("the process printed no JSON line")


def probe(python: str, tool: str) -> Result | None:
    """Package versions seen by an interpreter, or None when it cannot import the tool."""
    command = [python, "-c", PROBE, MODULE_OF[tool], *VERSIONED]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except OSError:
        return None
    return last_json(done.stdout) if done.returncode == 0 else None


def worker_command(tool: str, method: str, work: Path, args: argparse.Namespace) -> list[str]:
    """The command line of one worker process."""
    python = args.llmcompressor_python if tool == "llmcompressor" else sys.executable
    output = work / f"out-{tool}-{method}"
    values = {
        "--worker": tool,
        "--method": method,
        "--model-dir": work / "model",
        "--calibration": work / "calibration.txt",
        "--output": output,
        "--samples": args.samples,
        "--seq-len": args.seq_len,
        "--threads": args.threads,
        "--peer-batch-size": args.peer_batch_size,
    }
    flat = [str(part) for pair in values.items() for part in pair]
    return [python, str(Path(__file__).resolve()), *flat]


def worker_environment(threads: int) -> dict[str, str]:
    """Environment of a worker: fixed thread counts, no network look-ups."""
    count = str(threads)
    fixed = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), count)
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **fixed, **quiet}


def run_worker(tool: str, method: str, work: Path, args: argparse.Namespace) -> Result:
    """One measured run in a fresh process; raises with its last words when it fails."""
    shutil.rmtree(work / f"out-{tool}-{method}", ignore_errors=True)
    load = os.getloadavg()[0]
    done = subprocess.run(
        worker_command(tool, method, work, args),
        capture_output=True,
        text=True,
        env=worker_environment(args.threads),
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{tool} {method} failed:\n{done.stderr[-3000:]}")
    result = last_json(done.stdout)
    result["load_before"] = load
    return result


def mask_agreement(method: str, work: Path) -> Result | None:
    """How far the two tools' checkpoints agree: equal masks, and relative weight distance."""
    first, second = (work / f"out-{tool}-{method}" for tool in TOOLS)
    if not (first.is_dir() and second.is_dir()):
        return None
    ours, peer = weight_locations(first), weight_locations(second)
    if ours.keys() != peer.keys():
        return {"same_tensors": False}
    equal = total = 0
    difference = norm = 0.0
    for name in ours:
        a, b = read_weight(ours[name], name).float(), read_weight(peer[name], name).float()
        equal += int(((a == 0) == (b == 0)).sum())
        total += a.numel()
        difference += float((a - b).square().sum())
        norm += float(b.square().sum())
    return {
        "same_tensors": True,
        "mask_equal": equal / total,
        "relative_distance": float((difference / norm) ** 0.5),
    }


def weight_locations(directory: Path) -> dict[str, Path]:
    """Which shard holds each linear weight of the blocks."""
    safetensors = importlib.import_module("safetensors")
    found: dict[str, Path] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        with safetensors.safe_open(str(shard), framework="pt") as handle:
            found.update({k: shard for k in handle.keys() if LINEAR_WEIGHT.search(k)})  # noqa: SIM118
    return found


def read_weight(shard: Path, name: str) -> Any:
    """One tensor of a safetensors file."""
    safetensors = importlib.import_module("safetensors")
    with safetensors.safe_open(str(shard), framework="pt") as handle:
        return handle.get_tensor(name)


def cpu_model() -> str:
    """Name of the processor as the kernel gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


# ---------------------------------------------------------------- report


def spread(values: list[float], digits: int = 1) -> str:
    """Median with the range, e.g. ``12.3 (12.0-12.9)``."""
    low, mid, high = min(values), statistics.median(values), max(values)
    return f"{mid:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def column(runs: list[Result], key: str, scale: float = 1.0) -> list[float]:
    """One field of several runs, divided by ``scale``."""
    return [float(run[key]) / scale for run in runs]


def pair_ratios(ours: list[Result], peer: list[Result], key: str) -> list[float]:
    """Peer over ours, run by run in the order they were interleaved (above 1: ours is less)."""
    return [float(b[key]) / float(a[key]) for a, b in zip(ours, peer, strict=True)]


def summary_row(tool: str, method: str, runs: list[Result]) -> str:
    """One line of the markdown table."""
    prune = spread(column(runs, "prune_s")) if all("prune_s" in r for r in runs) else "-"
    cells = [
        method,
        tool,
        spread(column(runs, "wall_s")),
        prune,
        spread(column(runs, "cpu_s")),
        spread(column(runs, "peak_rss_bytes", MIB), 0),
        spread(column(runs, "import_rss_bytes", MIB), 0),
        f"{100 * runs[-1]['sparsity']:.3f} %",
        f"{runs[-1]['output_bytes'] / MIB:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def table(runs: dict[str, dict[str, list[Result]]]) -> list[str]:
    """Markdown table of all methods and tools."""
    head = [
        "method",
        "tool",
        "wall s",
        "prune call s",
        "CPU s",
        "peak RSS MiB",
        "after imports MiB",
        "sparsity",
        "output MiB",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for method, tools in runs.items():
        lines += [summary_row(tool, method, done) for tool, done in tools.items()]
    return lines


def ratios(tools: dict[str, list[Result]]) -> dict[str, list[float]]:
    """Pairwise peer/ours ratios of time, CPU time and memory; empty without both tools."""
    if not all(tools.get(tool) for tool in TOOLS):
        return {}
    ours, peer = tools["ours"], tools["llmcompressor"]
    return {key: pair_ratios(ours, peer, key) for key in ("wall_s", "cpu_s", "peak_rss_bytes")}


def ratio_lines(method: str, values: dict[str, list[float]]) -> list[str]:
    """Human-readable lines for the ratios of one method."""
    label = {"wall_s": "wall time", "cpu_s": "CPU time", "peak_rss_bytes": "peak RSS"}
    return [f"- {method}, {label[k]}: peer / ours = {spread(v, 2)}" for k, v in values.items()]


def command_text(args: argparse.Namespace) -> str:
    """The command line without the directories of this machine."""
    words = ["python", Path(__file__).name]
    for name, value in sorted(vars(args).items()):
        if name in {"methods", "tools"}:
            value = ",".join(value)
        if name in SHOWN:
            words += ["--" + name.replace("_", "-"), str(value)]
    return shlex.join(words)


def report(document: Result, runs: dict[str, dict[str, list[Result]]]) -> None:
    """Print the markdown report, then the JSON document on the last line."""
    print(f"CPU: {document['cpu']}, threads: {document['threads']}")
    print(f"Command: `{document['command']}`")
    for tool, versions in document["versions"].items():
        print(f"Versions for {tool}: " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    print()
    print("\n".join(table(runs)))
    loads = [
        run["load_before"] for tools in runs.values() for done in tools.values() for run in done
    ]
    print(
        "\nMedian (min-max) over the rounds. Load average before the runs: " + spread(loads) + "."
    )
    print("Trust wall times only when no other work shared the cores; CPU times suffer less.\n")
    for method in runs:
        for line in ratio_lines(method, document["ratios"].get(method, {})):
            print(line)
        if agree := document["agreement"].get(method):
            print(f"- {method}, agreement of the two checkpoints: {json.dumps(agree)}")
    print()
    print(json.dumps(document))


def prepare(work: Path, args: argparse.Namespace) -> None:
    """Write checkpoint, tokenizer and calibration text into the work folder."""
    (work / "model").mkdir(parents=True)
    make_model(work / "model", args)
    make_tokenizer(work / "model", args.vocab)
    make_text(work / "calibration.txt", args.vocab, args.samples * args.seq_len)


def measure(
    work: Path, tools: list[str], args: argparse.Namespace
) -> tuple[dict[str, dict[str, list[Result]]], Result]:
    """All runs, interleaved A B A B for each method, and the agreement per method."""
    runs: dict[str, dict[str, list[Result]]] = {}
    agreement: Result = {}
    for method in args.methods:
        runs[method] = {tool: [] for tool in tools}
        for number in range(args.rounds):
            for tool in tools:
                result = run_worker(tool, method, work, args)
                runs[method][tool].append(result)
                note = f"{result['wall_s']:.1f} s, {result['peak_rss_bytes'] / MIB:.0f} MiB"
                print(f"{method} round {number + 1} {tool}: {note}", file=sys.stderr, flush=True)
        agreement[method] = mask_agreement(method, work)
        for tool in tools:
            shutil.rmtree(work / f"out-{tool}-{method}", ignore_errors=True)
    return runs, agreement


def available(args: argparse.Namespace) -> dict[str, Result]:
    """The wanted tools that can be imported, with their versions; one line for each that can't."""
    pythons = {"ours": sys.executable, "llmcompressor": args.llmcompressor_python}
    found: dict[str, Result] = {}
    for tool in args.tools:
        versions = probe(pythons[tool], tool)
        if versions is None:
            print(f"{MODULE_OF[tool]} cannot be imported: {tool} is not timed.")
        else:
            found[tool] = versions
    return found


def parent(args: argparse.Namespace) -> int:
    """Prepare the inputs, run every worker, print the report."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder is removed
    versions = available(args)
    if not versions:
        return 1
    work = Path(tempfile.mkdtemp(prefix="bench-prune-", dir=args.work_dir))
    try:
        prepare(work, args)
        runs, agreement = measure(work, list(versions), args)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    document: Result = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "threads": args.threads,
        "command": command_text(args),
        "versions": versions,
        "ratios": {method: ratios(tools) for method, tools in runs.items()},
        "agreement": agreement,
        "runs": runs,
    }
    report(document, runs)
    return 0


def names(allowed: tuple[str, ...]) -> Any:
    """An argparse type: a comma-separated subset of the allowed names."""

    def parse(text: str) -> list[str]:
        chosen = [part.strip() for part in text.split(",") if part.strip()]
        unknown = [part for part in chosen if part not in allowed]
        if unknown or not chosen:
            raise argparse.ArgumentTypeError(f"choose from {', '.join(allowed)}")
        return chosen

    return parse


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def build_parser() -> argparse.ArgumentParser:
    """Command line of parent and worker."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    sizes = {
        "--blocks": (6, "decoder blocks"),
        "--hidden": (1024, "hidden width"),
        "--intermediate": (2816, "width of the feed-forward layer"),
        "--heads": (16, "attention heads"),
        "--kv-heads": (4, "key/value heads"),
        "--vocab": (8192, "vocabulary entries"),
        "--samples": (64, "calibration windows"),
        "--seq-len": (512, "tokens per window"),
        "--rounds": (3, "runs of each tool and method"),
        "--threads": (2, "threads of every worker"),
        "--peer-batch-size": (1, "calibration batch size of llm-compressor"),
    }
    for flag, (default, text) in sizes.items():
        parser.add_argument(flag, type=positive, default=default, help=f"{text} ({default})")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--methods", type=names(METHODS), default=list(METHODS))
    parser.add_argument("--tools", type=names(TOOLS), default=list(TOOLS))
    parser.add_argument("--llmcompressor-python", default=sys.executable, metavar="PATH")
    parser.add_argument("--work-dir", type=Path, help="where the temporary folder goes")
    parser.add_argument("--worker", choices=TOOLS, help="internal: run one tool once")
    parser.add_argument("--method", choices=METHODS, default=METHODS[0], help="internal")
    parser.add_argument("--model-dir", type=Path, help="internal")
    parser.add_argument("--calibration", type=Path, help="internal")
    parser.add_argument("--output", type=Path, help="internal")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point: worker or parent."""
    args = build_parser().parse_args(argv)
    return worker(args) if args.worker else parent(args)


if __name__ == "__main__":
    raise SystemExit(main())
