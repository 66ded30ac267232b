"""What the tests do with the browser."""

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

PATIENCE = 30

# Runs before the page's own scripts.
WATCH = """
window.violations = [];
window.longTasks = [];
document.addEventListener('securitypolicyviolation', (e) => violations.push(`${e.violatedDirective} ${e.blockedURI}`));
new PerformanceObserver((list) => list.getEntries().forEach((e) => longTasks.push(Math.round(e.duration))))
  .observe({ type: 'longtask', buffered: true });
"""


def browser(traced=False):
    """With `traced`, the log "performance" holds the tasks of all threads. That makes everything slower."""
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1440,900"):
        options.add_argument(flag)
    logs = {"browser": "ALL"}
    if traced:
        logs["performance"] = "ALL"
        kinds = "devtools.timeline,disabled-by-default-devtools.timeline"
        options.add_experimental_option("perfLoggingPrefs", {"enableNetwork": False, "enablePage": False, "traceCategories": kinds})
    options.set_capability("goog:loggingPrefs", logs)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService("/usr/bin/chromedriver"))
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
    return driver


def words(text):
    """Text with one space between words: where the browser ends a line is a matter of style."""
    return " ".join(text.split())


class Page:
    """The page of one router. `expected` are parts of console messages that a test causes on purpose."""

    def __init__(self, driver, base):
        self.driver = driver
        self.base = base
        self.key = ""
        self.expected = []
        self.violations = []

    def open(self, view="overview", width=1440, height=900, dark=False, still=False):
        self.resize(width, height)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
                    {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get("about:blank")
        self.driver.get(f"{self.base}/page/#{view}")
        if self.key:
            self.expected.append("401")
            self.until(lambda: self.all("#key") or self.all(".status.good"), "the key dialog or the state")
            if self.all("#key"):
                self.find("#key").send_keys(self.key + Keys.ENTER)
                self.find(".status.good")
        return self

    def resize(self, width, height):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def find(self, selector):
        """Waits until the element is there."""
        return self.until(lambda: next((e for e in self.all(selector) if e.is_displayed()), None), selector)

    def until(self, condition, what="a condition"):
        def met(_):
            try:
                return condition()
            except StaleElementReferenceException:
                return False
        return WebDriverWait(self.driver, PATIENCE, poll_frequency=0.05).until(met, f"waited for {what}")

    def text(self, selector):
        return words(self.find(selector).text)

    def js(self, script, *args):
        return self.driver.execute_script(script, *args)

    def button(self, label):
        return self.until(lambda: next((b for b in self.all("button") if b.is_displayed() and label in (b.text, b.get_attribute("aria-label"))), None), label)

    def fill(self, selector, value):
        field = self.find(selector)
        field.send_keys(Keys.CONTROL + "a")
        field.send_keys(str(value))

    def ask(self, prompt, models=(), max_tokens=32, chat=True):
        """Fills the playground's form and sends it."""
        if not chat:
            self.js("document.querySelectorAll('.segments input')[1].click()")
        self.fill("#prompt", prompt)
        self.find(".choice input")
        for box in self.all(".choice label") if models else []:
            if (box.text.split("\n")[0] in models) != box.find_element(By.TAG_NAME, "input").is_selected():
                box.click()
        self.fill("#max-tokens", max_tokens)
        self.until(lambda: self.button("Send").is_enabled(), "a valid form")
        self.button("Send").click()

    def statuses(self):
        return [e.text for e in self.all(".answer .badge")]

    def ended(self, *statuses):
        self.until(lambda: self.statuses() == list(statuses), f"{statuses}, now {self.statuses()}")

    def faults(self):
        found = [line["message"] for line in self.driver.get_log("browser") if line["level"] in ("SEVERE", "WARNING")]
        unexpected = [m for m in found if not any(part in m for part in self.expected)]
        return unexpected + (self.js("return window.violations ?? []") or [])

    def close(self):
        self.driver.get("about:blank")
        self.driver.get_log("browser")
