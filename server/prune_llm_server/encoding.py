"""Prompts become tokens, in a thread beside the loop that answers."""

from __future__ import annotations

import asyncio
import ctypes
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from prune_llm.generation import prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# of a prompt: megabytes take well under a second
LIMIT_SECONDS = 10.0
T = TypeVar("T")


class Encoder:
    """One thread, because a tokenizer is not made for several at once.

    A chat template is a program that comes with the model: one that does not end is interrupted.
    """

    def __init__(self, limit_seconds: float = LIMIT_SECONDS) -> None:
        self._thread = ThreadPoolExecutor(1, "encode")
        self._limit_seconds = limit_seconds
        self.tokenizer: PreTrainedTokenizerBase | None = None

    async def load(self, directory: str, trust_remote_code: bool) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = await self._run(
            lambda: AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
        )

    async def encode(self, prompt: Any) -> tuple[int, ...]:
        """Of a text, or of a list of messages by the model's chat template.

        Raises:
            ValueError: the template fails, or takes too long.
        """
        try:
            return tuple(await self._run(lambda: self._encoded(prompt)))
        except ValueError:
            raise
        except Interrupted:
            raise ValueError(
                f"the model's chat template did not end within {self._limit_seconds:g} seconds"
            ) from None
        except Exception as error:  # a template is a program, which may fail in any way
            raise ValueError(f"the model's chat template refuses them: {error}") from None

    def _encoded(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return prompt_ids(prompt, self.tokenizer)
        return interrupted_after(self._limit_seconds, lambda: prompt_ids(prompt, self.tokenizer))

    async def _run(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)


class Interrupted(BaseException):
    """Not an Exception, which a template's engine might catch."""


def interrupted_after(seconds: float, function: Callable[[], T]) -> T:
    """What ``function`` returns.

    Raises:
        Interrupted: it took longer. It ends between two of its steps in Python; a step that itself
            takes for ever is not interrupted.
    """
    lock, sent, ended = threading.Lock(), False, False
    thread = ctypes.c_ulong(threading.get_ident())

    def interrupt() -> None:
        nonlocal sent
        with lock:
            if not ended:
                sent = True
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(Interrupted))

    timer = threading.Timer(seconds, interrupt)
    timer.daemon = True
    timer.start()
    try:
        return function()
    finally:
        timer.cancel()
        with lock:
            ended = True
        if sent and not isinstance(sys.exception(), Interrupted):
            for _ in range(100):  # it is on its way, and must not meet the next call
                time.sleep(0.001)
