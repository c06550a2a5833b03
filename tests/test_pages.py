"""tools/pages.py finds what a reader of the built book could not see; run where there is a browser."""

import shutil
from pathlib import Path

import pytest

from tools.pages import BROWSERS, Browser, look, merged

PROGRAM = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(PROGRAM is None, reason="no Chromium on the PATH")]

STYLE = """
article { width: 600px; max-width: 100%; }
pre, .box { overflow-x: auto; }
figcaption { color: #222; }
html[data-theme=dark] body { background: #111; color: #eee; }
html[data-theme=dark] figcaption { color: #eee; }
"""
LONG = "x" * 200
GOOD = f"""
<pre>short</pre><img src="cat.png" alt="A cat"><div class="box"><table><tr><td>{LONG}</td></tr></table></div>
<figure><figcaption>A caption.</figcaption></figure>
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    assert PROGRAM
    browser = Browser(PROGRAM, str(tmp_path_factory.mktemp("profile")))
    yield browser
    browser.close()


def seen(browser: Browser, folder: Path, body: str, style: str = STYLE) -> list[str]:
    page = folder / "page.html"
    page.write_text(f"<!doctype html><style>{style}</style><body><article>{body}</article>")
    return list(merged(look(browser, page)))


def test_nothing_is_said_of_a_good_page(browser, tmp_path):
    assert seen(browser, tmp_path, GOOD) == []


@pytest.mark.parametrize(
    ("body", "style", "said"),
    [
        (f"<pre>{LONG}</pre>", "", "1280: code is cut by"),
        (f'<div class="cell_output"><pre>{LONG}</pre></div>', "", "1280: output is cut by"),
        (f"<details><pre>{LONG}</pre></details>", "", "1280: code is cut by"),  # unfolded first
        ('<img src="cat.png">', "", "1280: picture without a text: cat.png"),
        (
            '<mjx-container display="true" class="box" style="display: block">' + LONG,
            "",
            "1280: formula is cut by",
        ),
        ('<div style="width: 500px">wide</div>', "", "390: the page is"),
        (
            "<figcaption>A caption.</figcaption>",
            "figcaption { color: #222 !important }",
            "1280 dark: figcaption",
        ),
    ],
)
def test_a_fault_is_named(browser, tmp_path, body, style, said):
    found = seen(browser, tmp_path, GOOD + body, STYLE + style)
    assert found
    assert found[0].startswith(said)
