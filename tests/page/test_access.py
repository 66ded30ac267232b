"""Names, contrast, keyboard and narrow screens."""

import pytest
from selenium.webdriver.common.keys import Keys

# Roles that a screen reader announces by name.
NAMED = {"button", "link", "textbox", "checkbox", "radio", "spinbutton", "meter", "dialog", "image", "img", "region",
         "navigation", "article", "figure", "list box", "combobox"}

# The lowest contrast of visible text to what is behind it, after WCAG.
CONTRAST = """
const parse = (color) => {
  const [r, g, b, a = 1] = color.match(/[\\d.]+/g).map(Number);
  return [r, g, b, a];
};
const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
const behind = (element) => {
  const layers = [];
  for (let e = element; e; e = e.parentElement) {
    const color = parse(getComputedStyle(e).backgroundColor);
    layers.push(color);
    if (color[3] === 1) break;
  }
  return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
};
const luminance = (color) => {
  const [r, g, b] = color.map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const faults = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !element.checkVisibility({ visibilityProperty: true })) continue;
  if (element.closest('noscript, :disabled, .hidden')) continue;
  const style = getComputedStyle(element);
  const back = behind(element);
  const [light, dark] = [luminance(over(parse(style.color), back)), luminance(back)].sort((a, b) => b - a);
  const ratio = (light + 0.05) / (dark + 0.05);
  const large = parseFloat(style.fontSize) >= 24 || (parseFloat(style.fontSize) >= 18.66 && style.fontWeight >= 700);
  if (ratio < (large ? 3 : 4.5)) faults.push(`${walker.currentNode.data.trim()} ${style.color} ${ratio.toFixed(2)}`);
}
return [...new Set(faults)];
"""


def show(page, view, **how):
    page.open(view, **how)
    if view == "playground":
        page.find(".choice input")
        served = [e.text for e in page.all(".choice label") if "no node yet" not in e.text][:3]
        page.ask("Hello", models=served, max_tokens=30)
        page.ended(*["done"] * len(served))
        page.until(lambda: len(page.all(".waterfall")) == len(served), "the legs")
    else:
        page.find(".node")


@pytest.mark.anywhere
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("view", ["overview", "playground"])
def test_contrast(page, view, dark):
    show(page, view, dark=dark)
    assert page.js(CONTRAST) == []


def test_contrast_of_dialogs(page):
    for dark in (False, True):
        show(page, "overview", dark=dark)
        page.button("Drain half-0").click()
        page.find("dialog .warning")
        assert page.js(CONTRAST) == []


@pytest.mark.anywhere
@pytest.mark.parametrize("view", ["overview", "playground"])
def test_everything_has_a_name(page, view):
    show(page, view)
    page.driver.execute_cdp_cmd("Accessibility.enable", {})
    nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    page.driver.execute_cdp_cmd("Accessibility.disable", {})
    nameless = [n["role"]["value"] for n in nodes if not n.get("ignored") and n["role"]["value"] in NAMED
                and not n.get("name", {}).get("value", "").strip()]
    assert [role for role in nameless if role != "figure"] == []
    assert any(n["role"]["value"] == "button" for n in nodes)


@pytest.mark.anywhere
@pytest.mark.parametrize("view", ["overview", "playground"])
def test_structure(page, view):
    show(page, view)
    levels = page.js("""return [...document.querySelectorAll('h1, h2, h3')].filter((h) => h.checkVisibility())
        .map((h) => Number(h.tagName[1]))""")
    assert levels.count(1) == 1
    ids = page.js("return [...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    broken = page.js("""return [...document.querySelectorAll('[aria-describedby], [aria-labelledby], label[for]')].filter((e) =>
        !document.getElementById(e.getAttribute('aria-describedby') ?? e.getAttribute('aria-labelledby') ?? e.htmlFor)).length""")
    assert broken == 0
    assert page.js("return document.documentElement.lang") == "en"


def test_every_control_is_reached_by_tab(page):
    show(page, "overview")
    wanted = page.js("return document.querySelectorAll('a, button:enabled').length")
    reached = set()
    page.js("document.activeElement.blur()")
    for _ in range(wanted + 2):
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
        reached.add(page.js("const e = document.activeElement; return e.ariaLabel || e.textContent + e.getAttribute('aria-describedby')"))
        outline = page.js("return getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or page.js("return document.activeElement === document.body")
    assert {"Drain prefill-0", "Drain decode-0", "Drain half-0"} <= reached


def test_the_form_is_sent_by_keyboard(page):
    page.open("playground")
    page.find(".choice input")
    page.find("#prompt").send_keys("Hello" + Keys.CONTROL + Keys.ENTER)
    page.until(lambda: page.statuses() and page.statuses() != ["waiting"], "an answer")
    page.ended("done")


@pytest.mark.anywhere
@pytest.mark.parametrize("width", [360, 390, 768, 1024, 1440])
@pytest.mark.parametrize("view", ["overview", "playground"])
def test_nothing_is_wider_than_the_screen(page, view, width):
    show(page, view, width=width)
    # Curves and dots are drawn over the page, and must not make it wider either.
    assert page.js("return document.documentElement.scrollWidth") <= width
    assert cut_texts(page) == []
    # The widest font of those that systems use.
    page.js("document.documentElement.style.setProperty('--font', '\"DejaVu Sans\"')")
    assert cut_texts(page) == []


def cut_texts(page):
    return page.js("""return [...document.querySelectorAll('.tile b, .meter, .node .value, .speed dd, button, .badge')].filter((e) =>
        e.checkVisibility() && e.scrollWidth > e.clientWidth + 1).map((e) => e.textContent)""")
