"""Sends requests over one gRPC channel of the official library, until standard input ends.

Arguments: the channel's target, and a request in hex. The channel balances over all addresses of the target, and looks them
up again when a connection is closed. Every request must be answered.
"""

import sys
import threading

import grpc

target, request = sys.argv[1], bytes.fromhex(sys.argv[2])
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
options = [
    ("grpc.lb_policy_name", "round_robin"),
    # The default of 30 seconds would only make the test longer.
    ("grpc.dns_min_time_between_resolutions_ms", 200),
]
answered = 0
with grpc.insecure_channel(target, options=options) as channel:
    # Messages stay bytes: the test needs no generated code.
    generate = channel.unary_stream("/overfill.v1.Router/Generate")
    while not ended.is_set():
        events = list(generate(request, timeout=30, wait_for_ready=True))
        assert events, "an empty stream"
        answered += 1
print(answered)
