"""20,000 tokens in one answer."""

import json
from collections import Counter, defaultdict

import pytest

TOKENS = 20_000
# Counts what each frame changes in the text. That does not depend on how fast the machine is.
COUNT = """
window.perFrame = [];
let changes = 0;
const text = document.querySelector('.answers');
new MutationObserver((list) => {
  changes += list.filter((one) => one.target.parentElement?.closest('.text, .text *')).length;
}).observe(text, { childList: true, characterData: true, subtree: true });
(function frame() { perFrame.push(changes); changes = 0; requestAnimationFrame(frame); })();
window.longTasks.length = 0;
"""
TASK_LIMIT_US = 50_000


def tasks(driver):
    """Processor times in microseconds of the tasks on the page's main thread, longest first. Other programs do not count.

    The page's thread is the one that runs animation frames: the browser has pages of its own."""
    times, frames = defaultdict(list), Counter()
    for entry in driver.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        event = message.get("params", {})
        if message["method"] != "Tracing.dataCollected":
            continue
        thread = (event.get("pid"), event.get("tid"))
        if event.get("name") == "RunTask":
            times[thread].append(event.get("tdur", 0))
        elif event.get("name") == "FireAnimationFrame":
            frames[thread] += 1
    return sorted(times[max(frames, key=frames.get)], reverse=True) if frames else []


@pytest.mark.parametrize("prompt", ["in lines", "one paragraph"])
@pytest.mark.scenario("busy", 2000.0)
def test_it_stays_smooth(traced_page, prompt):
    page = traced_page
    page.open("playground")
    page.find(".choice input")
    page.js(COUNT)
    page.ask(prompt, max_tokens=TOKENS)
    page.until(lambda: page.statuses() == ["done"], "the end")
    text, blocks, spans, longest = page.js("""
        const text = document.querySelector('.text');
        return [text.textContent.length, text.childNodes.length, text.querySelectorAll('span').length,
                Math.max(...[...text.childNodes].map((block) => block.textContent.length))];""")
    assert text > 4 * TOKENS
    assert "20,000" in page.text(".speed")
    # A span has about 1,000 characters, and the blocks' ends cut some short.
    assert spans <= text / 1024 + 2 * blocks + 2
    # Layout stays within a block.
    assert longest <= 8192
    # A frame appends to a few nodes, however many tokens have come.
    frames = page.js("return window.perFrame")
    assert sum(frames) > 0 and max(frames) <= 64
    times = tasks(page.driver)
    print(f"{prompt}: {len(times)} tasks, longest {times[:3]} us of processor time, above 50 ms of wall time: {page.js('return longTasks')}")
    # Fewer tasks than this would mean that the trace missed the stream.
    assert len(times) > 100
    assert times[0] <= TASK_LIMIT_US


@pytest.mark.scenario("busy", 4000.0)
def test_scrolling_up_stops_the_following(page):
    page.open("playground")
    page.ask("in lines", max_tokens=90_000)
    page.until(lambda: page.js("return document.querySelector('.text')?.scrollTop") > 500, "a long text")
    page.js("document.querySelector('.text').scrollTop = 100")
    before = page.js("return document.querySelector('.text').textContent.length")
    page.until(lambda: page.js("return document.querySelector('.text').textContent.length") > before + 5000, "more text")
    assert page.js("return document.querySelector('.text').scrollTop") == 100
    page.button("Stop").click()


@pytest.mark.scenario("busy", 4000.0)
def test_a_copy_of_the_text_is_exact(page):
    page.open("playground")
    page.ask("one paragraph", max_tokens=6000)
    page.ended("done")
    same = page.js("""
        const text = document.querySelector('.text');
        getSelection().selectAllChildren(text);
        const data = new DataTransfer();
        text.dispatchEvent(new ClipboardEvent('copy', { clipboardData: data, bubbles: true, cancelable: true }));
        return [text.childNodes.length > 3, data.getData('text/plain') === text.textContent, text.textContent.includes('\\n')];""")
    assert same == [True, True, False]
