"""The chat page in headless Chromium, against a real server without internet."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_tools.corpus.pairs.screens.browser import NAMES
from megavl.serve.page import PAGE, POLICY
from tests.tiny_run import PATIENCE_S
from tests.unit.generate import models
from tests.unit.serve.servers import Server, serving

CHAT = "**/v1/chat/completions"
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
DROP = """([name, type, content]) => {
  const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
  const files = new DataTransfer();
  files.items.add(new File([bytes], name, { type }));
  for (const kind of ["dragenter", "dragover", "drop"]) {
    document.body.dispatchEvent(new DragEvent(kind, { dataTransfer: files, bubbles: true, cancelable: true }));
  }
}"""
PASTE = DROP.replace("DragEvent(kind, { dataTransfer", "ClipboardEvent(kind, { clipboardData").replace(
    '["dragenter", "dragover", "drop"]', '["paste"]'
)


@pytest.fixture(scope="module")
def server(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("served")
    seed = models.TALKATIVE["tiny-hybrid"]
    folder = models.write_folder("tiny-hybrid", root / "tiny", tokenizer=tokenizer_dir, fmt="native", seed=seed)
    with serving(folder, "--name", "<b>tiny</b>", "--max-images", "3") as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    program = next((path for path in map(shutil.which, NAMES) if path), None)
    if program is None:
        pytest.skip("no Chromium on this machine (Debian: apt install chromium)")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        try:
            started = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        except api.Error as error:
            pytest.skip(f"{program} does not start here: {str(error)[:200]}")
        yield started
        started.close()


def shortened(route: Any) -> None:
    """Ask for a short answer, where the page itself asks for any."""
    body = json.loads(route.request.post_data)
    route.continue_(post_data=json.dumps({**body, "max_tokens": 24}))


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """The page on a phone; whatever goes wrong in it fails the test."""
    opened = browser.new_page(viewport={"width": 390, "height": 780})
    opened.set_default_timeout(PATIENCE_S * 1000)
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    expected, own = "Failed to load resource: the server responded with a status of 400", (server.address, "data:")
    opened.on(
        "console",
        lambda line: problems.append(line.text) if line.type == "error" and expected not in line.text else None,
    )
    opened.on("request", lambda asked: None if asked.url.startswith(own) else problems.append(asked.url))
    opened.route(CHAT, shortened)
    opened.goto(server.address)
    yield opened
    opened.close()
    assert problems == []


def ask(page: Any, text: str) -> Any:
    """Send a message and wait for the answer's end; returns the last turn."""
    page.fill("#text", text)
    page.click("#send")
    page.wait_for_selector("#send:visible")
    return page.locator(".turn").last


def test_an_image_is_dropped_pasted_and_asked_about(page: Any, tmp_path: Path) -> None:
    picture = models.write_picture(tmp_path / "a.png", seed=1)
    content = base64.b64encode(picture.read_bytes()).decode()
    page.evaluate(DROP, ["a.png", "image/png", content])
    page.wait_for_selector("#waiting img")
    page.evaluate(PASTE, ["b.png", "image/png", content])
    page.wait_for_selector("#waiting figure:nth-child(2)")
    page.click("#waiting figure:nth-child(2) button")
    page.set_input_files("#files", str(picture))
    page.wait_for_selector("#waiting figure:nth-child(2)")
    answer = ask(page, "which colour?")
    assert "assistant" in answer.get_attribute("class") and answer.locator(".text").inner_text()
    assert page.locator(".turn.user img").count() == 2 and page.locator("#waiting img").count() == 0
    assert page.evaluate("turns.map((turn) => turn.role)") == ["user", "assistant"]
    page.evaluate(DROP, ["c.txt", "text/plain", content[:40]])
    page.locator("#problem", has_text="c.txt cannot be read as an image.").wait_for()


def test_texts_are_never_markup(page: Any) -> None:
    assert page.locator("#name").inner_text() == "<b>tiny</b>" == page.title()
    ask(page, HOSTILE)
    assert page.locator(".turn.user .text").inner_text() == HOSTILE
    page.evaluate("addTurn('assistant', " + repr(HOSTILE) + ", [])")
    assert page.locator("#turns img, #turns script").count() == 0 and page.title() == "<b>tiny</b>"


def test_an_answer_is_stopped_and_a_chat_begun_anew(page: Any) -> None:
    page.unroute(CHAT)
    page.fill("#text", "green or red, and why?")
    page.click("#send")
    page.locator(".turn.assistant .text", has_text=re.compile(r"\S")).wait_for()
    page.click("#stop")
    page.wait_for_selector("#send:visible")
    page.route(CHAT, shortened)
    assert page.locator(".turn.assistant .note").inner_text() == "Stopped."
    ask(page, "green or red, and why?")
    assert page.evaluate("turns.length") == 4
    page.click("#fresh")
    assert page.locator(".turn").count() == 0 and page.locator("#welcome").is_visible()
    assert page.evaluate("turns.length") == 0


def test_a_refused_question_comes_back(page: Any) -> None:
    ask(page, "red " * 9000)
    assert "exceed" in page.locator("#problem").inner_text()
    assert page.input_value("#text").startswith("red red") and page.locator(".turn").count() == 0


def test_a_refused_question_joins_the_next_draft(page: Any, tmp_path: Path) -> None:
    """What is written and chosen while the answer is awaited stays, after what comes back."""
    held: list[Any] = []
    page.unroute(CHAT)
    page.route(CHAT, lambda route: held.append(route))
    picture = models.write_picture(tmp_path / "a.png", seed=1)
    page.set_input_files("#files", str(picture))
    page.wait_for_selector("#waiting img")
    page.fill("#text", "first")
    # Twice in one task of the page: it is sent once.
    page.evaluate("model = null; say(); say()")
    # Not `wait_for_function`, which evaluates text in the page when it has to wait; the policy forbids that.
    while page.evaluate("model === null"):
        page.wait_for_timeout(20)
    page.fill("#text", "and more")
    content = base64.b64encode(picture.read_bytes()).decode()
    page.evaluate(PASTE, ["b.png", "image/png", content])
    page.wait_for_selector("#waiting img")
    while not held:
        page.wait_for_timeout(20)
    held[0].fulfill(status=400, json={"error": {"message": "not today"}})
    page.locator("#problem", has_text="not today").wait_for()
    assert page.input_value("#text") == "first\nand more" and page.locator("#waiting img").count() == 2
    assert len(held) == 1 and page.locator(".turn").count() == 0


def test_it_fits_a_phone(page: Any) -> None:
    ask(page, "x" * 300)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    heights = page.evaluate("[...document.querySelectorAll('button')].map((button) => button.offsetHeight)")
    assert all(height >= 44 for height in heights if height) and any(heights)


def test_the_page_names_nothing_outside() -> None:
    assert "http" not in PAGE and "unsafe" not in POLICY and POLICY.startswith("default-src 'none'")
