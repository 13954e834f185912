"""`prune-llm prune`: its options, its checks, what it prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from prune_llm.activation.allocation import ALLOCATIONS as LEVEL_ALLOCATIONS
from prune_llm.activation.levels import CRITERIA
from prune_llm.activation.sites import GRANULARITIES
from prune_llm.activation.sparsify import SparsifyConfig
from prune_llm.activation.texts import LEAST_WINDOWS
from prune_llm.allocation import ALLOCATIONS
from prune_llm.cli_sparsify import parse_shares, print_levels
from prune_llm.cli_tables import print_prune_report, print_search
from prune_llm.config import FORMATS, TARGETS, PruneConfig
from prune_llm.journal import finished
from prune_llm.masks import Pattern
from prune_llm.methods import METHODS
from prune_llm.presets import CHOSEN, DEFAULT, PARTS, PRESETS, preset
from prune_llm.prune import prune
from prune_llm.pruning_level import Try, prune_within
from prune_llm.ranks import launched_rank
from prune_llm.refinement import REFINEMENTS
from prune_llm.report import PruneReport
from prune_llm.staging import partial_directory

DEFAULTS = {entry.name: entry.default for entry in fields(PruneConfig)}
Command = Callable[..., Any]
# of SparsifyConfig, as --activation-NAME
LEVEL_OPTIONS = ("criterion", "allocation", "granularity")


def option(name: str, **settings: Any) -> Callable[[Any], Any]:
    """A click option that stands for the PruneConfig field of the same name."""
    flag = "--" + name.replace("_", "-")
    return click.option(
        flag, name, default=DEFAULTS[name], show_default=DEFAULTS[name] is not None, **settings
    )


def chosen_option(name: str, **settings: Any) -> Callable[[Any], Any]:
    """As `option`, for a field that a quality chooses where it is not given."""
    return click.option(f"--{name}", name, **settings)


METHOD_OPTIONS = (
    click.option(
        "--quality",
        help=f"{', '.join(PRESETS)}: chooses what is not given of --{', --'.join(CHOSEN)}.  "
        f"[default: {DEFAULT}, where none of them but --allocation is given]",
    ),
    chosen_option("method", help=f"Pruning method: {', '.join(METHODS)}."),
)
# of whatever method
OTHER_OPTIONS = (
    option("calibration", help="Text, JSONL, dataset NAME[:CONFIG[:SPLIT]] or 'bundled' stories."),
    option("separator", help="Line between the documents of a text file."),
    option("samples", type=int, help="Calibration samples."),
    option("seq_len", type=int, help="Tokens a sample; the model's context, at most 2048."),
    option("sampling", help="Which windows of the text: random or first."),
    option("seed", type=int, help="Seed of the sampling."),
    option("device", help="auto, cpu, cuda or cuda:N."),
    option("dtype", help="Dtype of the calibration runs: auto, float32, bfloat16, float16."),
    option("damping", type=float, help="Share of the mean diagonal added to the Gram matrix."),
    option("column_block", type=int, help="Columns that SparseGPT updates together."),
    chosen_option(
        "target",
        help=f"Output to keep, {' or '.join(TARGETS)} model's: dense is better, slower.",
    ),
    chosen_option(
        "reconstruction",
        help="Train the kept weights of each block towards the dense block's output (block) or the "
        "dense model's predictions (logits): best, slowest.",
    ),
    option("reconstruction_steps", type=int, help="Training steps a block.  [default: 400]"),
    option("reconstruction_minutes", type=float, help="Training time of the whole run at most."),
    option("reconstruction_rate", type=float, help="Highest step, as a share of a weight's size."),
    chosen_option(
        "allocation",
        help=f"How linears share the sparsity: {', '.join(ALLOCATIONS)}.",
    ),
    click.option(
        "--set",
        "overrides",
        multiple=True,
        help="A sparsity or N:M for some linears, such as 'mlp.down_proj=0.6'; not in the rest's.",
    ),
    chosen_option(
        "refine",
        help=f"Improve any method's result: {', '.join(REFINEMENTS)} (of mask, of weights).",
    ),
    option("batch_size", type=int, help="Samples run at once.  [default: 512 tokens or more]"),
    option("activations", help="Where calibration activations are kept: auto, memory or disk."),
    option("experts", help="Where the experts of a block lie: auto, memory or disk."),
    click.option("--ignore", multiple=True, help="Leave matching linears dense, such as '*.0.*'."),
)
PRUNE_OPTIONS = (*METHOD_OPTIONS, *OTHER_OPTIONS)
ACTIVATION_OPTIONS = (
    click.option(
        "--activation-criterion",
        help=f"What makes an input small: {', '.join(CRITERIA)}.  [default: magnitude]",
    ),
    click.option(
        "--activation-allocation",
        help="How sites share activation sparsity: "
        f"{', '.join(LEVEL_ALLOCATIONS)}.  [default: greedy]",
    ),
    click.option(
        "--activation-granularity",
        help=f"What has a threshold of its own: {', '.join(GRANULARITIES)}.  [default: site]",
    ),
)


def add_options(options: tuple[Callable[[Any], Any], ...]) -> Callable[[Command], Command]:
    """All of them on one command, in this order."""

    def add(command: Command) -> Command:
        for decorate in reversed(options):
            command = decorate(command)
        return command

    return add


@click.command("prune")
@click.argument("model")
@click.option("-o", "--output", required=True, help="Directory to write; new or empty.")
@click.option("--sparsity", help="Share of weights to prune, such as 0.5.  [default: 0.5]")
@click.option("--pattern", help="N:M (N weights kept of every M inputs) such as 2:4, or a share.")
@click.option("--max-ppl-increase", help="Prune as far as perplexity grows by this, such as 5%.")
@add_options(PRUNE_OPTIONS)
@option("format", help=f"How weights are stored: {', '.join(FORMATS)}.")
@click.option(
    "--activation-sparsity",
    multiple=True,
    help="Also make a level that skips this share of inputs, such as 0.4 or 25%,40%.",
)
@click.option(
    "--activation-max-ppl-increase",
    multiple=True,
    help="Also make a level that costs the pruned model this much perplexity, such as 1%.",
)
@add_options(ACTIVATION_OPTIONS)
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped, to the same end.")
@click.option("--restart", is_flag=True, help="Discard what a stopped run has finished.")
def prune_command(
    model: str,
    output: str,
    sparsity: str | None,
    pattern: str | None,
    max_ppl_increase: str | None,
    **options: Any,
) -> None:
    """Prune MODEL (a directory or a hub name) block by block and write a checkpoint.

    Stopped, the same command with --resume goes on behind the last finished block.
    """
    from prune_llm.cli import console, errors, progress_bar

    going_on = {name: options.pop(name) for name in ("resume", "restart")}
    levels = _levels(options)
    if sum(given is not None for given in (sparsity, pattern, max_ppl_increase)) > 1:
        raise click.UsageError("give one of --sparsity, --pattern and --max-ppl-increase")
    config = _config(sparsity, pattern, options)
    target = None if max_ppl_increase is None else parse_target(max_ppl_increase)

    def note(text: str) -> None:
        errors.print(text)

    with _told_to_go_on(errors, output), progress_bar() as show:
        if target is None:
            report = prune(model, config, output, show, levels, on_note=note, **going_on)
        else:

            def tell(tried: Try) -> None:
                print_try(errors, tried, target)

            report = prune_within(
                model,
                target,
                config,
                output,
                levels=levels,
                on_progress=show,
                on_try=tell,
                on_note=note,
                **going_on,
            )
    if launched_rank() > 0:
        return  # the first process tells
    _print(console, report)
    console.print(f"\nnext: [bold]prune-llm eval {output} --against {model}[/]", soft_wrap=True)


@contextmanager
def _told_to_go_on(console: Console, output: str) -> Iterator[None]:
    """A run that is stopped says what is done, and how to go on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        done = finished(partial_directory(Path(output)))
        if done is not None:
            console.print(f"stopped with {done} done; the same command with --resume goes on")
        raise
    except OSError as error:
        done = finished(partial_directory(Path(output)))
        if done is None:
            raise
        raise OSError(
            f"{error}; with {done} done, the same command with --resume goes on"
        ) from error


