"""What the dashboards show: rows of panels, and the query of each line in a panel.

`S` selects the series of one release. Every selector contains it, so that two releases never mix. Series that all routers
report alike, such as the number of nodes, are combined by a maximum. Series of each router's own work are added.
"""

from dataclasses import dataclass, field

S = 'namespace="$namespace",release="$release"'
RATE = "[$__rate_interval]"
# Metrics with the prefix `vllm:` exist on routers and nodes. The label `component` tells them apart.
ROUTER = S + ',component="router",model_name=~"$model"'


@dataclass
class Panel:
    """One panel. `queries` maps legends to PromQL."""

    title: str
    queries: dict
    about: str
    unit: str = "short"
    kind: str = "timeseries"
    width: int = 8
    stacked: bool = False
    maximum: float | None = None


@dataclass
class Row:
    """A row of panels under a heading."""

    title: str
    panels: list = field(default_factory=list)


@dataclass
class Dashboard:
    """One dashboard. `variables` maps the names of variables to the queries that list their values."""

    name: str
    title: str
    about: str
    rows: list
    variables: dict


def percentiles(metric, labels, by="", quantiles=(0.5, 0.9, 0.99)):
    """Lines for quantiles of a histogram, over all series or per value of the label `by`."""
    legend = f" {{{{{by}}}}}" if by else ""
    groups = f"{by}, le" if by else "le"
    return {
        f"p{q * 100:g}{legend}": f"histogram_quantile({q}, sum by ({groups}) (rate({metric}_bucket{{{labels}}}{RATE})))"
        for q in quantiles
    }


def rate(metric, labels, by=""):
    """Increase per second of a counter, over all series or per value of the label `by`."""
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{{{labels}}}{RATE}))"


def mean(histogram, labels, by=""):
    """Mean of a histogram."""
    return f"{rate(histogram + '_sum', labels, by)} / {rate(histogram + '_count', labels, by)}"


def work(metric):
    """Work per pool: routers' own queues add up, and what they see on the nodes is the same for all."""
    return (
        f'sum by (pool) ({metric}{{{S},source="router"}}) + max by (pool) ({metric}{{{S},source="nodes"}})'
    )


def nodes_up(role):
    return f'(max by (pool) (overfill_nodes{{{S},role="{role}",state="up"}}) > 0)'


