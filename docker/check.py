"""Executes the stages of docker/Dockerfile in roots of their own, runs the result, checks it.

docker/check.sh prepares what this needs. Only the standard library; Linux, as root.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from dockerfile import Dockerfile, Instruction, Stage, ignored, parse, read_patterns, substitute

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
MODEL = ROOT / "prune_llm" / "demo" / "model"
KEY = "a-key-of-the-check-only"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
COMPILERS = ["cc", "gcc", "g++", "clang", "c++", "ld", "make", "ninja", "cmake"]
PACKAGES = {"prune_llm", "prune_llm_kernels", "prune_llm_eval", "prune_llm_server"}
# a namespace of its own: mounts end with it
ENTER = """set -e
root=$1; shift
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=755 dev "$root/dev"
for device in null zero full random urandom; do
  touch "$root/dev/$device"; mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir "$root/dev/shm"; mount -t tmpfs -o size=64m shm "$root/dev/shm"
"""
BUILD = (
    ENTER
    + """while [ "$1" != -- ]; do
  if [ -d "$1" ]; then mkdir -p "$root$2"; else mkdir -p "$(dirname "$root$2")"; : >>"$root$2"; fi
  mount --bind "$1" "$root$2"; mount -o remount,bind,ro "$root$2"; shift 2
done
shift; exec chroot "$root" /usr/bin/env -i "$@"
"""
)
# as `docker run --read-only --tmpfs /tmp --network none --cap-drop ALL`, no new privileges
RUN = (
    """mount --bind "$1" "$1"
ip link set lo up
"""
    + ENTER
    + """model=$1 keys=$2 user=$3; shift 3
mount --bind "$model" "$root/model"; mount -o remount,bind,ro "$root/model"
mount --bind "$keys" "$root/run/secrets/api_keys"
mount -t tmpfs -o mode=1777 tmp "$root/tmp"
mount -o remount,bind,ro "$root"
exec setpriv --no-new-privs chroot --userspec="$user" --groups= "$root" /usr/bin/env -i "$@"
"""
)


@dataclass(frozen=True)
class Image:
    """A root and what the Dockerfile says of it."""

    root: Path
    env: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    workdir: str = "/"
    user: str = "0:0"
    settings: dict[str, list[str]] = field(default_factory=dict)

    def environment(self) -> list[str]:
        return [f"{name}={value}" for name, value in self.env.items()]


class Builder:
    """Builds stages one by one; ``images`` are those that are done."""

    def __init__(self, dockerfile: Dockerfile, options: argparse.Namespace) -> None:
        self._dockerfile, self._options = dockerfile, options
        self._build_args = dict(given.split("=", 1) for given in options.build_arg)
        self._secrets = dict(_secret(given) for given in options.secret)
        self._patterns = read_patterns(Path(f"{DOCKERFILE}.dockerignore").read_text())
        self.images: dict[str, Image] = {}

    def build(self, target: str) -> Image:
        for name in self._dockerfile.needed(target):
            self.images[name] = self._stage(self._dockerfile.stages[name])
        return self.images[target]

    def _stage(self, stage: Stage) -> Image:
        below = self.images.get(stage.base) or Image(self._options.base)
        root = self._options.work / stage.name
        print(f"--- {stage.name} (on {stage.base})", flush=True)
        subprocess.run(["cp", "-a", "--reflink=auto", below.root, root], check=True)
        image, arguments = replace(below, root=root), {}
        for instruction in stage.instructions:
            print(f"{instruction.name} {instruction.text}", flush=True)
            if instruction.name == "ARG":
                name, _, default = instruction.text.partition("=")
                arguments[name] = self._build_args.get(name, default)
            else:
                image = self._execute(image, instruction, arguments)
        return image

    def _execute(self, image: Image, instruction: Instruction, arguments: dict[str, str]) -> Image:
        values = image.env | arguments
        match instruction.name:
            case "RUN":
                self._run(image, instruction, arguments)
            case "COPY":
                self._copy(image, instruction)
            case "ENV":
                new = {name: substitute(value, values) for name, value in instruction.pairs()}
                return replace(image, env=image.env | new)
            case "WORKDIR":
                (image.root / instruction.text.lstrip("/")).mkdir(parents=True, exist_ok=True)
                return replace(image, workdir=instruction.text)
            case "USER":
                return replace(image, user=instruction.text)
            case "ENTRYPOINT" | "CMD" | "HEALTHCHECK":
                words = {instruction.name: instruction.exec_form()}
                return replace(image, settings=image.settings | words)
            case _:
                words = {instruction.name: instruction.text.split()}
                return replace(image, settings=image.settings | words)
        return image

    def _run(self, image: Image, instruction: Instruction, arguments: dict[str, str]) -> None:
        if image.user != "0:0":
            raise NotImplementedError(f"line {instruction.line}: RUN behind USER")
        binds = [(path, path) for path in (*self._options.bind, "/etc/resolv.conf", "/etc/hosts")]
        for name, value in instruction.flags:
            mount = dict(part.split("=", 1) for part in value.split(","))
            if name != "mount" or mount["type"] != "secret":
                raise NotImplementedError(f"line {instruction.line}: --{name}={value}")
            if mount["id"] in self._secrets:
                binds.append((self._secrets[mount["id"]], mount["target"]))
        values = [*image.environment(), *self._options.env]
        values += [f"{name}={value}" for name, value in arguments.items()]
        _unshared(
            BUILD,
            image.root,
            *(path for bind in binds for path in bind),
            "--",
            *values,
            *("/bin/sh", "-c", f"cd {shlex.quote(image.workdir)} && {instruction.text}"),
        )

    def _copy(self, image: Image, instruction: Instruction) -> None:
        flags = dict(instruction.flags)
        origin = self.images[flags.pop("from")].root if "from" in flags else ROOT
        if flags:
            raise NotImplementedError(f"line {instruction.line}: {flags}")
        *sources, target = instruction.text.split()
        to = image.root / os.path.join(image.workdir, target).lstrip("/")
        for source in sources:
            for file in self._files(origin, source.lstrip("/")):
                inside = file.relative_to(origin / source.lstrip("/"))
                copy = to / inside if inside.parts else to / file.name
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, copy, follow_symlinks=False)

    def _files(self, origin: Path, source: str) -> Iterator[Path]:
        """Files and links; of the build's context only those that are not ignored."""
        at = origin / source
        for file in [at] if at.is_file() else sorted(at.rglob("*")):
            if (file.is_file() or file.is_symlink()) and not (
                origin == ROOT and ignored(str(file.relative_to(origin)), self._patterns)
            ):
                yield file