def quality_chosen(options: dict[str, Any]) -> dict[str, Any]:
    """The options with --quality replaced by what it stands for.

    A method or another part that is given alone is the published one, with nothing added.
    """
    rest = dict(options)
    quality = rest.pop("quality")
    if quality is None and all(rest[name] is None for name in PARTS):
        quality = DEFAULT
    pattern = Pattern.parse(rest.get("pattern", DEFAULTS["pattern"]))
    fields = {} if quality is None else preset(quality, pattern)
    return published({**rest, **{k: v for k, v in fields.items() if rest[k] is None}})


def published(options: dict[str, Any]) -> dict[str, Any]:
    """What was not given of a quality's choices stays out: any method as it was published."""
    missing = {name for name in CHOSEN if options.get(name, "") is None}
    return {**options, **{name: DEFAULTS[name] for name in missing}}


def _config(sparsity: str | None, pattern: str | None, options: dict[str, Any]) -> PruneConfig:
    if sparsity is not None and ":" in sparsity:
        raise ValueError(f"sparsity {sparsity!r}: must be a share in (0, 1); N:M goes to --pattern")
    options["pattern"] = sparsity or pattern or DEFAULTS["pattern"]
    try:
        return PruneConfig(**quality_chosen(options))
    except ValueError as error:
        asked = "pattern" if sparsity is None else "sparsity"
        raise ValueError(str(error).replace("pattern ", f"{asked} ", 1)) from None


