"""The playground: streams, colours, legs, copies and errors."""

import json
import subprocess
import sys

import pytest
from driver import words


def copied(page, label):
    """What a copy button puts into the clipboard."""
    page.js("""navigator.clipboard.writeText = (text) => { window.copiedText = text; return Promise.resolve(); };
               window.copiedText = '';""")
    page.button(label).click()
    page.until(lambda: page.js("return window.copiedText"), "the copy")
    return page.js("return window.copiedText")


@pytest.mark.anywhere
def test_an_answer(page):
    page.open("playground")
    page.ask("Say something", max_tokens=16)
    page.until(lambda: page.statuses()[0] == "done", "the end")
    assert page.js("return document.querySelector('.text').textContent.length") > 0
    legend = page.text(".answer .keys")
    assert legend.startswith("prefill") and "1 token" in legend
    legs = [row.text for row in page.all(".waterfall tbody th")]
    assert legs == ["tokenize", "queue", "reserve", "prefill queue", "prefill", "handoff", "first decode step", "decode"]


def test_tokens_are_coloured_by_their_maker(page, router):
    page.open("playground")
    page.ask("Hello", max_tokens=300)
    page.ended("done")
    spans = page.js("return [...document.querySelectorAll('.text span')].map((s) => [s.className, s.textContent])")
    assert spans[0] == ["made made-prefill-0", "Well"]
    assert {css for css, _ in spans[1:]} == {"made made-decode-0"}
    # A span is a run, not a token.
    assert len(spans) <= 4
    assert page.text(".answer .keys") == "prefill demo-full 1 token decode demo 299 tokens"
    assert router.requests[0]["messages"] == [{"role": "user", "content": "Hello"}]
    assert router.requests[0]["stream_options"] == {"include_usage": True, "include_overfill": True}


def test_the_form_is_what_is_sent(page, router):
    page.open("playground")
    page.fill("#temperature", "0.3")
    page.fill("#seed", "77")
    page.ask("Once", max_tokens=5, chat=False)
    page.ended("done")
    body = router.requests[0]
    assert (body["prompt"], body["temperature"], body["seed"], body["max_tokens"]) == ("Once", 0.3, 77, 5)
    assert "messages" not in body


@pytest.mark.scenario("busy", 60.0)
def test_speed_shows_while_streaming(page):
    page.open("playground")
    page.ask("Hello", max_tokens=100_000)
    page.until(lambda: page.statuses() == ["streaming"], "the stream")
    numbers = page.until(lambda: (n := page.find(".speed").text.split("\n"))[1] != "–" and n[3] != "–" and n, "numbers")
    assert numbers[::2] == ["Tokens/s", "TTFT", "ITL", "Tokens", "Time"]
    page.button("Stop").click()
    page.ended("stopped")


def test_stop_ends_the_request(page, router):
    page.open("playground")
    page.ask("Hello", max_tokens=100_000)
    page.until(lambda: page.statuses() == ["streaming"], "the stream")
    page.button("Stop demo").click()
    page.ended("stopped")
    assert router.stopped.wait(20)
    assert page.button("Send").is_enabled()
    assert page.all(".answer .error") == []


def test_waterfall(page):
    page.open("playground")
    page.ask("Hello", max_tokens=64)
    page.ended("done")
    rows = {row.find_element("css selector", "th").text.split("\n")[0]: words(row.text) for row in page.all(".waterfall tbody tr")}
    assert rows["queue"] == "queue router 4.00 ms"
    assert rows["prefill"].startswith("prefill prefill-0 90")
    assert rows["handoff"] == "handoff prefill-0 → decode-1 3.80 ms"
    facts = page.text(".facts")
    assert "4.50 MiB in 31.0 ms" in facts and "Cached tokens, prefill 16" in facts
    # Each bar begins where the one before it ends, and the last one ends at the right.
    ends = page.js("""return [...document.querySelectorAll('.bar:not(.overlap)')].map((bar) =>
        [parseFloat(bar.style.left), parseFloat(bar.style.width)])""")
    for (left, width), (following, _) in zip(ends, ends[1:]):
        assert left + width == pytest.approx(following, abs=0.01)
    assert sum(ends[-1]) == pytest.approx(100, abs=0.01)
    page.js("document.querySelector('.waterfall input').click()")
    page.until(lambda: len(page.all(".waterfall tbody tr")) == 7, "the legs without decode")


