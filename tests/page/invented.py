"""Invented states of a router, consistent in themselves."""

import math
import random
import time

NODE = {"version": "0.1.0", "error": "", "stranded_bytes": 0, "waiting_requests": 0, "open_handoffs": 0, "queued_tokens": 0}
INTERVAL = 5


def node(role, number, pool, model, **rest):
    name = f"{pool}-{number}"
    made = NODE | {
        "url": f"http://10.0.{1 if role == 'prefill' else 2}.{len(pool) * 10 + number}:50061",
        "node_id": name, "role": role, "pool": pool, "model": model, "state": "serving",
        "weights": "bf16" if role == "prefill" else "int8",
        "running_requests": 0, "max_running_requests": 32, "free_blocks": 4096, "total_blocks": 4096,
        "prefill_tokens_per_second": 9200 if role == "prefill" else 0,
        "decode_step_microseconds": 8400 if role == "decode" else 0,
    }
    return made | rest


def busy():
    return [
        node("prefill", 0, "prefill", "demo-full", running_requests=6, waiting_requests=3, queued_tokens=18_240,
             free_blocks=1310, open_handoffs=4),
        node("prefill", 1, "prefill", "demo-full", running_requests=2, queued_tokens=960, free_blocks=2870,
             open_handoffs=1, prefill_tokens_per_second=8900),
        node("decode", 0, "decode", "demo", running_requests=27, free_blocks=290, open_handoffs=2,
             decode_step_microseconds=11_900, waiting_requests=2),
        node("decode", 1, "decode", "demo", running_requests=14, free_blocks=2230, open_handoffs=2),
        node("decode", 2, "decode", "demo", running_requests=3, free_blocks=3800, state="draining",
             stranded_bytes=6_291_456, decode_step_microseconds=6200),
        node("decode", 0, "half", "demo-half", running_requests=5, max_running_requests=64, free_blocks=7400,
             total_blocks=8192, open_handoffs=1, decode_step_microseconds=5100),
        node("decode", 1, "half", "demo-half", state="away", max_running_requests=64, free_blocks=8192, total_blocks=8192,
             error="the load stream ended: connection reset by peer (10.0.2.41:50061)"),
        {"url": "http://10.0.2.77:50061", "role": "decode", "state": "away",
         "error": "10.0.2.77:50061: connection refused (os error 111)"},
    ]


def many():
    draw = random.Random(7)
    nodes = [node("prefill", i, "prefill", "demo-full", running_requests=draw.randrange(9), free_blocks=draw.randrange(4096))
             for i in range(12)]
    return nodes + [node("decode", i, pool, "demo", running_requests=draw.randrange(33), free_blocks=draw.randrange(4096))
                    for pool in ("decode-h100", "decode-l40s") for i in range(18)]


