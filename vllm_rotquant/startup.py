"""From a model's first layer to its first request: what happens when, on every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

from rotquant_kernels.cuda import scaled_mm
from vllm_rotquant import agreement, compat
from vllm_rotquant.collector import Collector
from vllm_rotquant.experts_proof import experts_rows
from vllm_rotquant.fusion import fuse
from vllm_rotquant.large_pages import report_weights
from vllm_rotquant.positions import join_rope
from vllm_rotquant.proof import rank_and_stage, reading_rows, run_checks
from vllm_rotquant.recurrent import check_recurrent, count_recurrent
from vllm_rotquant.reload import Reload
from vllm_rotquant.warmup import warm_experts, warm_linears


class Startup:
    """The start of one model."""

    def __init__(self) -> None:
        self.collector = Collector(self._finish)
        self.ranks: agreement.Ranks | None = None
        self.identity: Callable[[], dict[str, str]] = dict
        self.key_makers: WeakValueDictionary[str, Any] = WeakValueDictionary()  # linears, by their attention modules
        self.strict, self.model = True, ""
        self.when_loaded: Callable[[Any], None] | None = None  # gets the whole model

    def begin(self, defaults: Mapping[str, Any]) -> None:
        """A model is being built. All its ranks come here: before their first layer they agree on what they run.

        Args:
            defaults: `settings.from_environment` of the server's first process.
        """
        if self.ranks is None:
            scaled_mm.provide(compat.integer_products())
            self.ranks, settings = agreement.begin(defaults)
            self.strict = settings.strict
            self.identity = agreement.checkpoint_facts(compat.origin())

    def _finish(self, last: Any) -> None:
        """This rank's layers are loaded, `last` as the last one; all ranks learn how the rest ends."""
        assert self.ranks is not None
        with self.ranks.verdict(self.identity):
            if self.collector.layers:
                self._check_and_join(last)
            else:  # a pipeline stage without layers of rotquant
                compat.logger.info("rotquant start-up check, %s", rank_and_stage([]))

    def _check_and_join(self, last: Any) -> None:
        collected, holders = self.collector, self.collector.holders
        assert holders is not None
        holders.stop()
        # A model that vLLM builds from transformers' modules stood before its layers were there to be watched.
        model = compat.outermost(last) or holders.outermost(last)
        around = holders.around()
        collected.recurrent = count_recurrent(around)
        check_recurrent(collected.recurrent, collected.settings.dtype)
        readings = [] if collected.dummy else reading_rows(around, collected.settings)
        if self.when_loaded is not None:
            self.when_loaded(model)
        if not collected.lora:
            fuse(collected.linears, holders)
            join_rope(collected.attention, holders)
        check = partial(run_checks, collected, strict=self.strict, model=self.model)
        check(experts_rows(collected) + readings)
        warm_linears(layer for layer, _ in collected.packed.values())
        warm_experts(collected.mixtures[:1])
        report_weights()
        Reload(collected, partial(check, [])).install(model)
