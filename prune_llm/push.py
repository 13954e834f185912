"""Put a checkpoint on the hub: verified, complete, in one commit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prune_llm.card_facts import CARD_FILE
from prune_llm.convert import info
from prune_llm.model_card import published

# weights in a form that runs code when it is loaded; ours never write one
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


@dataclass(frozen=True)
class Sent:
    """What goes to the hub, or went there: ``files`` with their bytes, the card as it is there."""

    name: str
    files: dict[str, int]
    card: str
    url: str = ""

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())


def plan_push(directory: str | os.PathLike[str], name: str) -> Sent:
    """Verify the checkpoint and list what would be sent; nothing leaves this machine.

    Raises:
        ValueError: no checkpoint, an unfinished or damaged one, a name that the hub cannot have.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError(
            f"name {name!r}: cannot be a name on the hub; give NAME or ORGANISATION/NAME of "
            "letters, digits, '-', '_' and '.'"
        ) from None
    place = Path(directory)
    if not place.is_dir():
        raise ValueError(f"model {str(directory)!r}: no such directory; push sends a local one")
    files = _files(place)
    info(place, verify=True)
    text = published(place, name)
    return Sent(name, dict(sorted({**files, CARD_FILE: len(text.encode())}.items())), text)


def _files(directory: Path) -> dict[str, int]:
    """All but hidden ones, by their path inside."""
    found = {}
    for path in sorted(directory.rglob("*")):
        inside = path.relative_to(directory)
        if path.is_dir() or any(part.startswith(".") for part in inside.parts):
            continue
        if path.suffix == ".part":
            raise ValueError(f"{directory}: is not finished ({inside}); run its command again")
        if path.suffix in PICKLES:
            raise ValueError(
                f"{path}: is no safetensors file and may run code where it is loaded; remove it"
            )
        found[inside.as_posix()] = path.stat().st_size
    if directory.absolute().name.endswith(".partial"):
        raise ValueError(f"{directory}: is not finished; run its command again")
    return found


def push(
    directory: str | os.PathLike[str],
    plan: Sent,
    *,
    private: bool | None = None,
    revision: str | None = None,
) -> Sent:
    """Send what was planned, making the repository (and the branch) where there is none.

    The token is the one of the hub's own client: `hf auth login`, or HF_TOKEN.

    Args:
        private: of a new repository; None: as its owner's settings say.
        revision: branch; None: main.

    Raises:
        ValueError: not logged in, not allowed, offline, or the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if get_token() is None:
        raise ValueError(
            "not logged in to the hub: run 'hf auth login', or set HF_TOKEN to a token that may "
            "write"
        )
    place, api = Path(directory), HfApi()
    with _told_in_one_line(plan.name):
        repository = api.create_repo(plan.name, private=private, exist_ok=True)
        name = repository.repo_id
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        operations = [
            CommitOperationAdd(file, plan.card.encode() if file == CARD_FILE else place / file)
            for file in plan.files
        ]
        api.create_commit(
            name, operations, commit_message="Upload with prune-llm", revision=revision
        )
    return Sent(name, plan.files, plan.card, str(repository))


@contextmanager
def _told_in_one_line(name: str) -> Iterator[None]:
    # HTTPError: of the client that this version of the library is built on
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled:
        raise ValueError("the hub: offline mode is on; unset HF_HUB_OFFLINE to push") from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = (error.server_message or "no reason given").splitlines()[0]
        why = {
            401: "the token is not valid; run 'hf auth login' again",
            403: "the token may not write there; check the namespace and the token's rights",
            404: "there is no such namespace or branch, or the token may not see it",
        }.get(status, "the hub refused")
        raise ValueError(f"name {name!r}: {why} (status {status}: {said})") from None
    except (HTTPError, ConnectionError) as error:
        raise ValueError(f"the hub cannot be reached ({type(error).__name__}: {error})") from None