CLUSTER = Dashboard(
    name="cluster",
    title="Overfill / Cluster",
    about="Traffic, latency, queue and pools of one release, as its routers see them.",
    variables={"model": f'label_values(vllm:time_to_first_token_seconds_count{{{S},component="router"}}, model_name)'},
    rows=[
        Row("Overview", [
            Panel("Routers", {"": f'sum(up{{{S},component="router"}})'}, "Routers that Prometheus reaches.", kind="stat", width=3),
            Panel("Prefill nodes", {"": f'sum(max by (pool) (overfill_nodes{{{S},role="prefill",state="up"}}))'},
                  "Prefill nodes that get requests.", kind="stat", width=3),
            Panel("Decode nodes", {"": f'sum(max by (pool) (overfill_nodes{{{S},role="decode",state="up"}}))'},
                  "Decode nodes that get requests.", kind="stat", width=3),
            Panel("Running", {"": f"sum(vllm:num_requests_running{{{ROUTER}}})"},
                  "Sequences on the nodes.", kind="stat", width=3),
            Panel("Waiting", {"": f"sum(vllm:num_requests_waiting{{{ROUTER}}})"},
                  "Sequences that wait in the routers.", kind="stat", width=3),
            Panel("TTFT p95", percentiles("vllm:time_to_first_token_seconds", ROUTER, quantiles=(0.95,)),
                  "Time from arrival to the first token.", unit="s", kind="stat", width=3),
            Panel("ITL p95", percentiles("vllm:inter_token_latency_seconds", ROUTER, quantiles=(0.95,)),
                  "Time between two tokens of a sequence.", unit="s", kind="stat", width=3),
            Panel("Tokens per second", {"": rate("vllm:generation_tokens_total", ROUTER)}, "Generated tokens, sent to clients.",
                  kind="stat", width=3),
        ]),
        Row("Traffic", [
            Panel("Requests by end", {"{{finished_reason}}": rate("vllm:request_success_total", ROUTER, "finished_reason")},
                  "Sequences that ended per second. abort: the client left.", unit="reqps", stacked=True),
            Panel("Tokens", {"prompt": rate("vllm:prompt_tokens_total", ROUTER),
                             "generated": rate("vllm:generation_tokens_total", ROUTER)}, "Tokens per second."),
            Panel("Running and waiting", {"running": f"sum(vllm:num_requests_running{{{ROUTER}}})",
                                          "waiting": f"sum(vllm:num_requests_waiting{{{ROUTER}}})"},
                  "Sequences on the nodes, and sequences that wait in the routers."),
        ]),
        Row("Latency", [
            Panel("Time to first token", percentiles("vllm:time_to_first_token_seconds", ROUTER),
                  "From arrival at the router to the first token.", unit="s"),
            Panel("Inter-token latency", percentiles("vllm:inter_token_latency_seconds", ROUTER),
                  "Between two tokens of a sequence.", unit="s"),
            Panel("End to end", percentiles("vllm:e2e_request_latency_seconds", ROUTER),
                  "From arrival at the router to the last token.", unit="s"),
            Panel("Legs, mean", {"{{leg}}": mean("overfill_request_leg_seconds", ROUTER, "leg")},
                  "Mean time of a request in each leg. docs/metrics.md says where a leg begins and ends.", unit="s",
                  width=12, stacked=True),
            Panel("Legs, 95th percentile", percentiles("overfill_request_leg_seconds", ROUTER, "leg", (0.95,)),
                  "One leg in twenty takes longer.", unit="s", width=12),
        ]),
        Row("Quality", [
            Panel("Agreement with the full model", {"{{model_name}}": f"{rate('overfill_watch_agreed_tokens_total', ROUTER, 'model_name')} / {rate('overfill_watch_tokens_total', ROUTER, 'model_name')}"},
                  "Share of the tokens of watched answers that the full model would have chosen too.", unit="percentunit", width=6),
            Panel("Log-probability gap", {"{{model_name}}": f"({rate('overfill_watch_full_nats_total', ROUTER, 'model_name')} - {rate('overfill_watch_decode_nats_total', ROUTER, 'model_name')}) / {rate('overfill_watch_tokens_total', ROUTER, 'model_name')}"},
                  "Mean log-probability of a token under the decode model less that under the full model, in nats.", width=6),
            Panel("First token that differs", percentiles("overfill_watch_parted_at_tokens", ROUTER, "model_name", (0.5,)),
                  "Where answers part from what the full model would have written: median, in tokens.", width=6),
            Panel("Watched answers", {"{{result}}": rate("overfill_watch_answers_total", ROUTER, "result")},
                  "Answers per second. dropped: no prefill node had time for them.", width=6, stacked=True),
        ]),
        Row("Queue and refusals", [
            Panel("Time in the queue", percentiles("overfill_request_leg_seconds", ROUTER + ',leg="queue"'),
                  "Time that requests waited for nodes and for admission.", unit="s", width=6),
            Panel("By tenant", {"{{tenant}} {{state}}": f"sum by (tenant, state) (overfill_tenant_requests{{{S}}})"},
                  "Sequences of each tenant. Without API keys there is one series.", width=6),
            Panel("Without nodes", {"{{model_name}}": f"sum by (model_name) (overfill_requests_without_nodes{{{S}}})"},
                  "Requests that wait because no node serves their model. The empty name stands for all unknown models.",
                  width=6),
            Panel("Refusals by reason", {"{{reason}}": rate("overfill_refused_requests_total", ROUTER, "reason")},
                  "Requests answered with an error before their first token. Those of unknown models have no model.", unit="reqps",
                  width=6, stacked=True),
        ]),
        Row("Nodes and work", [
            Panel("Nodes by state", {"{{role}} {{pool}} {{state}}": f"max by (role, pool, state) (overfill_nodes{{{S}}}) > 0"},
                  "Nodes that the routers know. up: it gets requests. docs/metrics.md explains the other states.", width=6),
            Panel("Prefill backlog per node", {"{{pool}}": f"({work('overfill_prefill_backlog_seconds')}) / {nodes_up('prefill')}"},
                  "Seconds that the pool needs for all queued prompts. An autoscaler holds this at its target.", unit="s",
                  width=6),
            Panel("Decode load per node", {"{{pool}}": f"({work('overfill_decode_load_nodes')}) / {nodes_up('decode')}"},
                  "Share of the pool that the load fills. Above 1, requests wait.", unit="percentunit", width=6),
            Panel("Migrations", {"{{model_name}}": rate("overfill_migrations_total", ROUTER, "model_name")},
                  "Requests per second that moved to other nodes.", unit="reqps", width=6),
            Panel("Prefill work", {"{{pool}}": work("overfill_prefill_backlog_seconds")},
                  "Seconds that one node of the pool would take for all queued prompts.", unit="s", width=6),
            Panel("Decode work", {"{{pool}}": work("overfill_decode_load_nodes")},
                  "Decode nodes that the load would fill.", width=6),
            Panel("Alerts", {"{{alertname}} {{severity}}":
                             f'count by (alertname, severity) (ALERTS{{{S},alertstate="firing"}})'},
                  "Alerts that fire, if this Prometheus evaluates the rules of the chart.", width=12),
        ]),
        Row("Processes", [
            Panel("Versions", {"{{component}} {{version}}": f"count by (component, version) (overfill_build_info{{{S}}})"},
                  "Processes of each version."),
            Panel("CPU", {"{{pod}}": rate("process_cpu_seconds_total", S, "pod")}, "Cores that each process uses."),
            Panel("Memory", {"{{pod}}": f"sum by (pod) (process_resident_memory_bytes{{{S}}})"},
                  "Resident memory of each process. Mapped model files count while they are in memory.", unit="bytes"),
            Panel("Connections", {"{{pod}} {{port}}": f"sum by (pod, port) (overfill_open_connections{{{S}}})"},
                  "Open connections of clients to each router.", width=8),
            Panel("Since discovery", {"{{pod}} {{source}}": f"time() - max by (pod, source) (overfill_discovery_last_success_timestamp_seconds{{{S}}})"},
                  "Time since etcd or DNS last answered.", unit="s", width=8),
            Panel("Until certificates expire", {"{{component}} {{file}}": f"min by (component, file) (overfill_certificate_expiry_timestamp_seconds{{{S}}}) - time()"},
                  "Time until the first certificate of each file expires.", unit="s", width=8),
        ]),
    ],
)


