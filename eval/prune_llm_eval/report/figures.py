"""The pictures of a report, in their order. Values in, SVG out."""

from __future__ import annotations

from typing import Any

from prune_llm_eval.report.figure import Figure
from prune_llm_eval.report.maps import error_map, inputs_map, sparsity_map
from prune_llm_eval.report.quality_figures import frontier_figure, quality_figure
from prune_llm_eval.report.speed_figures import (
    decode_by_batch,
    decode_by_context,
    prompt_by_context,
    size_figure,
)


def figures(report: dict[str, Any]) -> list[Figure]:
    """Those that the report has values for."""
    return [
        figure
        for make in (
            quality_figure,
            frontier_figure,
            decode_by_batch,
            decode_by_context,
            prompt_by_context,
            size_figure,
            sparsity_map,
            error_map,
            inputs_map,
        )
        if (figure := make(report)) is not None
    ]
