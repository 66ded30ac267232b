"""For each alert: series with which it fires, and series with which it must not. promtool evaluates the rules over them.

Each case changes some series of a cluster that is well. Values are promtool's notation, one sample per minute.
"""

from dataclasses import dataclass, field

from rules import NAMESPACE, RELEASE

MINUTES = 120
# The change of a case, and the time at which alerts are looked at.
CHANGE, LOOK = 60, 100
# In seconds.
MONTH = 30 * 86400

ROUTER = 'component="router",pod="r"'
PREFILL = 'component="prefill",pod="p",pool="main",model_name="demo-full"'
DECODE = 'component="decode",pod="d",pool="main",model_name="demo"'
MODEL = ROUTER + ',model_name="demo"'


def gauge(value, then=None, change=CHANGE):
    """A gauge, which has another value after `change` minutes. `_` is a missing sample."""
    if then is None:
        return f"{value}x{MINUTES}"
    return f"{value}x{change - 1} {then}x{MINUTES - change}"


def counter(per_minute, then=None, change=CHANGE):
    """A counter that grows at a pace, and at another pace after `change` minutes."""
    if then is None:
        return f"0+{per_minute}x{MINUTES}"
    return f"0+{per_minute}x{change} {per_minute * change + then}+{then}x{MINUTES - change}"


def well():
    """The series of a cluster that is well and has work."""
    states = [f'{ROUTER},role="{role}",pool="main",state="{state}"' for role in ("prefill", "decode")
              for state in ("paused", "draining", "incompatible", "stalled", "down")]
    series = {f"overfill_nodes{{{state}}}": gauge(0) for state in states}
    series |= {f"process_start_time_seconds{{{process}}}": gauge(1) for process in (ROUTER, PREFILL, DECODE)}
    series |= {
        f"up{{{ROUTER}}}": gauge(1),
        'up{component="prefill",pod="p"}': gauge(1),
        'up{component="decode",pod="d"}': gauge(1),
        'up{component="etcd",pod="e"}': gauge(1),
        f'overfill_nodes{{{ROUTER},role="prefill",pool="main",state="up"}}': gauge(2),
        f'overfill_nodes{{{ROUTER},role="decode",pool="main",state="up"}}': gauge(2),
        f"vllm:num_requests_running{{{MODEL}}}": gauge(8),
        f"vllm:num_requests_waiting{{{MODEL}}}": gauge(1),
        f'vllm:num_requests_running{{{ROUTER},model_name=""}}': gauge(0),
        f'vllm:num_requests_waiting{{{ROUTER},model_name=""}}': gauge(2),
        f'overfill_discovery_last_success_timestamp_seconds{{{ROUTER},source="dns"}}': counter(60),
        f'overfill_certificate_expiry_timestamp_seconds{{{ROUTER},file="tls.crt"}}': gauge(MONTH),
        f"vllm:generation_tokens_total{{{MODEL}}}": counter(10000),
        f"vllm:prompt_tokens_total{{{MODEL}}}": counter(10000),
        f"overfill_requests_without_nodes{{{MODEL}}}": gauge(0),
        f"overfill_migrations_total{{{MODEL}}}": counter(0),
        f"overfill_watch_tokens_total{{{MODEL}}}": counter(100),
        f"overfill_watch_agreed_tokens_total{{{MODEL}}}": counter(95),
        f'vllm:request_success_total{{{MODEL},finished_reason="length"}}': counter(100),
        f'vllm:request_success_total{{{MODEL},finished_reason="abort"}}': counter(5),
        f'overfill_refused_requests_total{{{MODEL},reason="queue_full"}}': counter(0),
        f'overfill_request_leg_seconds_bucket{{{MODEL},leg="queue",le="0.1"}}': counter(100),
        f'overfill_request_leg_seconds_bucket{{{MODEL},leg="queue",le="10"}}': counter(100),
        f'overfill_request_leg_seconds_bucket{{{MODEL},leg="queue",le="+Inf"}}': counter(100),
        f'vllm:time_to_first_token_seconds_bucket{{{MODEL},le="2.5"}}': counter(98),
        f"vllm:time_to_first_token_seconds_count{{{MODEL}}}": counter(100),
        f'vllm:inter_token_latency_seconds_bucket{{{MODEL},le="0.1"}}': counter(9950),
        f"vllm:inter_token_latency_seconds_count{{{MODEL}}}": counter(10000),
        f'overfill_prefill_backlog_seconds{{{ROUTER},pool="main",source="nodes"}}': gauge(0.5),
        f'overfill_prefill_backlog_seconds{{{ROUTER},pool="main",source="router"}}': gauge(0.1),
        f'overfill_decode_load_nodes{{{ROUTER},pool="main",source="nodes"}}': gauge(1.2),
        f'overfill_decode_load_nodes{{{ROUTER},pool="main",source="router"}}': gauge(0),
    }
    for node in (PREFILL, DECODE):
        series |= {
            f"overfill_routers{{{node}}}": gauge(1),
            f"vllm:num_requests_running{{{node}}}": gauge(4),
            f"vllm:prompt_tokens_total{{{node}}}": counter(10000),
            f"overfill_step_seconds_count{{{node}}}": counter(600),
            f'overfill_kv_blocks{{{node},state="held"}}': gauge(50),
            f'overfill_kv_blocks{{{node},state="cached"}}': gauge(30),
            f'overfill_kv_blocks{{{node},state="free"}}': gauge(20),
            f"vllm:num_preemptions_total{{{node}}}": counter(0),
            f'overfill_transfer_failures_total{{{node},reason="cancelled"}}': counter(20),
            f'overfill_transfer_failures_total{{{node},reason="lost"}}': counter(0),
            f"overfill_transfer_seconds_count{{{node}}}": counter(100),
            f'overfill_transfer_exposed_seconds_bucket{{{node},le="0.1"}}': counter(100),
            f'overfill_transfer_exposed_seconds_bucket{{{node},le="2.5"}}': counter(100),
            f'overfill_transfer_exposed_seconds_bucket{{{node},le="+Inf"}}': counter(100),
            f"overfill_stranded_bytes{{{node}}}": gauge(0),
        }
    return series