def _levels(options: dict[str, Any]) -> SparsifyConfig | None:
    """Takes the options of the levels out; None where no level is asked for."""
    shares = options.pop("activation_sparsity")
    targets = options.pop("activation_max_ppl_increase")
    chosen = {name: options.pop(f"activation_{name}") for name in LEVEL_OPTIONS}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if not shares and not targets:
        if chosen:
            raise click.UsageError(
                f"--activation-{next(iter(chosen))} needs --activation-sparsity or "
                "--activation-max-ppl-increase"
            )
        return None
    with activation_names(*LEVEL_OPTIONS, "max_ppl_increase"):
        return SparsifyConfig(
            activation_sparsity=parse_shares("activation_sparsity", shares),
            max_ppl_increase=parse_shares("max_ppl_increase", targets),
            samples=max(LEAST_WINDOWS, options["samples"]),
            **chosen,
        )


@contextmanager
def activation_names(*names: str) -> Iterator[None]:
    """Errors of a SparsifyConfig name the options here: activation_criterion, not criterion."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        named = any(text.startswith(f"{name} ") for name in names)
        raise ValueError(f"activation_{text}" if named else text) from None


def parse_target(text: str) -> float:
    """ "5%" or "0.05" as a fraction."""
    found = parse_shares("max_ppl_increase", (text,))
    if len(found) != 1:
        raise ValueError(f"max_ppl_increase {text!r}: give one target, such as 5%")
    return found[0]


def print_try(console: Console, tried: Try, allowed: float) -> None:
    """A line for each sparsity tried, as it comes."""
    verdict = "within" if tried.ppl_increase <= allowed else "above"
    console.print(
        f"{tried.sparsity:.0%} pruned: {tried.ppl_increase:+.2%} perplexity, {verdict} "
        f"{100 * allowed:g}%"
    )


def _print(console: Console, report: PruneReport) -> None:
    print_prune_report(console, report)
    if report.search is not None:
        print_search(console, report.search)
    if report.levels is not None:
        print_levels(console, report.levels)
