"""Our checkpoints as a model of lm-eval: `prune-llm`, dense or packed, at an activation level.

Importing this imports lm-eval and registers the model with it. lm-eval 0.4.13 has no entry points
for models, so something must import this module first: `prune-llm lm-eval` does, and then hands
over to lm-eval's own command line.

A level applies to every token after the first of every sequence, prompt and answer alike. lm-eval
pads scored sequences on the right and prompts to be continued on the left, and an answer is decoded
with a cache, so the first token of a row is not always in the first column: see `SequenceGates`.

Shape letters: B = sequences, T = tokens of this pass, L = tokens with those in the cache,
I = inputs.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn

from prune_llm.activation.decoding import model_levels
from prune_llm.activation.gates import Gates, score
from prune_llm.activation.levels import DENSE
from prune_llm.activation.sites import ModelSite, table_sites
from prune_llm.architecture import RUN_DTYPES
from prune_llm.config import select_device
from prune_llm.integration import load

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL_NAME = "prune-llm"
LM_EVAL_DEVICE = "cuda:0"
# of lm-eval's class, beside our own: what means something for a model that is loaded already
SETTINGS = frozenset(
    {
        "add_bos_token",
        "batch_size",
        "chat_template_args",
        "enable_thinking",
        "logits_cache",
        "max_batch_size",
        "max_length",
        "mixed_precision_dtype",
        "prefix_token_id",
        "softmax_dtype",
        "think_end_token",
        "tokenizer",
        "truncation",
    }
)


class SequenceGates(Gates):
    """Gates that leave exactly the first token of every sequence dense, wherever it stands.

    For the passes of a model with or without a cache, its rows padded on either side. The first
    token of a row is the first that the attention mask shows. Without a mask it is in column 0 of
    a pass that has nothing in the cache.

    Counts leave out padding and first tokens. lm-eval pads with id 0 on the right without a mask,
    so trailing zeros are not counted there.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Sequence[ModelSite],
        scales: Sequence[Tensor | None],
        thresholds: Sequence[float],
    ) -> None:
        super().__init__(sites, scales, thresholds, first_dense=0)
        self._model = model
        self._first_BT = torch.zeros(0, 0, dtype=torch.bool)
        self._counted_BT = self._first_BT
        self._tokens = 0

    def __enter__(self) -> SequenceGates:
        handle = self._model.register_forward_pre_hook(self._place, with_kwargs=True)
        self._handles.append(handle)
        super().__enter__()
        return self

    def _place(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids_BT = args[0] if args else kwargs["input_ids"]
        mask_BL = kwargs.get("attention_mask")
        cache = kwargs.get("past_key_values")
        cached = 0 if cache is None else cache.get_seq_length()
        self._first_BT = first_tokens(ids_BT, mask_BL, cached)
        if mask_BL is None:
            live_BT = ids_BT.ne(0).flip(1).cumsum(1).flip(1) > 0
        else:
            live_BT = mask_BL[:, -ids_BT.shape[1] :].bool()
        self._counted_BT = live_BT & ~self._first_BT
        self._tokens = int(self._counted_BT.sum())

    def _gated(self, index: int, x: Tensor, count: bool) -> Tensor:
        if x.shape[:-1] != self._first_BT.shape:  # inputs of experts have no positions any more
            return super()._gated(index, x, count)
        active = score(x, self.scales[index]) > self.thresholds[index]
        if count:
            self._active[index] += (active & self._counted_BT[..., None]).sum()
            self._seen[index] += self._tokens * x.shape[-1]
        return torch.where(active | self._first_BT[..., None], x, torch.zeros_like(x))


def first_tokens(ids_BT: Tensor, mask_BL: Tensor | None, cached: int) -> Tensor:
    """Which tokens of a pass are the first of their sequence, bool [B, T].

    Raises:
        ValueError: an attention mask of another form.
    """
    if mask_BL is None:
        first_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        first_BT[:, :1] = cached == 0
        return first_BT
    if mask_BL.ndim != 2:
        raise ValueError(
            f"attention mask of shape {list(mask_BL.shape)}: only [sequences, tokens] says where a "
            "sequence begins; evaluate this model with batch size 1, or at level 'dense'"
        )
    first_BL = mask_BL.bool() & (mask_BL.cumsum(1) == 1)
    return first_BL[:, -ids_BT.shape[1] :]


@register_model(MODEL_NAME, "prune_llm")
class PruneLM(HFLM):  # type: ignore[misc]
    """A checkpoint of either form as lm-eval's transformers model, at an activation level.

    Args:
        pretrained: directory or hub name; a packed checkpoint stays packed.
        level: of its activation levels; "dense" skips nothing.
        dequantize: unpack every linear after loading: exactly the numbers of the dense export.
        device, dtype: as `prune-llm eval` takes them.
        settings: those of SETTINGS, as lm-eval documents them.

    Raises:
        ValueError: a model that cannot be loaded, no such level, an unknown setting.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        level: str = DENSE,
        dequantize: bool = False,
        device: str = "auto",
        dtype: str = "auto",
        **settings: Any,
    ) -> None:
        unknown = sorted(set(settings) - SETTINGS)
        if unknown:
            known = ", ".join(sorted({"level", "dequantize", "device", "dtype"} | SETTINGS))
            raise ValueError(f"model argument {unknown[0]!r}: unknown; there are {known}")
        if dtype not in ("auto", *RUN_DTYPES):
            choices = ", ".join(("auto", *RUN_DTYPES))
            raise ValueError(f"dtype {dtype!r}: unknown; choose one of {choices}")
        model = load(pretrained, dtype=RUN_DTYPES.get(dtype), dequantize=dequantize)
        if device == LM_EVAL_DEVICE and not torch.cuda.is_available():
            device = "auto"  # its command line gives this where nothing was said
        model.to(select_device(device))
        with _only_errors():  # lm-eval warns of what loading it ourselves means
            super().__init__(pretrained=model, backend="causal", **settings)
        self.gates: SequenceGates | None = None
        self.use_level(str(level))

    def use_level(self, name: str) -> None:
        """Apply a level from now on, and count what it skips from zero.

        Raises:
            ValueError: there is no such level; the message lists those there are.
        """
        levels = None if name == DENSE else model_levels(self.model)
        if levels is not None:
            thresholds = levels.table.level(name).thresholds
            self.gates = SequenceGates(
                self.model, table_sites(self.model, levels.table), levels.scales, thresholds
            )
        elif name == DENSE:
            self.gates = None
        else:
            raise ValueError(
                f"level {name!r}: this model has no activation levels; prune-llm sparsify makes "
                "them"
            )
        self.level = name

    def _model_call(self, *args: Any, **kwargs: Any) -> Any:
        with self.gates or nullcontext():
            return super()._model_call(*args, **kwargs)

    def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
        with self.gates or nullcontext():
            return super()._model_generate(*args, **kwargs)

    def _detect_batch_size(self, *args: Any, **kwargs: Any) -> Any:
        """Its trial runs are not counted."""
        gates, self.gates = self.gates, None
        try:
            return super()._detect_batch_size(*args, **kwargs)
        finally:
            self.gates = gates

    def get_model_info(self) -> dict[str, Any]:
        """For lm-eval's results file; lm-eval's own would ask the hub about a local directory."""
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "model_revision": self.revision,
            "model_sha": "",
            "prune_llm_level": self.level,
            "prune_llm_skipped": None if self.gates is None else self.gates.sparsity,
        }


@contextmanager
def _only_errors() -> Iterator[None]:
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def run_lm_eval(arguments: Sequence[str]) -> None:
    """lm-eval's own command line, with our model registered."""
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["lm_eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
