"""Decode steps over the plan: dense, sparse, and torch's compiled dense one as the peer.

Batch 1; every layer's linears, norms and attention over the context, and the dense head; no
sampling. What is skipped is set by thresholds that a search finds for every site.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from cases import parse_case
from gpu_cases import RANDOM
from gpu_checks import random_head
from gpu_decoder import SITES, Decoder, Layer, random_layer
from gpu_peer import Peer
from gpu_records import recorded_bytes
from gpu_run import Case, Run, Setting, event_seconds, spread
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

CALLS = 10  # of the peer behind each other: the host prepares one while another runs


@dataclass
class Baselines:
    """Medians of a dense step in seconds, by context and name."""

    medians: dict[int, dict[str, float]] = field(default_factory=dict)

    def add(self, context: int, name: str, times: list[float]) -> None:
        self.medians.setdefault(context, {})[name] = statistics.median(times)

    def gains(self, context: int, median: float) -> dict[str, object]:
        """Speed-ups over each, and over the fastest."""
        known = self.medians.get(context, {})
        found: dict[str, object] = {
            f"over_{name}": round(dense / median, 3) for name, dense in known.items()
        }
        if known:
            found["speedup"] = round(min(known.values()) / median, 3)
        return found


def bench_dense(run: Run, read: float, baselines: Baselines) -> None:
    """Our plan with dense weights."""
    setting = run.setting
    layers, head_VI = some_layers("W0", RANDOM, setting), random_head(setting.sizes, setting)
    for context in setting.contexts:
        if run.has_time(f"dense step at context {context}"):
            decoder = Decoder(setting.sizes, layers, head_VI, context)
            times, loaded = plan_seconds(decoder, setting)
            baselines.add(context, "plan", times)
            add(run, read, ("dense", ""), context, times, loaded)


def bench_peer(
    run: Run, read: float, baselines: Baselines, compiled: Callable[[Peer], Callable[..., Tensor]]
) -> None:
    """torch's step over fused dense weights, compiled."""
    setting = run.setting
    layers, head_VI = some_layers("W0", RANDOM, setting), random_head(setting.sizes, setting)
    for context in setting.contexts:
        if not run.has_time(f"compiled dense step at context {context}"):
            continue
        decoder = Decoder(setting.sizes, layers, head_VI, context)
        x_BI = torch.randn_like(decoder.x_BI)
        try:
            times = peer_seconds(compiled(Peer(decoder)), x_BI, setting)
        except Exception as error:  # a peer that fails is no reason to stop
            note = str(error).splitlines()[0][:120] if str(error) else ""
            run.leave_out(f"compiled dense step: {type(error).__name__} {note}")
            return
        baselines.add(context, "compiled", times)
        loaded = setting.sizes.layers * sum(w.nbytes for w in layers[0].dense.values())
        add(run, read, ("dense, compiled by torch", ""), context, times, loaded + head_VI.nbytes)


def compile_peer(peer: Peer) -> Callable[..., Tensor]:
    """As gpt-fast compiles its step: one graph, replayed by torch."""
    found: Callable[..., Tensor] = torch.compile(
        peer, mode="reduce-overhead", fullgraph=True, dynamic=False
    )
    return found


def bench_steps(run: Run, read: float, baselines: Baselines) -> None:
    """The sparse cases beside both."""
    setting = run.setting
    head_VI = random_head(setting.sizes, setting)
    for case in setting.steps:
        if not run.has_time(f"step {' '.join(case)}"):
            continue
        layers = some_layers(*case, setting)
        for context in setting.contexts:
            if run.has_time(f"step {' '.join(case)} at context {context}"):
                decoder = Decoder(setting.sizes, layers, head_VI, context)
                if skipped := parse_case(case[0])[1]:
                    decoder = skipping(decoder, skipped, setting)
                times, loaded = plan_seconds(decoder, setting)
                shares = {"channels_read": mean_shares(decoder)} if skipped else {}
                gains = baselines.gains(context, statistics.median(times))
                add(run, read, case, context, times, loaded, **gains, **shares)


