"""The page: its policy as text, and the page itself in headless Chromium over a server that plays recorded events."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from redrafter.params import SamplingParams
from redrafter.server import page as server_page
from redrafter.server.page import page
from tests.server.page_server import STEPS, TREE, Play, playing
from tests.server.serving import SHAPE, running, tiny_llm

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 360, "height": 740}
EVIL = '<script>window.owned = 1</script><img src="x" onerror="window.owned = 2">'


def test_the_page_is_one_text_that_asks_nobody_else() -> None:
    html, policy = page()
    assert html.count("<script") == html.count("<style") == 1
    assert not re.search(r"""(src|href)=["'](?!data:,|#)""", html)
    assert "http://" not in html.replace("http://www.w3.org/2000/svg", "") and "https://" not in html
    for unsafe in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "Storage",
        "document.cookie",
    ):
        assert unsafe not in html
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy and "*" not in policy and "connect-src 'self'" in policy


def test_its_files_keep_the_house_ceilings() -> None:
    folder = Path(server_page.__file__).parent
    sources = [path for path in folder.iterdir() if path.suffix in (".html", ".css", ".js")]
    assert {path.name for path in sources} == {"page.html", "page.css", *server_page.SCRIPTS}
    for path in sources:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 400 and max(map(len, lines)) <= 120, path.name


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[browser]'")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium on the PATH: apt-get install chromium")
    with api.sync_playwright() as playwright:
        # Root in a container has no sandbox to give; the page is our own and the network is this machine.
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def expect(browser) -> Callable[..., Any]:
    from playwright.sync_api import expect

    expect.set_options(timeout=20_000)  # a busy machine is no failure
    return expect


@pytest.fixture
def play() -> Iterator[Play]:
    with playing(Play()) as play:
        yield play


@pytest.fixture
def visit(browser, play: Play) -> Iterator[Callable[..., Any]]:
    """Open the page; at the end nothing may have gone wrong in it, and nobody else may have been asked."""
    opened = []
    wrong: list[str] = []

    def visit(**settings: Any) -> Any:
        context = browser.new_context(viewport=DESKTOP, **settings) if "viewport" not in settings else None
        context = context or browser.new_context(**settings)
        opened.append(context)
        context.set_default_timeout(10_000)
        tab = context.new_page()
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("console", lambda m: wrong.append(m.text) if "Content Security Policy" in m.text else None)
        tab.on("request", lambda r: None if r.url.startswith((play.url, "data:,")) else wrong.append(r.url))
        tab.goto(play.url)
        return tab

    yield visit
    for context in opened:
        context.close()
    assert wrong == []


def ask(tab: Any, question: str = "why?") -> None:
    tab.fill("#prompt", question)
    tab.press("#prompt", "Enter")


def test_an_answer_is_coloured_counted_and_its_tree_drawn(visit, play: Play, expect) -> None:
    play.delay = 0.02
    tab = visit()
    expect(tab.locator("#model")).to_have_text("tiny, drafter tiny-drafter")
    ask(tab)
    answer = tab.locator(".turn .text").last
    expect(answer).to_have_text("The sky is blue today.")
    assert tab.locator(".turn .drafted").all_text_contents() == [" is", " blue"]
    assert tab.locator(".turn .own").all_text_contents() == ["The", " sky", " today", "."]
    expect(tab.locator("#tokens")).to_have_text("6")
    expect(tab.locator("#per-step")).to_have_text("1.50")
    expect(tab.locator("#rate")).to_have_text(re.compile(r"^\d+\.\d$"))
    expect(tab.locator("#announce")).to_have_text("The sky is blue today.")
    assert tab.locator("#tree .node").count() == len(TREE["tokens"])
    assert tab.locator("#tree .node.accepted text").all_text_contents() == ["·is", "·blue"]
    assert tab.locator("#tree path.accepted").count() == 2
    expect(tab.locator("#tree")).to_have_attribute("aria-label", "tree of 7 nodes; the model agreed to 2:  is blue")
    tab.locator("#tree .node").nth(2).hover()
    expect(tab.locator("#node")).to_have_text("“·looks”: drafted token 1, not taken")


def test_drafted_tokens_differ_without_colour_and_the_marks_can_go(visit, expect) -> None:
    tab = visit()
    ask(tab)
    drafted, own = tab.locator(".turn .drafted").first, tab.locator(".turn .own").first
    expect(drafted).to_have_css("text-decoration-line", "underline")
    expect(own).to_have_css("text-decoration-line", "none")
    colours = {e.evaluate("e => getComputedStyle(e).color") for e in (drafted, own)}
    assert len(colours) == 2
    tab.uncheck("#marked")
    expect(drafted).to_have_css("text-decoration-line", "none")


