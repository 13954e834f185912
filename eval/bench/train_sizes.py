"""Train Llamas of three sizes on stories and WikiText, half and half, with one tokenizer.

    python eval/bench/train_sizes.py --wiki wikitext2-valid.txt --output DIR [--size small ...]

Writes DIR/small, DIR/medium and DIR/large: five blocks, hidden 64, 128 and 192. `bench_quality.py`
prunes them. They differ in nothing but their width and how long they learn.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from prune_llm.demo import stories
from prune_llm.demo.train import (
    TrainConfig,
    build_model,
    save,
    stream,
    train,
    train_tokenizer,
    windows,
)

COMMON = TrainConfig(vocabulary=2048, positions=256, stories=6000, save_every=500)
# the wider the model, the more it learns from a token
SIZES = {
    "small": replace(COMMON, hidden=64, intermediate=192, steps=1000),
    "medium": replace(COMMON, hidden=128, intermediate=384, steps=800),
    "large": replace(COMMON, hidden=192, intermediate=576, steps=600),
}


def articles(text: str) -> list[str]:
    """Cut a WikiText file at the headings of its articles (`` = Name = ``)."""
    found = [""]
    for line in text.splitlines(keepends=True):
        if line.startswith(" = ") and not line.startswith(" = = "):
            found.append("")
        found[-1] += line
    return [article for article in found if article.strip()]


def mixed(streams: tuple[Tensor, Tensor], config: TrainConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and labels [B, T]: as many windows of one text as of the other."""
    half = replace(config, batch_tokens=config.batch_tokens // 2)
    pairs = zip(*(windows(tokens, config.positions, half) for tokens in streams), strict=True)
    for first_BT, second_BT in islice(pairs, config.steps):
        batch_BT = torch.cat((first_BT, second_BT))
        yield batch_BT, batch_BT


def run(size: str, wiki: Path, output: Path, steps: int | None) -> None:
    """Train one size and write it; the tokenizer is the same for all."""
    config = SIZES[size]
    config = replace(config, steps=steps or config.steps)
    texts = stories("train", config.stories)
    documents = articles(wiki.read_text(encoding="utf-8"))
    # a third of the stories' text is about as long as the WikiText
    tokenizer = train_tokenizer([*texts[:1500], *documents], config.vocabulary, config.positions)
    streams = stream(tokenizer, texts), stream(tokenizer, documents)
    model = build_model(config, tokenizer)
    about = {
        "size": size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": config.steps,
        "tokens_trained_on": config.steps * config.batch_tokens,
        "tokens_of_stories": len(streams[0]),
        "tokens_of_wiki": len(streams[1]),
    }
    print(json.dumps(about), flush=True)
    started = time.process_time()
    target = output / size
    train(model, mixed(streams, config), config, lambda: save(model, tokenizer, target))
    save(model, tokenizer, target)
    print(json.dumps({**about, "cpu_s": round(time.process_time() - started, 1)}), flush=True)


def main() -> None:
    """Train the sizes that were asked for, one after the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--wiki", type=Path, required=True, help="WikiText to train on")
    parser.add_argument("--output", type=Path, required=True, help="directory of the three models")
    parser.add_argument("--size", choices=tuple(SIZES), action="append", help="repeatable; all")
    parser.add_argument("--steps", type=int, help="instead of the size's own")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for size in options.size or SIZES:
        run(size, options.wiki, options.output, options.steps)


if __name__ == "__main__":
    main()
