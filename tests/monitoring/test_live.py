"""A real Prometheus scrapes a running cluster. Queries must return data, and alerts must become active when their cause
happens. The tests run in this order, with one cluster."""

import http.client
import re
import time
import urllib.parse

import pytest

import rules
from cluster import Clients, Cluster, get, until
from prometheus import WINDOW, Prometheus, autoscaler_queries

# Alerts that these tests don't cause.
NOT_CAUSED = {
    "OverfillEngineStalled": "a signal stops a whole process, and never its engine alone",
    "OverfillNodesIncompatible": "all nodes serve the demo pair",
    "OverfillAgreementFell": "it compares with the day before",
}
# The router's etcd never answers, and the certificate of its CA has expired.
ALWAYS = {"OverfillEtcdDown", "OverfillDiscoveryFails", "OverfillCertificateExpires"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory, cluster):
    prometheus = Prometheus(tmp_path_factory.mktemp("prometheus"), cluster.processes)
    yield prometheus
    prometheus.stop()


@pytest.fixture(autouse=True)
def calm(cluster):
    """After a test, nothing that it did goes on."""
    yield
    cluster.calm()


def empty_panels(prometheus):
    return [(title, panel, query) for title, panel, query in rules.queries(WINDOW) if not prometheus.query(query)]


def test_panels_show_data_and_no_alert_is_active_while_all_is_well(cluster, prometheus):
    cluster.load("--concurrency", "2", "--prompt-tokens", "100", "--output-tokens", "60")
    until(lambda: f"no data: {empty_panels(prometheus)}", lambda: not empty_panels(prometheus))
    for name in rules.recorded():
        until(f"{name} is recorded", lambda: prometheus.query(name))
    for query in autoscaler_queries():
        until(f"no data for an autoscaler: {query}", lambda: prometheus.query(query))
    prometheus.wait_for(*ALWAYS)
    # Alerts of the time before the first scrape end.
    until(lambda: f"only etcd is down, but {prometheus.active()}", lambda: prometheus.active() == ALWAYS)
    for each in rules.queries(WINDOW, release="green"):
        assert not prometheus.query(each[2]), f"data of another release: {each}"


def test_clients_that_leave_or_ask_for_what_is_not_there(cluster, prometheus):
    address = urllib.parse.urlsplit(cluster.url).netloc

    def leave():
        client = http.client.HTTPConnection(address, timeout=10)
        body = '{"model": "demo", "prompt": "kim : molde ,", "max_tokens": 1500, "ignore_eos": true, "stream": true}'
        client.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        client.getresponse().read(100)
        client.close()

    with Clients(lambda: get(f"{cluster.url}/v1/completions", {"model": "other", "prompt": "a"})):
        prometheus.wait_for("OverfillClientErrors")
    with Clients(leave):
        prometheus.wait_for("OverfillClientsLeave")


def test_overload(cluster, prometheus):
    cluster.load("--concurrency", "220", "--prompt-tokens", "100", "--output-tokens", "500")
    prometheus.wait_for("OverfillQueueGrows", "OverfillQueueWait", "OverfillRefusals", "OverfillDecodeFull", "OverfillKvNearlyFull",
                        "OverfillPreemptions", "OverfillFirstTokensLate", "OverfillTokensLate")


def test_decode_nodes_that_freeze(cluster, prometheus):
    cluster.load("--concurrency", "80", "--prompt-tokens", "100", "--output-tokens", "500")
    first, second = cluster.of("decode")
    until("both nodes decode", lambda: len(prometheus.query('vllm:num_requests_running{component="decode"} > 5')) == 2)
    first.freeze()
    prometheus.wait_for("OverfillProcessSilent", "OverfillNodesDown")
    second.freeze()
    prometheus.wait_for("OverfillMigrations", "OverfillNoNodes", "OverfillRequestsWithoutNodes", "OverfillNoProgress",
                        "OverfillErrors")
    first.thaw()
    second.thaw()
    cluster.calm()
    until(lambda: f"the nodes are back, but {prometheus.active()}", lambda: "OverfillNodesDown" not in prometheus.active())


def test_long_prompts_and_broken_handoffs(cluster, prometheus):
    cluster.load("--concurrency", "160", "--prompt-tokens", "1900", "--output-tokens", "2")
    prometheus.wait_for("OverfillPrefillBehind")
    # The node that has room for many handoffs at a time.
    node = cluster.of("decode")[1]

    def pause():
        node.freeze()
        time.sleep(1.5)
        node.thaw()
        return "OverfillHandoffsSlow" in prometheus.active()

    until("a decode node that pauses makes handoffs slow", pause)
    prometheus.wait_for("OverfillHandoffsSlow")
    node.freeze()
    prometheus.wait_for("OverfillHandoffsFail", "OverfillStrandedBytes")
    node.thaw()


def test_a_router_that_restarts(cluster, prometheus):
    read = lambda: [value for _, value in prometheus.query('process_start_time_seconds{component="router"}')]
    gone = {"OverfillNoRouter", "OverfillNodeWithoutRouter"}
    for _ in range(2):
        # Alerts of the round before would end the wait at once, and a router that starts again within a second
        # has the same start time as the one before: the metric has whole seconds.
        until("the alerts of the round before end", lambda: not gone & prometheus.active())
        before = read()
        cluster.router.kill()
        prometheus.wait_for(*gone)
        cluster.router.start()
        until("the router serves", lambda: cluster.router.answers("/health"))
        until("the new router is scraped", lambda: read() and read() > before)
    prometheus.wait_for("OverfillProcessRestarts")


def test_texts_of_alerts_are_complete(prometheus):
    for alert in prometheus.ask("alerts")["alerts"]:
        for text in alert["annotations"].values():
            assert text and not re.search("<no value>|<error|{{|[$]", text), alert


def test_each_alert_was_caused_and_each_selector_had_data(prometheus):
    assert prometheus.seen == rules.alerts() - set(NOT_CAUSED)
    for rule in rules.rules():
        for selector in rules.selectors(rule["expr"]):
            assert prometheus.query(f"last_over_time({selector}[10m])"), f"{rule}: no data for {selector}"
