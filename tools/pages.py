"""Open every page of the built book in a browser and say what a reader could not see.

    python tools/pages.py                        # _build/html, with the Chromium on the PATH
    python tools/pages.py FOLDER --browser PATH  # another folder, another Chromium or Chrome

Each page is looked at in four ways: 1280 and 390 pixels wide, light and dark. Named are code and formulas
whose end is cut off, pages that scroll sideways on a phone, pictures without a text, and captions too close
in colour to what is behind them. It needs a browser, so no test of the book runs it; `make pages` does.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HTML = Path(__file__).parents[1] / "_build" / "html"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDE, NARROW = 1280, 390  # pixels: a laptop, a phone
CONTRAST = 4.5  # for text of this size: Web Content Accessibility Guidelines 2.2, success criterion 1.4.3

# What is wrong with the page as it stands: a list of lines. A pixel more or less is rounding.
LOOK = """
(({wide, contrast}) => {
  const said = [], article = document.querySelector("article, main") || document.body;
  const name = (node) => (node.textContent || "").trim().replace(/\\s+/g, " ").slice(0, 60);
  const seen = (node) => node.getClientRects().length > 0;
  const over = (node) => node.scrollWidth - node.clientWidth;
  const scrolls = (node) => ["auto", "scroll"].includes(getComputedStyle(node).overflowX);
  const page = document.scrollingElement;
  if (over(page) > 1) said.push(`the page is ${over(page)} px wider than the screen`);
  if (wide) {
    for (const pre of article.querySelectorAll("pre")) {
      if (!seen(pre) || over(pre) <= 1) continue;
      const line = [...pre.textContent.split("\\n")].reduce((a, b) => (b.length > a.length ? b : a), "");
      const kind = pre.closest(".cell_output") ? "output" : "code";
      said.push(`${kind} is cut by ${over(pre)} px: ${line.trim().slice(0, 60)}`);
    }
  }
  const edge = article.getBoundingClientRect().right;
  for (const box of article.querySelectorAll("mjx-container, table, div.math")) {
    if (!seen(box)) continue;
    let inner = false;  // in something that scrolls: the reader can reach it
    for (let node = box; node !== article; node = node.parentElement) inner = inner || scrolls(node);
    const kind = box.tagName === "TABLE" ? "table" : "formula";
    if (kind === "formula" && wide && box.getAttribute("display") === "true" && over(box) > 1) {
      said.push(`formula is cut by ${over(box)} px: ${name(box) || box.getAttribute("aria-label") || "?"}`);
    } else if (!inner && box.getBoundingClientRect().right > edge + 1) {
      const near = name(box.tagName === "TABLE" ? box : box.parentElement);
      said.push(`${kind} stands ${Math.round(box.getBoundingClientRect().right - edge)} px out: ${near}`);
    }
  }
  for (const picture of document.querySelectorAll("img")) {
    const text = picture.getAttribute("alt");  // "" says that a picture is decoration; in an article none is
    if (seen(picture) && (text === null || (article.contains(picture) && !text.trim()))) {
      said.push(`picture without a text: ${picture.getAttribute("src").slice(0, 60)}`);
    }
  }
  const colour = (text) => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((c) => c / 255)
    .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  for (const text of article.querySelectorAll("figcaption, td, th, pre")) {
    if (!seen(text)) continue;
    let behind = text, back = [255, 255, 255];
    for (; behind; behind = behind.parentElement) {
      const found = colour(getComputedStyle(behind).backgroundColor);
      if (found.length < 4 || found[3] === 1) { back = found; break; }
    }
    const [a, b] = [light(colour(getComputedStyle(text).color)), light(back)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio >= contrast) continue;
    said.push(`${text.tagName.toLowerCase()} has a contrast of ${ratio.toFixed(1)}: ${name(text)}`);
  }
  return said;
})
"""
# Formulas are set by a script; before that there is nothing to measure.
READY = """
new Promise(async (done) => {
  if (document.readyState !== "complete") await new Promise((go) => addEventListener("load", go));
  if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
  for (const fold of document.querySelectorAll("details")) fold.open = true;
  document.querySelectorAll("img[loading=lazy]").forEach((picture) => (picture.loading = "eager"));
  requestAnimationFrame(() => requestAnimationFrame(() => done(document.title)));
})
"""

# Chromium reads commands from file descriptor 3 and writes answers to 4: this puts our pipes there.
LAUNCH = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for place, pipe in enumerate(pipes, 3):
    os.dup2(pipe, place)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """Headless Chromium, driven through a pair of pipes by its DevTools protocol."""

    def __init__(self, program: str, profile: str):
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        launch = [sys.executable, "-c", LAUNCH, str(to_browser), str(from_browser)]
        options = ["--headless", "--remote-debugging-pipe", "--hide-scrollbars", f"--user-data-dir={profile}"]
        if os.geteuid() == 0:
            options.append("--no-sandbox")  # it starts for root in no other way
        self._process = subprocess.Popen(
            [*launch, program, *options, "about:blank"],
            pass_fds=(to_browser, from_browser),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._rest, self._number = b"", 0
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method: str, **parameters: Any) -> Any:
        """Send a command and return its result.

        Raises:
            RuntimeError: the browser refuses, or is gone.
        """
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:  # events come in between
            while b"\0" not in self._rest:
                if not (more := os.read(self._in, 1 << 16)):
                    raise RuntimeError("the browser is gone: does it start with --headless?")
                self._rest += more
            line, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, waited for if it is a promise."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description", "a script failed"))
        return answer["result"].get("value")

    def resize(self, width: int) -> None:
        """A window of this many pixels across."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
        )

    def close(self) -> None:
        """End the browser."""
        os.close(self._out)
        os.close(self._in)
        self._process.terminate()
        self._process.wait()


