"""Reads a Dockerfile and its .dockerignore: as much of their language as docker/Dockerfile uses.

Anything else raises: what is checked must be what is shipped.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

_SETTINGS = {"CMD", "ENTRYPOINT", "EXPOSE", "HEALTHCHECK", "LABEL", "STOPSIGNAL", "USER"}
KNOWN = {"ARG", "COPY", "ENV", "FROM", "RUN", "WORKDIR", *_SETTINGS}


@dataclass(frozen=True)
class Instruction:
    """``name --flags... text``, with continued lines joined; flags as (name, value)."""

    name: str
    flags: tuple[tuple[str, str], ...]
    text: str
    line: int

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Names and values of ENV or LABEL, not yet substituted."""
        for word in shlex.split(self.text):
            name, equals, value = word.partition("=")
            if not equals:
                raise ValueError(f"line {self.line}: {word!r} must be NAME=VALUE")
            yield name, value

    def exec_form(self) -> list[str]:
        """The words of a JSON array; the shell form of CMD and ENTRYPOINT is refused."""
        text = self.text.removeprefix("CMD ").strip() if self.name == "HEALTHCHECK" else self.text
        words: list[str] = json.loads(text)
        return words


@dataclass
class Stage:
    """``FROM base AS name`` and what follows."""

    base: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def copied_stages(self) -> Iterator[str]:
        for instruction in self.instructions:
            if instruction.name == "COPY" and (source := dict(instruction.flags).get("from")):
                yield source


@dataclass
class Dockerfile:
    """Its stages by name, and the arguments before the first."""

    arguments: list[Instruction]
    stages: dict[str, Stage]

    def chain(self, name: str) -> list[Stage]:
        """The stage and those it is built on, the lowest first."""
        stage = self.stages[name]
        below = self.chain(stage.base) if stage.base in self.stages else []
        return [*below, stage]

    def needed(self, name: str) -> list[str]:
        """Every stage that building this one takes, in the order they can be built in."""
        found: list[str] = []
        for stage in self.chain(name):
            for source in stage.copied_stages():
                found += self.needed(source)
            found.append(stage.name)
        return list(dict.fromkeys(found))


def parse(text: str) -> Dockerfile:
    arguments: list[Instruction] = []
    stages: dict[str, Stage] = {}
    current: Stage | None = None
    for instruction in _instructions(text):
        if instruction.name == "FROM":
            match = re.fullmatch(r"(\S+) AS ([a-z0-9_-]+)", instruction.text)
            if match is None:
                raise ValueError(f"line {instruction.line}: give FROM base AS name")
            current = Stage(*match.groups())
            stages[current.name] = current
        elif current is None:
            if instruction.name != "ARG":
                raise ValueError(f"line {instruction.line}: {instruction.name} before FROM")
            arguments.append(instruction)
        else:
            current.instructions.append(instruction)
    return Dockerfile(arguments, stages)


def _instructions(text: str) -> Iterator[Instruction]:
    for line, joined in _joined(text):
        name, _, rest = joined.partition(" ")
        if name not in KNOWN:
            raise ValueError(f"line {line}: {name} is not one of {', '.join(sorted(KNOWN))}")
        flags = []
        while match := re.match(r"\s*--([a-z-]+)=(\S+)\s+", rest):
            flags.append((match[1], match[2]))
            rest = rest[match.end() :]
        if name == "RUN" and "<<" in rest:
            raise ValueError(f"line {line}: here-documents are not read")
        yield Instruction(name, tuple(flags), rest.strip(), line)


def _joined(text: str) -> Iterator[tuple[int, str]]:
    """Lines without comments, those that end in a backslash joined with the next."""
    start, parts = 0, []
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or not line.strip():
            continue
        start = start if parts else number
        parts.append(line.removesuffix("\\").strip())
        if not line.endswith("\\"):
            yield start, " ".join(parts)
            parts = []
    if parts:
        raise ValueError(f"line {start}: does not end")


def substitute(text: str, values: Mapping[str, str]) -> str:
    """$NAME and ${NAME}, as ENV, ARG, FROM and LABEL do it; one that is not set is empty."""
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda m: values.get(m[1] or m[2], ""), text)


def ignored(path: str, patterns: list[str]) -> bool:
    """Whether the build does not see it: the last pattern for a file or a parent decides."""
    found = False
    parts = Path(path).parts
    for pattern in patterns:
        expression = _expression(pattern.removeprefix("!"))
        parents = ("/".join(parts[: end + 1]) for end in range(len(parts)))
        if any(expression.fullmatch(parent) for parent in parents):
            found = not pattern.startswith("!")
    return found


def _expression(pattern: str) -> re.Pattern[str]:
    """``*`` is any name, ``**/`` any folders."""
    if set(pattern) & set("?[]\\"):
        raise ValueError(f"{pattern!r}: only names, * and **/ are read")
    escaped = re.escape(pattern).replace(r"\*\*/", "(?:[^/]+/)*").replace(r"\*", "[^/]*")
    return re.compile(escaped)


def read_patterns(text: str) -> list[str]:
    lines = (line.strip().rstrip("/") for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]
