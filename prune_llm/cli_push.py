"""`prune-llm push`: its options, what it prints."""

from __future__ import annotations

import click
from rich.console import Console

from prune_llm.card_markdown import size
from prune_llm.cli_tables import new_table
from prune_llm.push import Sent, plan_push, push


@click.command("push")
@click.argument("directory")
@click.argument("name")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--revision", help="Branch to push to; made where there is none.  [default: main]")
@click.option("--dry-run", is_flag=True, help="Verify and list what would be sent; send nothing.")
def push_command(
    directory: str, name: str, private: bool, revision: str | None, dry_run: bool
) -> None:
    """Send the checkpoint DIRECTORY to the hub as NAME, verified and in one commit.

    The token is that of `hf auth login`, or HF_TOKEN.
    """
    from prune_llm.cli import console

    plan = plan_push(directory, name)
    if dry_run:
        print_plan(console, plan, private, revision)
        return
    sent = push(directory, plan, private=True if private else None, revision=revision)
    console.print(
        f"verified, and sent {len(sent.files)} files ({size(sent.nbytes)}) to [bold]{sent.url}[/]",
        soft_wrap=True,
    )


def print_plan(console: Console, plan: Sent, private: bool, revision: str | None) -> None:
    table = new_table(f"to {plan.name}, branch {revision or 'main'}", ("file", "size"))
    for file, nbytes in plan.files.items():
        table.add_row(file, size(nbytes))
    console.print(table)
    kind = "private" if private else "public, unless your settings say otherwise"
    console.print(
        f"[green]verified[/]; {len(plan.files)} files, {size(plan.nbytes)}, nothing was sent; a "
        f"new repository would be {kind}. The reports hold paths and hardware of this machine.",
        soft_wrap=True,
    )