def test_turns_settings_and_the_system_prompt_are_sent(visit, play: Play, expect) -> None:
    tab = visit()
    for field, value in {"system": "be brief", "temperature": "0.5", "seed": "7", "max-tokens": "40"}.items():
        tab.fill(f"#{field}", value)
    ask(tab, "one")
    expect(tab.locator("#send")).to_be_enabled()
    tab.uncheck("#speculation")
    ask(tab, "two")
    expect(tab.locator("#per-step")).to_have_text("1.00")
    first, second = play.asked
    assert (first["temperature"], first["seed"], first["max_tokens"], first["speculation"]) == (0.5, 7, 40, True)
    assert (first["model"], first["stream_options"]) == ("tiny", {"include_usage": True})
    roles = [(m["role"], m["content"]) for m in second["messages"]]
    assert roles[:2] == [("system", "be brief"), ("user", "one")] and roles[3] == ("user", "two")
    assert roles[2] == ("assistant", "The sky is blue today.") and second["speculation"] is False
    tab.click("#reset")
    expect(tab.locator(".turn")).to_have_count(0)


def test_the_keyboard_is_enough(visit, play: Play, expect) -> None:
    play.delay = 0.3
    tab = visit()
    expect(tab.locator("#prompt")).to_be_focused()
    tab.keyboard.type("line one")
    tab.keyboard.press("Shift+Enter")
    tab.keyboard.type("line two")
    tab.keyboard.press("Enter")
    expect(tab.locator("#stop")).to_be_enabled()
    expect(tab.locator(".turn .own").first).to_be_visible()
    tab.keyboard.press("Escape")
    expect(tab.locator("#send")).to_be_enabled()
    expect(tab.locator(".note")).to_have_text("not finished")
    assert play.asked[0]["messages"][0]["content"] == "line one\nline two"
    play.delay = 0.0
    tab.keyboard.type("again")
    tab.keyboard.press("Enter")
    expect(tab.locator("#tokens")).to_have_text("6")
    order = []
    for _ in range(12):
        tab.keyboard.press("Tab")
        order.append(tab.evaluate("document.activeElement.id || document.activeElement.getAttribute('class')"))
    expected = ["send", "reset", "speculation", "system", "temperature", "seed", "max-tokens", "key", "node root"]
    assert [name for name in order if name in {*expected, "race-prompt"}] == [*expected, "race-prompt"]
    tab.locator("#tree .root").focus()
    for key, token in (("ArrowRight", "·is"), ("ArrowRight", "·blue"), ("ArrowDown", "·clear"), ("ArrowLeft", "·is")):
        tab.keyboard.press(key)
        expect(tab.locator("#node")).to_contain_text(f"“{token}”: drafted token")


def test_stop_closes_the_connection_and_the_part_stays(visit, play: Play, expect) -> None:
    play.steps, play.delay = [([("x", False)], None)] * 100, 0.05
    tab = visit()
    ask(tab)
    expect(tab.locator(".turn .own").nth(1)).to_be_visible()
    tab.click("#stop")
    expect(tab.locator("#send")).to_be_enabled()
    for _ in range(200):  # the server notices when it writes next
        if play.disconnects:
            break
        tab.wait_for_timeout(50)
    play.delay, play.steps = 0.0, STEPS
    ask(tab, "more")
    expect(tab.locator(".turn .text").last).to_have_text("The sky is blue today.")
    assert re.fullmatch("x{2,99}", play.asked[1]["messages"][1]["content"])
    assert play.disconnects == 1


def test_a_race_runs_both_ways_one_after_the_other(visit, play: Play, expect) -> None:
    play.delay = play.plain_delay = 0.04
    tab = visit()
    tab.click("#race-start")
    result = tab.locator("#race-result")
    expect(result).to_contain_text("The answers are equal, character for character.")
    ratio, fast, slow = map(float, re.findall(r"\d+\.\d+", result.inner_text()))
    assert fast > 0 and slow > 0 and ratio == pytest.approx(fast / slow, abs=0.03)
    bars = [tab.locator(f"#bar-{lane}").evaluate("e => e.value / e.max") for lane in ("drafted", "plain")]
    assert max(bars) == 1.0 and bars[0] / bars[1] == pytest.approx(ratio, abs=0.01)
    assert [asked["speculation"] for asked in play.asked] == [False, True]
    assert "6 tokens" in tab.inner_text("#lane-plain") and "1.50 tokens per step" in tab.inner_text("#lane-drafted")
    play.plain_text = "The sky is grey"
    tab.click("#race-start")
    expect(result).to_contain_text("The answers differ from character 12 on")
    assert [asked["speculation"] for asked in play.asked[2:]] == [True, False]


def test_what_the_model_says_is_never_markup(visit, play: Play, expect) -> None:
    tree = {"tokens": ["a", EVIL], "parent": [-1, 0], "accepted": [0, 1]}
    play.steps = [([(EVIL, True), (EVIL, False)], tree)]
    tab = visit()
    ask(tab, EVIL)
    expect(tab.locator(".turn .text").last).to_have_text(EVIL * 2)
    tab.click("#race-start")
    expect(tab.locator("#race-result")).not_to_be_empty()
    assert tab.locator("img").count() == 0 and tab.locator("body script").count() == 1
    assert tab.evaluate("window.owned") is None