class Cluster:
    def __init__(self, scenario):
        self.scenario = scenario
        self.begin = time.time()
        self.nodes = {"busy": busy, "keys": busy, "many": many, "none": list}.get(scenario, self.idle)()
        self.loaded = scenario in ("busy", "keys", "many")
        self.drained = []

    @staticmethod
    def idle():
        return [node("prefill", 0, "prefill", "demo-full"), node("decode", 0, "decode", "demo"),
                node("decode", 1, "decode", "demo")]

    def models(self):
        served = self.scenario != "none"
        models = [{"name": "demo", "full_model": "demo-full", "max_context_tokens": 4096, "served": served}]
        if self.loaded:
            models.append(models[0] | {"name": "demo-half"})
            models.append(models[0] | {"name": "demo-full"})
            models.append({"name": "story-large", "full_model": None, "max_context_tokens": None, "served": False})
        return models

    def full_model(self, model):
        return next((m["full_model"] for m in self.models() if m["name"] == model), None) or model

    def drain(self, url):
        found = [n for n in self.nodes if n["url"] == url]
        if not found:
            return f"no node is at {url}"
        if found[0].get("node_id") == "prefill-1":
            return "prefill-1: the node refused to drain: it is still loading its model"
        found[0]["state"] = "draining"
        self.drained.append(url)
        return None

    def snapshot(self):
        now = time.time()
        return {
            "version": "0.1.0", "now": now, "uptime_seconds": now - self.begin + 12_345, "router_id": "5f0c9a",
            "keys_required": self.scenario == "keys",
            "nodes": self.nodes, "models": self.models(), "queue": self.queue(),
            "handoffs": self.handoffs(now), "history": self.history(now),
        }

    def queue(self):
        if not self.loaded:
            return {"running": 0, "waiting": 0, "by_tenant": []}
        tenants = [("team-search", 31, 4), ("team-support", 17, 0), ("batch", 9, 22)]
        return {"running": 57, "waiting": 26,
                "by_tenant": [{"tenant": t, "running": r, "waiting": w} for t, r, w in tenants]}

    def handoffs(self, now):
        """Three a second, in steps of a third of a second, so that the same handoff keeps its id and its numbers."""
        if not self.loaded:
            return []
        made = []
        froms = [n["node_id"] for n in self.nodes if n["role"] == "prefill"]
        tos = [n["node_id"] for n in self.nodes if n["role"] == "decode" and n["state"] == "serving"]
        newest = int((now - self.begin) * 3) + 50
        for number in range(newest - 49, newest + 1):
            draw = random.Random(number)
            seconds = draw.uniform(0.008, 0.06)
            made.append({"id": number, "ended": self.begin + (number - 50) / 3, "prefill_node": draw.choice(froms),
                         "decode_node": draw.choice(tos), "bytes": draw.randrange(1, 64) * 262_144,
                         "seconds": seconds, "exposed_seconds": seconds * draw.uniform(0.02, 0.3)})
        return made

    def history(self, now):
        points = []
        last = int(now // INTERVAL) * INTERVAL
        for t in range(last - 15 * 60 + INTERVAL, last + INTERVAL, INTERVAL):
            draw = random.Random(t)
            step = (last - t) // INTERVAL
            quiet = not self.loaded or 52 < step < 70 or step in (120, 122)
            point = {"t": t, "requests": 0, "tokens": 0, "waiting": 0,
                     "ttft_p50": None, "ttft_p95": None, "itl_p50": None, "itl_p95": None}
            if not quiet:
                load = 1 + 0.5 * math.sin(t / 140) + draw.uniform(-0.12, 0.12)
                point |= {"requests": int(9 * load), "tokens": int(6100 * load), "waiting": int(20 * load),
                          "ttft_p50": 0.14 * load, "ttft_p95": 0.14 * load * draw.uniform(2.2, 3.2),
                          "itl_p50": 0.009 * load, "itl_p95": 0.009 * load * draw.uniform(1.3, 1.9)}
            points.append(point)
        return {"interval_seconds": INTERVAL, "points": points}


def timings(prompt_chars, tokens, rate):
    prefill = 0.09 + prompt_chars / 90_000
    legs = {"tokenize": 0.0007, "queue": 0.004, "reserve": 0.0021, "prefill_queue": 0.012, "prefill": prefill,
            "handoff": 0.0038, "first_decode_step": 0.0092, "decode": max(0, tokens - 2) / rate}
    ttft = sum(list(legs.values())[:5])
    return {
        "queue_seconds": legs["queue"], "ttft_seconds": ttft, "mean_itl_seconds": 1 / rate,
        "total_seconds": sum(legs.values()), "migrations": 0, "prefill_node": "prefill-0", "decode_node": "decode-1",
        "prefill_cached_tokens": 16, "decode_held_tokens": 0,
        "handoff": {"bytes": 4_718_592, "seconds": 0.031, "exposed_seconds": 0.0038},
        "legs": [{"leg": leg, "seconds": seconds} for leg, seconds in legs.items()],
    }