def pool_dashboard(role, extra):
    """Dashboard of all pools of a role. `extra` maps titles of rows to further panels."""
    here = f'{S},component="{role}",pool=~"$pool"'
    blocks = f"overfill_kv_blocks{{{here}}}"
    hits = rate("vllm:prefix_cache_hits_total", here), rate("vllm:prefix_cache_queries_total", here)
    rows = [
        Row("Overview", [
            Panel("Nodes", {"": f"sum(up{{{S},component=\"{role}\"}})"}, "Nodes that Prometheus reaches, of all pools.", kind="stat", width=4),
            Panel("Running", {"": f"sum(vllm:num_requests_running{{{here}}})"}, "Requests in the batches.", kind="stat", width=4),
            Panel("Waiting", {"": f"sum(vllm:num_requests_waiting{{{here}}})"}, "Requests that wait on the nodes.", kind="stat", width=4),
            Panel("KV held", {"": f"avg(vllm:kv_cache_usage_perc{{{here}}})"}, "Share of the KV blocks that requests hold.",
                  unit="percentunit", kind="stat", width=4),
            Panel("Prefix hits", {"": f"{hits[0]} / {hits[1]}"}, "Share of the prompt tokens that were in the prefix cache.",
                  unit="percentunit", kind="stat", width=4),
            Panel("KV transferred", {"": rate("overfill_transfer_bytes_total", here)}, "KV bytes of handoffs per second.",
                  unit="Bps", kind="stat", width=4),
        ]),
        Row("Requests", [
            Panel("Running", {"{{pod}}": f"sum by (pod) (vllm:num_requests_running{{{here}}})"}, "Requests in the batch of each node."),
            Panel("Waiting", {"{{pod}}": f"sum by (pod) (vllm:num_requests_waiting{{{here}}})"}, "Requests that wait on each node."),
            Panel("Requests by end", {"{{finished_reason}}": rate("vllm:request_success_total", here, "finished_reason")},
                  "Requests that ended per second.", unit="reqps", stacked=True),
        ] + extra["Requests"]),
        Row("Engine", [
            Panel("Step time", percentiles("overfill_step_seconds", here), "Duration of an engine step.", unit="s", width=6),
            Panel("Requests per step", {"mean": mean("overfill_batch_requests", here)} | percentiles("overfill_batch_requests", here, quantiles=(0.95,)),
                  "Size of the batch.", width=6),
            Panel("Tokens per step", {"mean": mean("vllm:iteration_tokens_total", here)} | percentiles("vllm:iteration_tokens_total", here, quantiles=(0.95,)),
                  "Tokens that a step computes.", width=6),
            Panel("Busy", {"{{pod}}": rate("overfill_step_seconds_sum", here, "pod")}, "Share of the time that the engine computes.",
                  unit="percentunit", width=6, maximum=1),
        ]),
        Row("KV", [
            Panel("Blocks by state", {"{{state}}": f"sum by (state) ({blocks})"}, "held by requests, cached and evictable, free.",
                  stacked=True),
            Panel("Held", {"{{pod}}": f"max by (pod) (vllm:kv_cache_usage_perc{{{here}}})"},
                  "Share of the blocks of each node that requests hold.", unit="percentunit", maximum=1),
            Panel("Prefix hits", {"{{pod}}": f"{rate('vllm:prefix_cache_hits_total', here, 'pod')} / {rate('vllm:prefix_cache_queries_total', here, 'pod')}"},
                  "Share of the prompt tokens that were in the prefix cache.", unit="percentunit", maximum=1),
        ] + extra["KV"]),
        Row("Handoffs", [
            Panel("Bytes", {"{{pod}}": rate("overfill_transfer_bytes_total", here, "pod")}, "KV bytes per second of each node.", unit="Bps", width=6),
            Panel("Transfer time", percentiles("overfill_transfer_seconds", here), "From the first frame of a handoff to its confirmation.",
                  unit="s", width=6),
            Panel("Exposed time", percentiles("overfill_transfer_exposed_seconds", here),
                  "The part of a transfer after the prompt was computed. Clients wait for it.", unit="s", width=6),
            Panel("Rate of a transfer", {"{{pool}}": f"{rate('overfill_transfer_bytes_total', here, 'pool')} / {rate('overfill_transfer_seconds_sum', here, 'pool')}"},
                  "KV bytes per second of transfer time. It includes waiting for layers that are being computed.", unit="Bps", width=6),
            Panel("Open", {"{{pod}}": f"sum by (pod) (overfill_open_handoffs{{{here}}})"}, "Handoffs between reservation and end.", width=6),
            Panel("Failed", {"{{pod}}": rate("overfill_transfer_failures_total", here + ',reason!="cancelled"', "pod")},
                  "Failed handoffs per second, without those whose request ended first.", unit="reqps", width=6),
            Panel("Failed by reason", {"{{reason}}": rate("overfill_transfer_failures_total", here, "reason")},
                  "Failed handoffs per second. cancelled: the request ended first.", unit="reqps", width=6),
            Panel("Stranded", {"{{pod}}": f"sum by (pod) (overfill_stranded_bytes{{{here}}})"},
                  "KV held for handoffs whose request has ended. It must fall to 0 within seconds.", unit="bytes", width=6),
            Panel("Routers", {"{{pod}}": f"min by (pod) (overfill_routers{{{here}}})"}, "Routers connected to each node.", width=6),
        ]),
    ]
    return Dashboard(
        name=role,
        title=f"Overfill / {role.capitalize()} pools",
        about=f"The {role} nodes of one release.",
        variables={"pool": f'label_values(overfill_routers{{{S},component="{role}"}}, pool)'},
        rows=rows,
    )