def some_layers(case: str, masks: str, setting: Setting) -> list[Layer]:
    """Distinct ones; a step takes them in turn."""
    pruned = parse_case(case)[0]
    layers = [random_layer(setting.sizes, pruned, masks, setting.dtype, setting.device)
              for _ in range(setting.distinct)]  # fmt: skip
    if case != "W0":  # only the dense step's peers read them
        layers = [replace(layer, dense={}) for layer in layers]
    return layers


def skipping(decoder: Decoder, skipped: float, setting: Setting) -> Decoder:
    """The decoder with thresholds that skip a share of every site's inputs.

    A search by halves, in all sites at once: one's inputs hardly depend on another's threshold.
    """
    sites, device = len(SITES) * decoder.sizes.layers, decoder.head_VI.device
    low_S, high_S = (torch.full((sites,), end, device=device) for end in (1e-4, 30.0))
    thresholds_SB = torch.zeros(sites, decoder.rows, device=device)
    found = replace(decoder, thresholds_SB=thresholds_SB)
    x_BI = torch.randn_like(found.x_BI)
    for _ in range(setting.searched):
        middle_S = (low_S * high_S).sqrt()
        thresholds_SB.copy_(middle_S[:, None].expand(sites, decoder.rows))
        found.counts_S3.zero_()
        found.x_BI.copy_(x_BI)
        found.plan.run()
        more_S = read_shares(found) > 1 - skipped
        low_S, high_S = torch.where(more_S, middle_S, low_S), torch.where(more_S, high_S, middle_S)
    return replace(found)  # a plan that has not run


def read_shares(decoder: Decoder) -> Tensor:
    """Of the inputs of every block's sites those that were read, by the plan's own counts."""
    widths = [decoder.sizes.shapes[site][1] for site in SITES] * decoder.sizes.layers
    width_S = torch.tensor(widths, device=decoder.counts_S3.device)
    return decoder.counts_S3[:, 0] / (decoder.counts_S3[:, 2] / decoder.rows * width_S)


def mean_shares(decoder: Decoder) -> dict[str, float]:
    """By site, over the blocks."""
    share_S = read_shares(decoder)
    return {site: round(float(share_S[i :: len(SITES)].mean()), 3) for i, site in enumerate(SITES)}


def plan_seconds(decoder: Decoder, setting: Setting) -> tuple[list[float], int]:
    """Seconds of a step, and bytes of weights that one reads. The plan must not have run."""
    x_BI = torch.randn_like(decoder.x_BI)
    decoder.x_BI.copy_(x_BI)
    with recorded_bytes() as loaded:
        decoder.plan.run()

    def fill() -> None:
        decoder.x_BI.copy_(x_BI)

    if not setting.on_gpu:
        fill()
        begun = time.perf_counter()
        decoder.plan.run()
        return [time.perf_counter() - begun], sum(loaded)
    fill()
    decoder.plan.run()  # records the graph
    return event_seconds(decoder.plan.run, setting, fill), sum(loaded)


def peer_seconds(step: Callable[..., Tensor], x_BI: Tensor, setting: Setting) -> list[float]:
    # as gpt-fast: attention in plain operations, which the compiler fuses
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        step(x_BI)  # compiles
        if not setting.on_gpu:
            begun = time.perf_counter()
            step(x_BI)
            return [time.perf_counter() - begun]

        def steps() -> None:
            for _ in range(CALLS):
                step(x_BI)

        steps()  # records
        return [took / CALLS for took in event_seconds(steps, setting)]


def add(
    run: Run, read: float, case: Case, context: int, times: list[float], loaded: int, **more: object
) -> None:
    """A row; the cache's bytes are read beside the weights'."""
    sizes, dtype = run.setting.sizes, run.setting.dtype
    cache, median = sizes.cache_bytes(context, dtype.itemsize), statistics.median(times)
    run.add(
        kind="step", case=case[0], masks=case[1], context=context, layers=sizes.layers,
        **spread(times), tokens_per_second=round(1 / median, 1), bytes=loaded, cache_bytes=cache,
        limit=round((loaded + cache) / read / median, 3), **more,
    )  # fmt: skip