def test_side_by_side(page, router):
    page.open("playground")
    page.ask("Hello", models=("demo", "demo-half", "demo-full"), max_tokens=50)
    page.ended("done", "done", "done")
    assert [e.text for e in page.all(".answer h3")] == ["demo", "demo-half", "demo-full"]
    assert {(r["seed"], r["messages"][0]["content"]) for r in router.requests} == {(1, "Hello")}
    colours = page.js("""return [...document.querySelectorAll('.text')].map((text) =>
        getComputedStyle(text.querySelector('span:last-of-type')).color)""")
    assert len(set(colours)) == 3
    tops = {e.rect["y"] for e in page.all(".answer")}
    assert len(tops) == 1


def test_a_second_request_replaces_the_first(page, router):
    page.open("playground")
    page.ask("Hello", max_tokens=20)
    page.ended("done")
    page.fill("#seed", 2)
    page.button("Send").click()
    page.until(lambda: len(router.requests) == 2, "the second request")
    page.ended("done")
    assert len(page.all(".answer")) == 1


def test_the_stream_goes_on_behind_the_overview(page):
    page.open("playground")
    page.ask("Hello", max_tokens=300)
    page.until(lambda: page.statuses() == ["streaming"], "the stream")
    page.js("location.hash = '#overview'")
    page.find(".tiles")
    page.js("location.hash = '#playground'")
    page.find(".answer")
    page.ended("done")


def test_an_error_at_once(page):
    page.expected = ["400"]
    page.open("playground")
    page.ask("Hello", max_tokens=200_000)
    page.ended("failed")
    assert page.text(".answer .error") == "max_tokens: 200000 tokens, maximum is 4096"


def test_an_error_in_the_stream(page):
    page.open("playground")
    page.ask("fail late", max_tokens=40)
    page.ended("failed")
    assert page.text(".answer .error") == "decode-1: no node could take over the request"
    assert page.js("return document.querySelector('.text').textContent").startswith("Well")


def test_copy_as_curl(page, router):
    page.open("playground")
    page.fill("#prompt", "it's \"quoted\" $HOME\n2nd line")
    page.find(".choice input")
    command = copied(page, "Copy as curl")
    output = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60).stdout
    assert router.requests[0]["messages"][0]["content"] == "it's \"quoted\" $HOME\n2nd line"
    last = [line for line in output.splitlines() if line.startswith("data: {")][-1]
    assert json.loads(last.removeprefix("data: "))["overfill"]["timings"]["legs"]


@pytest.mark.parametrize("chat", [True, False])
def test_copy_as_python(page, router, chat):
    page.open("playground")
    if not chat:
        page.js("document.querySelectorAll('.segments input')[1].click()")
    page.fill("#prompt", "it's \"quoted\" \\ é\n2nd line")
    page.fill("#max-tokens", 3)
    page.find(".choice input")
    program = copied(page, "Copy as Python")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("Well"), done.stderr
    sent = router.requests[0]
    assert (sent["messages"][0]["content"] if chat else sent["prompt"]) == "it's \"quoted\" \\ é\n2nd line"


def test_copy_without_the_clipboard_api(page):
    """A page over plain http from another machine has none."""
    page.open("playground")
    page.fill("#prompt", "Hello")
    page.find(".choice input")
    page.js("""Object.defineProperty(window, 'isSecureContext', { value: false });
               document.addEventListener('copy', () => { window.copiedText = document.activeElement.value; });""")
    page.button("Copy as curl").click()
    assert page.until(lambda: page.js("return window.copiedText"), "the copy").startswith("curl -N ")
    page.until(lambda: "Copied as curl" in page.text(".copy"), "the confirmation")


@pytest.mark.scenario("keys")
def test_a_copy_never_has_the_key(page):
    page.key = "a-key-of-the-mock"
    page.open("playground")
    page.fill("#prompt", "Hello")
    page.find(".choice input")
    for label in ("Copy as curl", "Copy as Python"):
        text = copied(page, label)
        assert "OVERFILL_API_KEY" in text and page.key not in text