_PREFILL = S + ',component="prefill",pool=~"$pool"'
_DECODE = S + ',component="decode",pool=~"$pool"'

PREFILL = pool_dashboard("prefill", {
    "Requests": [
        Panel("Prompt tokens", {"{{pod}}": rate("vllm:prompt_tokens_total", _PREFILL, "pod")}, "Prompt tokens of started requests, per second."),
        Panel("Time to first token", percentiles("vllm:time_to_first_token_seconds", _PREFILL),
              "From arrival at the node to the first token.", unit="s"),
        Panel("Backlog", {"{{pool}}": work("overfill_prefill_backlog_seconds")},
              "Seconds that one node of the pool would take for all queued prompts.", unit="s"),
    ],
    "KV": [],
})
DECODE = pool_dashboard("decode", {
    "Requests": [
        Panel("Generated tokens", {"{{pod}}": rate("vllm:generation_tokens_total", _DECODE, "pod")}, "Tokens per second of each node."),
        Panel("Inter-token latency", percentiles("vllm:inter_token_latency_seconds", _DECODE),
              "Between two tokens of a request, on the node.", unit="s"),
        Panel("Load", {"{{pool}}": work("overfill_decode_load_nodes")}, "Decode nodes that the load would fill."),
    ],
    "KV": [
        Panel("Preemptions", {"{{pod}}": rate("vllm:num_preemptions_total", _DECODE, "pod")},
              "Requests per second that left the batch to free blocks.", unit="reqps"),
    ],
})

ALL = [CLUSTER, PREFILL, DECODE]
