"""The overview, in each state of the cluster."""

import pytest
from driver import words
from mock import KEY
from selenium.webdriver.common.keys import Keys


def tile(page, label):
    return page.until(lambda: next((words(t.text.removeprefix(label)) for t in page.all(".tile") if t.text.startswith(label)), None), label)


def node(page, name):
    return page.find(f'[data-node="{name}"]')


@pytest.mark.anywhere
def test_it_loads(page):
    page.open()
    assert page.text(".status").startswith("live")
    assert len(page.all(".tile")) == 6
    assert len(page.all(".chart canvas")) == 2


@pytest.mark.anywhere
def test_only_the_router_is_asked(page):
    page.open()
    page.find(".tiles")
    names = page.js("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert names and all(name.startswith(page.base) for name in names)


@pytest.mark.scenario("none")
def test_without_nodes_it_says_so(page):
    page.open()
    assert tile(page, "Nodes serving") == "0 of 0 none has joined"
    assert [e.text for e in page.all(".lane.empty h3")] == ["prefill", "decode"]
    assert "no node yet" in page.text(".models")
    assert [e.text for e in page.all(".chart .nothing")] == ["No request in the last 15 minutes"] * 2
    page.driver.get(f"{page.base}/page/#playground")
    page.find("#prompt")
    assert "no node yet" in page.text(".choice")


@pytest.mark.scenario("idle")
def test_idle(page):
    page.open()
    assert tile(page, "Nodes serving") == "3 of 3 all well"
    assert tile(page, "Requests running") == "0 0 waiting"
    assert tile(page, "TTFT p50") == "– p95 –"
    assert "No handoff yet" in page.text(".handoffs")


def test_busy(page):
    page.open()
    assert tile(page, "Nodes serving") == "5 of 8 1 draining, 2 away"
    assert tile(page, "Requests running") == "57 26 waiting"
    lanes = [e.text for e in page.all(".lane h3")]
    assert lanes == ["prefill", "decode", "decode half", "decode never reached"]
    assert words(node(page, "prefill-0").text) == (
        "prefill-0 demo-full · bf16 Drain KV cache 68 % of 4,096 Batch 6 / 32 Waiting 3 Queued 18.2k Handoffs 4 Pace 9,200 tok/s")
    assert node(page, "decode-0").find_element("css selector", ".fill.full")
    meter = node(page, "decode-1").find_element("css selector", "[role=meter]")
    assert (meter.get_attribute("aria-valuenow"), meter.get_attribute("aria-valuemax")) == ("1866", "4096")
    assert "8.40 ms/step" in node(page, "decode-1").text
    assert "6.00 MiB of KV are stranded" in node(page, "decode-2").text
    rows = [words(row.text) for row in page.all(".queue tbody tr")]
    assert rows == ["team-search 31 4", "batch 9 22", "team-support 17 0"]


def test_the_reason_of_an_away_node_shows_on_focus(page):
    page.open()
    badge = node(page, "10.0.2.77:50061").find_element("css selector", "button.badge")
    tip = page.js("return document.getElementById(arguments[0].getAttribute('aria-describedby'))", badge)
    assert not tip.is_displayed()
    page.js("arguments[0].focus()", badge)
    assert tip.is_displayed() and "connection refused" in tip.text


def test_handoffs_move_from_prefill_to_decode(page):
    page.open()
    page.until(lambda: page.all(".flows path"), "curves")
    page.until(lambda: page.all(".dots i"), "a dot")
    # A dot goes away when it has arrived, or they would pile up.
    assert page.js("return document.querySelectorAll('.dots i').length") <= 24


def test_nothing_moves_if_the_user_wants_that(page):
    page.open(still=True)
    page.until(lambda: page.all(".flows path"), "curves")
    first = page.text(".handoffs tbody")
    page.until(lambda: page.text(".handoffs tbody") != first, "newer handoffs")
    assert page.all(".dots i") == []


def test_gaps_stay_gaps(page):
    page.open()
    page.find(".chart canvas")
    rows = page.js("""
        const done = import('/page/charts.js');
        return done.then(({ columns }) => columns({ interval_seconds: 5, points: [
            { t: 10, a: 1 }, { t: 15, a: null }, { t: 20, a: 2 }, { t: 40, a: 3 }] }, ['a']));""")
    assert rows == [[10, 15, 20, 25, 40], [1, None, 2, None, 3]]


def test_drain(page, router):
    page.open()
    page.button("Drain decode-1").click()
    dialog = page.find("dialog")
    assert "Drain decode-1?" in dialog.text and "14 running requests" in dialog.text
    page.button("Cancel").click()
    assert router.state.drained == []
    page.button("Drain decode-1").click()
    page.button("Drain node").click()
    page.until(lambda: "draining" in node(page, "decode-1").text, "the new state")
    assert router.state.drained == ["http://10.0.2.61:50061"]
    assert page.all("dialog") == []


def test_drain_of_the_last_node_warns(page):
    page.open()
    page.button("Drain half-0").click()
    assert "last serving decode node of demo-half" in page.text("dialog .warning")


def test_drain_by_keyboard(page):
    page.open()
    button = page.button("Drain decode-0")
    button.send_keys(Keys.ENTER)
    page.find("dialog")
    assert page.driver.switch_to.active_element.text == "Cancel"
    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    page.until(lambda: not page.all("dialog"), "the dialog to close")
    assert page.driver.switch_to.active_element == button


def test_a_refused_drain_shows_the_servers_words(page):
    page.expected = ["404"]
    page.open()
    page.button("Drain prefill-1").click()
    page.button("Drain node").click()
    assert page.text("dialog .error") == "prefill-1: the node refused to drain: it is still loading its model"


@pytest.mark.scenario("keys")
def test_the_key_is_asked_for(page):
    page.expected = ["401"]
    page.open()
    page.find("#key").send_keys("wrong" + Keys.ENTER)
    assert page.text("dialog .error") == "The router refused this key."
    page.fill("#key", KEY)
    page.button("Open").click()
    assert tile(page, "Requests running") == "57 26 waiting"
    assert page.js("return [sessionStorage.length, localStorage.length]") == [1, 0]
    page.driver.refresh()
    page.find(".tiles")
    page.button("Forget key").click()
    page.find("#key")
    assert page.js("return sessionStorage.length") == 0 and page.all(".tiles") == []


def test_a_router_that_went_away(page, router):
    page.expected = ["ERR_"]
    page.open()
    page.find(".tiles")
    router.cut.set()
    assert page.text(".banner") == "The router does not answer. The values below are old."
    router.cut.clear()
    page.until(lambda: not page.all(".banner"), "the banner to go")


@pytest.mark.scenario("many")
def test_many_nodes(page):
    page.open()
    page.find(".node")
    assert len(page.all(".node")) == 48
