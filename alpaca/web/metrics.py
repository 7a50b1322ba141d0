"""/metrics in Prometheus' text format: what the engine counts, whichever port a request came by."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from alpaca.serving.measures import SECONDS, Histogram
from alpaca.web.served import Served


def text(models: list[Served]) -> bytes:
    """The metrics of all models, labelled by model."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Engines(models))
    return generate_latest(registry)


class _Engines(Collector):
    def __init__(self, models: list[Served]) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """A family for each measure."""
        for name, told, read in COUNTERS:
            counter = CounterMetricFamily(name, told, labels=["model"])
            for one in self._models:
                counter.add_metric([one.name], read(one))
            yield counter
        for name, told, read in GAUGES:
            gauge = GaugeMetricFamily(name, told, labels=["model"])
            for one in self._models:
                gauge.add_metric([one.name], read(one))
            yield gauge
        ended = CounterMetricFamily(
            "alpaca_answers", "Answers that ended, by reason.", labels=["model", "reason"]
        )
        for one in self._models:
            for reason, count in sorted(one.engine.measures.ended.items()):
                ended.add_metric([one.name, reason], count)
        yield ended
        yield self._by_adapter()
        for name, told, pick in HISTOGRAMS:
            family = HistogramMetricFamily(name, told, labels=["model"])
            for one in self._models:
                histogram: Histogram = pick(one)
                family.add_metric([one.name], _cumulative(histogram), histogram.sum)
            yield family

    def _by_adapter(self) -> Metric:
        """Only of those that are loaded, so that names which come and go are not kept."""
        asked = CounterMetricFamily(
            "alpaca_adapter_requests",
            "Requests of each adapter that is loaded.",
            labels=["model", "adapter"],
        )
        for one in self._models:
            for adapter in one.engine.adapters.loaded:
                asked.add_metric([one.name, adapter.name], adapter.requests)
        return asked


def _cumulative(histogram: Histogram) -> list[tuple[str, float]]:
    total, found = 0, []
    for limit, count in zip([*map(str, SECONDS), "+Inf"], list(histogram.counts), strict=True):
        total += count
        found.append((limit, float(total)))
    return found


COUNTERS = (
    ("alpaca_requests", "Requests that the engine took.", lambda s: s.engine.measures.requests),
    (
        "alpaca_prompt_tokens",
        "Tokens of their prompts.",
        lambda s: s.engine.measures.prompt_tokens,
    ),
    (
        "alpaca_generated_tokens",
        "Tokens of answers, end tokens included.",
        lambda s: s.engine.measures.generated_tokens,
    ),
)
GAUGES = (
    ("alpaca_waiting_requests", "Requests that wait for slots.", lambda s: s.engine.waiting),
    ("alpaca_slots", "Answers that can be made at once.", lambda s: s.engine.capacity.slots),
    (
        "alpaca_busy_slots",
        "Answers that are being made.",
        lambda s: s.engine.capacity.slots - s.engine.idle_slots,
    ),
    ("alpaca_adapters", "Adapters that are loaded.", lambda s: len(s.engine.adapters.loaded)),
    (
        "alpaca_adapter_bytes",
        "Memory of their matrices.",
        lambda s: sum(one.bytes for one in s.engine.adapters.loaded),
    ),
    ("alpaca_healthy", "1 while the engine is healthy.", lambda s: float(s.engine.healthy)),
)
HISTOGRAMS = (
    (
        "alpaca_time_to_first_token_seconds",
        "From submission to an answer's first token.",
        lambda s: s.engine.measures.first_token,
    ),
    (
        "alpaca_time_between_tokens_seconds",
        "Between two tokens of an answer.",
        lambda s: s.engine.measures.between_tokens,
    ),
)