REFUSALS = [
    ({"status": 503, "headers": {"Retry-After": "3"}}, "The server is busy: try again in 3 s."),
    ({"status": 429, "headers": {}}, "Too many requests with this key: try again soon."),
    ({"status": 400, "words": f"seed: {EVIL}"}, f"The server answered 400: seed: {EVIL}"),
    ({"status": 200, "steps": [], "break_off": True}, "The connection ended before the answer did."),
    ({"last": {"error": {"message": "no memory"}}}, "The server broke the answer off: no memory"),
]


def test_an_error_is_said_and_the_question_comes_back(visit, play: Play, expect) -> None:
    tab = visit()
    expect(tab.locator("#error")).to_have_attribute("role", "alert")
    for settings, says in REFUSALS:
        for name, value in settings.items():
            setattr(play, name, value)
        ask(tab, "why?")
        expect(tab.locator("#error")).to_have_text(says)
        expect(tab.locator("#prompt")).to_have_value("why?")
        expect(tab.locator(".turn")).to_have_count(0)
    (play.last, play.break_off, play.steps) = (None, False, STEPS)
    ask(tab, "why?")
    expect(tab.locator("#tokens")).to_have_text("6")
    expect(tab.locator("#error")).to_be_hidden()


def test_a_wanted_key_is_asked_for_and_kept_in_memory_only(visit, play: Play, expect) -> None:
    play.key = "secret"
    tab = visit()
    ask(tab)
    expect(tab.locator("#error")).to_contain_text("wants an API key")
    expect(tab.locator("#key")).to_be_focused()
    tab.keyboard.type("secret")
    tab.press("#prompt", "Enter")
    expect(tab.locator("#tokens")).to_have_text("6")
    expect(tab.locator("#error")).to_be_hidden()
    tab.reload()
    expect(tab.locator("#key")).to_have_value("")


def test_a_setting_that_is_no_number_is_named(visit, play: Play, expect) -> None:
    tab = visit()
    tab.fill("#seed", "1.5")
    ask(tab)
    expect(tab.locator("#error")).to_have_text("Seed is “1.5”: give a whole number from 0 up.")
    expect(tab.locator("#seed")).to_have_attribute("aria-invalid", "true")
    assert play.asked == []


@pytest.mark.parametrize(("viewport", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")], ids=["desktop", "phone"])
def test_it_fits_and_a_picture_of_it_has_its_colours(visit, expect, scheme: str, viewport, tmp_path: Path) -> None:
    tab = visit(viewport=viewport, color_scheme=scheme)
    ask(tab, "a word as long as " + "w" * 90)
    expect(tab.locator("#tokens")).to_have_text("6")
    assert tab.evaluate("document.documentElement.scrollWidth") == viewport["width"]
    small = [e.bounding_box() for e in tab.locator("button").all()]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= viewport["width"] and box["height"] >= 40 for box in small)
    assert contrast(tab, ".turn .drafted", "#log") > 4.5 and contrast(tab, ".turn .own", "#log") > 4.5
    assert contrast(tab, ".hint", "section") > 4.5
    tab.emulate_media(color_scheme="dark" if scheme == "light" else "light")
    assert contrast(tab, ".turn .drafted", "#log") > 4.5 and contrast(tab, ".turn .own", "#log") > 4.5
    picture = tab.screenshot(path=tmp_path / "page.png", full_page=True)
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


def contrast(tab: Any, text: str, ground: str) -> float:
    """WCAG contrast ratio of a text's colour against the background of an element under it."""

    def luminance(selector: str, name: str) -> float:
        value = tab.locator(selector).first.evaluate(f"e => getComputedStyle(e).{name}")
        parts = [int(n) / 255 for n in re.findall(r"\d+", value)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(text, "color"), luminance(ground, "backgroundColor")), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_over_the_real_server_the_answer_is_the_models_and_the_race_is_even(browser, expect, server) -> None:
    tab = browser.new_page()
    tab.goto(server.url)
    tab.fill("#max-tokens", "40")
    ask(tab, "why?")
    expect(tab.locator("#tokens")).to_have_text("40")
    params = SamplingParams(max_new_tokens=40)
    answer = tiny_llm().generate([{"role": "user", "content": "why?"}], params)[0].text
    assert "".join(tab.locator(".turn .text span").all_text_contents()) == answer
    expect(tab.locator(".note")).to_contain_text("ended at the most new tokens")
    assert 2 <= tab.locator("#tree .node").count() <= SHAPE.tree_size
    assert tab.locator("#tree .node.root").count() == 1
    tab.click("#race-start")
    expect(tab.locator("#race-result")).to_contain_text("The answers are equal, character for character.")
    assert "1.00 tokens per step" in tab.inner_text("#lane-plain")
    tab.close()


def test_a_browser_that_logged_in_needs_no_key_field(browser, expect) -> None:
    with running(api_keys=("secret",)) as server:
        context = browser.new_context(http_credentials={"username": "", "password": "secret"})
        tab = context.new_page()
        tab.goto(server.url)
        expect(tab.locator("#model")).to_have_text("tiny, drafter tiny-drafter")
        tab.fill("#max-tokens", "8")
        ask(tab, "why?")
        expect(tab.locator("#tokens")).to_have_text("8")
        context.close()