@dataclass
class Case:
    """`fires` and `quiet` change series. `labels` are those of the alert that fires, beside namespace and release."""

    alert: str
    severity: str
    fires: dict
    quiet: dict
    labels: dict = field(default_factory=dict)


def nodes(role, state, count):
    return {f'overfill_nodes{{{ROUTER},role="{role}",pool="main",state="{state}"}}': count}


def refused(reason, then):
    return {f'overfill_refused_requests_total{{{MODEL},reason="{reason}"}}': counter(0, then)}


def ended(reason, then):
    return {f'vllm:request_success_total{{{MODEL},finished_reason="{reason}"}}': counter(0, then)}


def late(metric, limit, total, within):
    """`within` of `total` per minute are within the limit, all the time."""
    name = f"vllm:{metric}_seconds"
    return {f'{name}_bucket{{{MODEL},le="{limit}"}}': counter(within), f"{name}_count{{{MODEL}}}": counter(total)}


MAIN = {"pool": "main"}
NO_DECODE_UP = nodes("decode", "up", gauge(2, 0))
DISCOVERY = f'overfill_discovery_last_success_timestamp_seconds{{{ROUTER},source="dns"}}'
EXPIRY = f'overfill_certificate_expiry_timestamp_seconds{{{ROUTER},file="tls.crt"}}'