def _secret(given: str) -> tuple[str, str]:
    parts = dict(part.split("=", 1) for part in given.split(","))
    return parts["id"], str(Path(parts["src"]).resolve())


def _command(script: str, *words: object, net: bool = True) -> list[str]:
    own = ["unshare", "--mount", "--pid", "--fork", "--kill-child", *([] if net else ["--net"])]
    return [*own, "sh", "-c", script, "sh", *map(str, words)]


def _unshared(script: str, *words: object) -> None:
    subprocess.run(_command(script, *words), check=True)


class Container:
    """The image's own command, running: process 1 of its namespace, no way to any network."""

    def __init__(self, image: Image, keys: Path, arguments: Sequence[str]) -> None:
        self._image = image
        for folder in ("model", "run/secrets"):
            (image.root / folder).mkdir(parents=True, exist_ok=True)
        (image.root / "run/secrets/api_keys").touch()
        words = [*image.environment(), *image.settings["ENTRYPOINT"], *arguments]
        command = _command(RUN, image.root, MODEL, keys, image.user, *words, net=False)
        self._process = subprocess.Popen(command)

    def await_start(self) -> None:
        """Until process 1 is the image's command and no longer what prepares for it."""
        before = {"unshare", "sh", "mount", "ip", "touch", "mkdir", "setpriv", "chroot", "env"}
        while not (pids := self.pids) or _name(pids[0]) in before:
            if self._process.poll() is not None:
                raise AssertionError("the container did not start")
            time.sleep(0.05)

    @property
    def pids(self) -> list[int]:
        """As this machine numbers them, the first one is the container's process 1."""
        found, open_ = [], [self._process.pid]
        while open_:
            pid = open_.pop()
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            found += map(int, children)
            open_ += map(int, children)
        return found

    def execute(self, *words: str) -> subprocess.CompletedProcess[str]:
        """As `docker exec` does."""
        where = ["nsenter", "--target", str(self.pids[0]), "--net", "--pid", "--mount"]
        user = ["chroot", f"--userspec={self._image.user}", "--groups=", str(self._image.root)]
        line = [*where, *user, "/usr/bin/env", "-i", *self._image.environment(), *words]
        return subprocess.run(line, capture_output=True, text=True, check=False)

    def ask(self, path: str, body: object = None, key: str = "") -> tuple[int, str]:
        """Status and body; 0 while nothing listens."""
        code = (
            "import http.client, sys\n"
            "c = http.client.HTTPConnection('127.0.0.1', 8000, timeout=60)\n"
            "_, path, body, key = sys.argv\n"
            "headers = {'Authorization': f'Bearer {key}', 'Content-Type': 'application/json'}\n"
            "try: c.request('POST' if body else 'GET', path, body or None, headers)\n"
            "except ConnectionRefusedError: print(0); sys.exit()\n"
            "answer = c.getresponse()\n"
            "print(answer.status, answer.read().decode())\n"
        )
        sent = json.dumps(body) if body else ""
        done = self.execute("python", "-c", code, path, sent, key)
        if done.returncode:
            raise AssertionError(done.stderr)
        status, _, text = done.stdout.partition(" ")
        return int(status), text.strip()

    def healthy(self) -> int:
        return self.execute(*self._image.settings["HEALTHCHECK"]).returncode

    def wait(self, seconds: float) -> int:
        return self._process.wait(seconds)

    def stop(self, seconds: float = 20) -> int:
        name = self._image.settings["STOPSIGNAL"][0]
        os.kill(self.pids[0], signal.Signals[name])
        return self.wait(seconds)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def _name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