def look(browser: Browser, page: Path) -> Iterator[str]:
    """What is wrong with a page: one line each, with the width and the colours in which it is seen."""
    browser.resize(WIDE)
    browser.call("Page.navigate", url=page.resolve().as_uri())
    browser.run(READY)
    for width in (WIDE, NARROW):
        browser.resize(width)
        for theme in ("light", "dark"):
            browser.run(f"document.documentElement.dataset.theme = {json.dumps(theme)}")
            settings = json.dumps({"wide": width == WIDE, "contrast": CONTRAST})
            for line in browser.run(f"{LOOK}({settings})"):
                yield f"{width} {theme}: {line}"


def merged(lines: Iterator[str]) -> Iterator[str]:
    """What is seen in both themes is said once."""
    found = list(lines)
    for line in found:
        view, _, rest = line.partition(": ")
        width, theme = view.split()
        if f"{width} {'dark' if theme == 'light' else 'light'}: {rest}" not in found:
            yield line
        elif theme == "light":
            yield f"{width}: {rest}"


def main() -> int:
    """The command line: exit status 0 when every page can be seen whole, 1 otherwise."""
    parser = argparse.ArgumentParser(description="Look at every page of the built book in a browser.")
    parser.add_argument("folder", nargs="?", type=Path, default=HTML, help="default: _build/html")
    parser.add_argument("--browser", help=f"default: the first of {', '.join(BROWSERS)} on the PATH")
    arguments = parser.parse_args()
    pages = sorted(p for p in arguments.folder.rglob("*.html") if "_static" not in p.parts)
    pages = [page for page in pages if 'http-equiv="Refresh"' not in page.read_text()]  # only leads on
    if not pages:
        parser.error(f"no pages in {arguments.folder}: run `make book` first")
    names = [arguments.browser] if arguments.browser else BROWSERS
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        parser.error(
            f"there is no {' or '.join(names)} on the PATH: install one, or name its file with --browser"
        )
    count = 0
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(program, profile)
        try:
            for page in pages:
                for line in merged(look(browser, page)):
                    count += 1
                    print(f"{page.relative_to(arguments.folder)}  {line}", flush=True)
        finally:
            browser.close()
    print(f"{len(pages)} pages, {count} findings")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