CASES = [
    Case("OverfillNoRouter", "critical",
         fires={f"vllm:num_requests_running{{{MODEL}}}": gauge(8, "_"),
                f'vllm:num_requests_running{{{ROUTER},model_name=""}}': gauge(0, "_")},
         quiet={f"vllm:num_requests_running{{{MODEL}}}": gauge(8, "_")}, labels={"component": "router"}),
    Case("OverfillProcessSilent", "warning",
         fires={'up{component="decode",pod="d"}': gauge(1, 0)},
         quiet={'up{component="decode",pod="d"}': gauge(1, "_")}, labels={"component": "decode", "pod": "d"}),
    Case("OverfillProcessRestarts", "warning",
         fires={f"process_start_time_seconds{{{ROUTER}}}": f"1x80 2x5 3x{MINUTES}"},
         quiet={f"process_start_time_seconds{{{ROUTER}}}": f"1x80 2x{MINUTES}"},
         labels={"component": "router", "pod": "r"}),
    Case("OverfillNoNodes", "critical", fires=nodes("decode", "down", gauge(0, 2)) | NO_DECODE_UP,
         quiet=nodes("decode", "down", gauge(0, 1)), labels={"role": "decode"}),
    # A pool that was scaled to zero has drained.
    Case("OverfillNoNodes", "critical", fires=nodes("decode", "stalled", gauge(0, 2)) | NO_DECODE_UP,
         quiet=nodes("decode", "draining", gauge(0, 2)) | NO_DECODE_UP, labels={"role": "decode"}),
    Case("OverfillNodesDown", "warning", fires=nodes("prefill", "down", gauge("_", 1)), quiet=nodes("prefill", "draining", gauge(0, 1)),
         labels={"role": "prefill", **MAIN}),
    Case("OverfillNodesIncompatible", "warning", fires=nodes("prefill", "incompatible", gauge(0, 1)),
         quiet=nodes("prefill", "down", gauge(0, 1)), labels={"role": "prefill", **MAIN}),
    Case("OverfillNodeWithoutRouter", "warning", fires={f"overfill_routers{{{DECODE}}}": gauge(1, 0)},
         quiet={f"overfill_routers{{{DECODE}}}": gauge(1, 3)},
         labels={"component": "decode", "pod": "d", "model_name": "demo", **MAIN}),
    Case("OverfillRequestsWithoutNodes", "critical", fires={f"overfill_requests_without_nodes{{{MODEL}}}": gauge(0, 3)},
         quiet={f"overfill_requests_without_nodes{{{MODEL}}}": gauge(0, "3 3 3 0")}, labels={"model_name": "demo"}),
    Case("OverfillNoProgress", "critical", fires={f"vllm:generation_tokens_total{{{MODEL}}}": counter(10000, 0)},
         quiet={f"vllm:generation_tokens_total{{{MODEL}}}": counter(10000, 0), f"vllm:num_requests_running{{{MODEL}}}": gauge(8, 0)},
         labels={"model_name": "demo"}),
    Case("OverfillEngineStalled", "critical", fires={f"overfill_step_seconds_count{{{PREFILL}}}": counter(600, 0)},
         quiet={f"overfill_step_seconds_count{{{PREFILL}}}": counter(600, 0), f"vllm:num_requests_running{{{PREFILL}}}": gauge(4, 0)},
         labels={"component": "prefill", "pod": "p", "model_name": "demo-full", **MAIN}),
    Case("OverfillEtcdDown", "warning", fires={'up{component="etcd",pod="e"}': gauge(1, 0)},
         quiet={'up{component="etcd",pod="e"}': gauge(1, "_")}, labels={"component": "etcd", "pod": "e"}),
    Case("OverfillDiscoveryFails", "warning", fires={DISCOVERY: counter(60, 0)}, quiet={DISCOVERY: "0+60x80 4800x3 5040+60x40"},
         labels={"component": "router", "pod": "r", "source": "dns"}),
    # 7 days are 604800 s.
    Case("OverfillCertificateExpires", "warning", fires={EXPIRY: gauge(MONTH, 600_000)}, quiet={EXPIRY: gauge(MONTH, 700_000)},
         labels={"component": "router", "file": "tls.crt"}),
    Case("OverfillQueueWait", "warning",
         fires={f'overfill_request_leg_seconds_bucket{{{MODEL},leg="queue",le="0.1"}}': counter(100, 10)},
         quiet={f'overfill_request_leg_seconds_bucket{{{MODEL},leg="queue",le="0.1"}}': counter(100, 95)},
         labels={"model_name": "demo"}),
    Case("OverfillQueueGrows", "warning", fires={f"vllm:num_requests_waiting{{{MODEL}}}": gauge(1, 9)},
         quiet={f"vllm:num_requests_waiting{{{MODEL}}}": gauge(1, 8)}, labels={"model_name": "demo"}),
    Case("OverfillRefusals", "warning", fires=refused("queue_full", 10), quiet=refused("queue_full", 4)),
    Case("OverfillErrors", "critical", fires=ended("error", 2), quiet=refused("queue_full", 50)),
    Case("OverfillErrors", "critical", fires=refused("internal", 2), quiet=refused("unknown_model", 50)),
    Case("OverfillClientErrors", "info", fires=refused("unknown_model", 40), quiet=refused("unknown_model", 20),
         labels={"reason": "unknown_model"}),
    Case("OverfillClientsLeave", "info", fires=ended("abort", 60), quiet=ended("abort", 20)),
    Case("OverfillFirstTokensLate", "critical",
         fires={f'vllm:time_to_first_token_seconds_bucket{{{MODEL},le="2.5"}}': counter(98, 10, change=20)},
         # An hour ago it was bad. Now it is well.
         quiet={f'vllm:time_to_first_token_seconds_bucket{{{MODEL},le="2.5"}}': "0+98x20 1960x60 2060+100x40"},
         labels={"model_name": "demo"}),
    Case("OverfillFirstTokensLate", "warning", fires=late("time_to_first_token", "2.5", 100, 60),
         # As bad, but fewer than 100 requests in six hours.
         quiet=late("time_to_first_token", "2.5", 0.2, 0.1), labels={"model_name": "demo"}),
    Case("OverfillTokensLate", "critical",
         fires={f'vllm:inter_token_latency_seconds_bucket{{{MODEL},le="0.1"}}': counter(9950, 8000, change=20)},
         quiet={f'vllm:inter_token_latency_seconds_bucket{{{MODEL},le="0.1"}}': counter(9950, 9000, change=20)},
         labels={"model_name": "demo"}),
    Case("OverfillTokensLate", "warning", fires=late("inter_token_latency", "0.1", 10000, 9300),
         quiet=late("inter_token_latency", "0.1", 10000, 9500), labels={"model_name": "demo"}),
    Case("OverfillMigrations", "warning", fires={f"overfill_migrations_total{{{MODEL}}}": counter(0, 6)},
         quiet={f"overfill_migrations_total{{{MODEL}}}": counter(0, 3)}),
    # The day before ends an hour before the look: then it was 95 %.
    Case("OverfillAgreementFell", "warning", fires={f"overfill_watch_agreed_tokens_total{{{MODEL}}}": counter(95, 80)},
         quiet={f"overfill_watch_agreed_tokens_total{{{MODEL}}}": counter(95, 91)}, labels={"model_name": "demo"}),
    # As bad, but fewer than 1000 tokens in an hour.
    Case("OverfillAgreementFell", "warning", fires={f"overfill_watch_agreed_tokens_total{{{MODEL}}}": counter(95, 60)},
         quiet={f"overfill_watch_tokens_total{{{MODEL}}}": counter(10),
                f"overfill_watch_agreed_tokens_total{{{MODEL}}}": counter(9.5, 6)}, labels={"model_name": "demo"}),
    Case("OverfillPrefillBehind", "warning",
         fires={f'overfill_prefill_backlog_seconds{{{ROUTER},pool="main",source="nodes"}}': gauge(0.5, 5)},
         quiet={f'overfill_prefill_backlog_seconds{{{ROUTER},pool="main",source="nodes"}}': gauge(0.5, 3)}, labels=MAIN),
    Case("OverfillDecodeFull", "warning",
         fires={f'overfill_decode_load_nodes{{{ROUTER},pool="main",source="router"}}': gauge(0, 1)},
         quiet={f'overfill_decode_load_nodes{{{ROUTER},pool="main",source="router"}}': gauge(0, 0.5)}, labels=MAIN),
    Case("OverfillKvNearlyFull", "warning", fires={f'overfill_kv_blocks{{{DECODE},state="held"}}': gauge(50, 950)},
         quiet={f'overfill_kv_blocks{{{DECODE},state="cached"}}': gauge(30, 950)}, labels={"component": "decode", **MAIN}),
    Case("OverfillPreemptions", "warning", fires={f"vllm:num_preemptions_total{{{DECODE}}}": counter(0, 10)},
         quiet={f"vllm:num_preemptions_total{{{DECODE}}}": counter(0, 3)}, labels={"component": "decode", **MAIN}),
    Case("OverfillHandoffsFail", "warning", fires={f'overfill_transfer_failures_total{{{DECODE},reason="lost"}}': counter(0, 5)},
         quiet={f'overfill_transfer_failures_total{{{DECODE},reason="lost"}}': counter(0, 1)}, labels={"component": "decode", **MAIN}),
    Case("OverfillHandoffsSlow", "warning",
         fires={f'overfill_transfer_exposed_seconds_bucket{{{DECODE},le="0.1"}}': counter(100, 80)},
         quiet={f'overfill_transfer_exposed_seconds_bucket{{{DECODE},le="0.1"}}': counter(100, 98)},
         labels={"component": "decode", **MAIN}),
    Case("OverfillStrandedBytes", "warning", fires={f"overfill_stranded_bytes{{{PREFILL}}}": gauge(0, 4096)},
         quiet={f"overfill_stranded_bytes{{{PREFILL}}}": gauge(0, "4096x4 0x25 4096x4 0")},
         labels={"component": "prefill", "pod": "p", "model_name": "demo-full", **MAIN}),
]


def series(changes):
    """Series of a case for promtool, each with the labels of the release."""
    return [
        {"series": name.replace("{", f'{{namespace="{NAMESPACE}",release="{RELEASE}",'), "values": values}
        for name, values in (well() | changes).items()
    ]