@contextmanager
def running(image: Image, keys: Path, *arguments: str) -> Iterator[Container]:
    container = Container(image, keys, arguments)
    try:
        yield container
    finally:
        container.kill()


def check(what: str, holds: object, seen: object = "") -> None:
    print(f"{'ok' if holds else 'FAILED'}: {what}{f' ({seen})' if seen != '' else ''}", flush=True)
    if not holds:
        sys.exit(1)


def check_wheel(folder: Path) -> None:
    (wheel,) = folder.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    info = {top for top in tops if top.endswith(".dist-info")}
    check("wheel: the four packages and nothing beside them", tops - info == PACKAGES, sorted(tops))
    extensions = [name for name in names if name.endswith(".so")]
    check("wheel: one extension", len(extensions) == 1, *extensions)
    model = {f"prune_llm/demo/model/{file.name}" for file in MODEL.iterdir()}
    check("wheel: the bundled model", model <= set(names), f"{len(model)} files")
    junk = [name for name in names if name.endswith((".pyc", ".cpp", ".h", ".o", ".cmake", ".a"))]
    check("wheel: no sources, no objects", not junk, f"{len(names)} files, {size(wheel)}")


def check_contents(image: Image, target: str) -> None:
    """What is in the image, and what must not be."""
    places = [image.root / place.lstrip("/") for place in image.env["PATH"].split(":")]
    found = [str(place / name) for place in places for name in COMPILERS if (place / name).exists()]
    check("runtime: no compiler, no build tool", not found, ", ".join(found))
    left = [name for name in ("src", "wheels", "root/.cache/pip") if (image.root / name).exists()]
    check("runtime: no sources, no wheels, no pip cache", not left, ", ".join(left))
    (packages,) = (image.root / "opt/prune_llm/lib").glob("python3.*/site-packages")
    code = (
        "import importlib.metadata as m\n"
        "for d in m.distributions(): print(f'{d.name}=={d.version}')\n"
    )
    python = image.root / "opt/prune_llm/bin/python"
    check("runtime: its python is a link into the base", python.is_symlink())
    listing = ["chroot", str(image.root), "/opt/prune_llm/bin/python", "-c", code]
    done = subprocess.run(listing, capture_output=True, text=True, check=True)
    versions = {_plain(line) for line in done.stdout.split()}
    pinned = {_plain(line) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    free = {line for line in versions - pinned if not line.startswith("prune-llm==")}
    if target == "cpu":
        check(
            "runtime: every version is that of constraints.txt",
            not free,
            sorted(free) or len(versions),
        )
        check("runtime: no CUDA library", not list(packages.glob("nvidia*")))
    else:
        print(f"not in constraints.txt: {', '.join(sorted(free))}")
    tests = [path for path in packages.glob("tests") if path.is_dir()]
    check("runtime: no tests of ours", not tests)


def _plain(requirement: str) -> str:
    """Names are equal with - for _ and ., versions without their local part."""
    return requirement.partition("+")[0].lower().replace("_", "-")


def check_server(image: Image, keys: Path) -> None:
    with running(image, keys, "--help") as container:
        check("container: --help ends with 0", container.wait(60) == 0)
    arguments = [*image.settings["CMD"], "--api-key-file", "/run/secrets/api_keys"]
    start = time.monotonic()
    with running(image, keys, *arguments) as container:
        container.await_start()
        check("HEALTHCHECK: 1 while nothing listens", container.healthy() == 1)
        while (status := container.ask("/ready")[0]) != 200:
            if status not in (0, 503) or time.monotonic() > start + 300:
                check("server: starts", False, status)
            time.sleep(0.2)
        seconds = time.monotonic() - start
        check("server: ready", True, f"{seconds:.1f} s")
        check("HEALTHCHECK: 0", container.healthy() == 0)
        check_processes(container, image)
        check_answers(container)
        check("server: SIGTERM ends it with 0", (code := container.stop()) == 0, code)


def check_processes(container: Container, image: Image) -> None:
    statuses = [Path(f"/proc/{pid}/status").read_text() for pid in container.pids]
    facts = [dict(line.split(":\t", 1) for line in text.splitlines()) for text in statuses]
    user = image.user.partition(":")[0]
    users = {uid for fact in facts for uid in fact["Uid"].split()}
    check("processes: none is root", users == {user}, f"{len(facts)} of user {user}")
    check("processes: no capability", all(int(fact["CapEff"], 16) == 0 for fact in facts))
    check("processes: the server is number 1", facts[0]["NSpid"].split()[-1] == "1")
    peak = sum(int(fact["VmHWM"].split()[0]) for fact in facts)
    print(f"memory: peak {peak / 1e6:.2f} GB, both processes together")


def check_answers(container: Container) -> None:
    asked = {"model": "model", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    status, _ = container.ask("/v1/completions", asked)
    check("server: 401 without a key", status == 401, status)
    status, text = container.ask("/v1/completions", asked, KEY)
    check("server: a completion", status == 200, status)
    answer = json.loads(text)
    tokens = answer["usage"]["completion_tokens"]
    check("server: of 8 tokens", tokens == 8 and answer["choices"][0]["text"].strip(),
          repr(answer["choices"][0]["text"]))  # fmt: skip
    refused = container.execute("python", "-c", "open('/opt/prune_llm/x', 'w')")
    check(
        "container: its root is read-only",
        "Read-only" in refused.stderr,
        refused.stderr.splitlines()[-1],
    )


def size(*paths: Path) -> str:
    done = subprocess.run(["du", "-csb", *paths], capture_output=True, text=True, check=True)
    return f"{int(done.stdout.splitlines()[-1].split()[0]) / 1e6:,.1f} MB"


def main() -> None:
    parser = argparse.ArgumentParser(prog="docker/check.sh", description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, required=True, help=argparse.SUPPRESS)
    parser.add_argument("--target", default="cpu", choices=["cpu", "cuda"])
    several = {"action": "append", "default": []}
    parser.add_argument("--build-arg", **several, metavar="NAME=VALUE", help="as docker build's")
    parser.add_argument("--secret", **several, metavar="id=ID,src=FILE", help="as docker build's")
    parser.add_argument("--env", **several, metavar="NAME=VALUE", help="for the RUN steps")
    parser.add_argument("--bind", **several, metavar="PATH", help="the RUN steps see it, read-only")
    options = parser.parse_args()

    builder = Builder(parse(DOCKERFILE.read_text()), options)
    image = builder.build(options.target)
    check_wheel(builder.images["wheel"].root / "wheels")
    check_contents(image, options.target)
    keys = options.work / "api_keys"
    keys.write_text(KEY + "\n")
    keys.chmod(0o444)
    options.work.chmod(0o755)
    check_server(image, keys)
    venv = image.root / "opt/prune_llm"
    print(f"size: base {size(options.base)}, environment {size(venv)}, all {size(image.root)}")
    print(f"docker/check.sh: target {options.target} passed")


if __name__ == "__main__":
    main()
