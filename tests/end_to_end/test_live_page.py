"""The live page in a headless Chromium: what is seen, what hands do, and that names stay text.

Pictures of it are left in ``build/live_page``.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import Answer, Outcome, Reason, WorkerLost
from clockwork_serve.serve.http.live import Explain, LivePage, PageServer
from clockwork_serve.telemetry import Step, head_of, read_records
from clockwork_serve.telemetry.live import LiveView
from clockwork_serve.units import ms
from harness.browser import ABSENT, CHROMIUM, Browser
from harness.ports import free_port
from tests.sim.journals import written
from tests.telemetry import stories

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason=ABSENT)]
PICTURES = Path(__file__).parents[2] / "build" / "live_page"
HOSTILE = "<img src=x onerror='window.broken=1'><script>window.broken=2</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as found:
        yield found


@contextmanager
def shown(view: LiveView, port: int = 0, explain: Explain | None = None) -> Iterator[str]:
    """The page of a view; its address."""
    loop, server = asyncio.new_event_loop(), PageServer(LivePage(view, explain), key="key")
    port = loop.run_until_complete(server.listen(port))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}/?key=key"
    finally:

        async def close() -> None:
            server.close()
            await asyncio.sleep(0.05)

        asyncio.run_coroutine_threadsafe(close(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> LiveView:
    """A simulation of two seconds, with refusals."""
    view = LiveView()
    for _, record in read_records(written(tmp_path_factory.mktemp("live") / "journal", 3)):
        view.on_record(record)
    return view


def complaints(browser: Browser, url: str) -> list[str]:
    """What the page of that address has complained of so far; one before it may ask a server that is gone."""
    ours = url.partition("?")[0]
    return [one for one in browser.said if ours in one or "http://127.0.0.1" not in one]


def opened(browser: Browser, url: str) -> None:
    browser.said.clear()
    browser.sent.clear()
    browser.open(url)
    browser.until("window.livePage && livePage.store.covered && livePage.store.bins.size > 0")


def test_it_shows_what_the_journal_holds_and_asks_nobody_else(browser: Browser, journal: LiveView) -> None:
    with shown(journal) as url:
        opened(browser, url)
        browser.run("livePage.span(5e6)")
        browser.until("livePage.store.lanes.filter((one) => one.boxes.length > 5).length >= 2")
        asked = browser.run("[...document.querySelectorAll('.figure')].map((one) => one.innerText).join(' ')")
        browser.until("document.querySelectorAll('#pane tbody tr').length > 3")
        for scheme in ("light", "dark"):
            browser.prefer(scheme)
            browser.until("(() => new Promise((done) => setTimeout(() => done(true), 400)))()")
            browser.picture(PICTURES / f"{scheme}.png")
        browser.prefer("light")
        said = complaints(browser, url)

    assert "satisfaction" in asked and "goodput" in asked
    assert said == []
    origin = url.partition("/?")[0]
    assert {one for one in browser.sent if not one.startswith((f"{origin}/", "data:"))} == set()


def test_from_a_red_bar_to_the_sentence_are_three_clicks(browser: Browser, journal: LiveView) -> None:
    with shown(journal) as url:
        opened(browser, url)
        browser.run("livePage.span(5e6)")
        x = browser.until(
            "(() => { const v = livePage.view, bin = [...livePage.store.bins.values()]"
            ".find((one) => Object.keys(one.ends).length);"
            "const box = document.getElementById('charts').getBoundingClientRect();"
            "return bin && box.left + 132 + (bin.at + bin.lasts / 3 - v.from) / v.pixel; })()"
        )
        browser.click(x, 180)  # 1: the bar
        browser.until("!!document.querySelector('#pane tr.open .bad')")
        place = browser.run(
            "(() => { const box = document.querySelector('#pane tr.open').getBoundingClientRect();"
            "return [box.left + 20, box.top + box.height / 2]; })()"
        )
        browser.click(*place)  # 2: the request
        sentence = browser.until("document.querySelector('dialog[open] .sentence')?.innerText")
        browser.until("document.querySelector('dialog[open] p.muted')?.innerText.includes('not available')")
        browser.picture(PICTURES / "request.png")
        said = complaints(browser, url)

    assert "after it came" in sentence
    assert all("501" in one for one in said), "but for the explanation, nothing failed"


def test_names_and_messages_stay_text(browser: Browser) -> None:
    view = LiveView()
    view.on_record(head_of(ControllerConfig()))
    view.on_record(Step(0, (stories.worker_joined(worker=HOSTILE, device=HOSTILE),), ()))
    answer = Answer(
        request_id="r", gateway="g", outcome=Outcome.REJECTED, reason=Reason.QUEUE_FULL, message=HOSTILE
    )
    asked = stories.request("r", 100, model=HOSTILE)
    view.on_record(Step(ms(100), (asked,), (answer,)))
    view.on_record(Step(ms(900), (WorkerLost(worker=HOSTILE),), ()))
    with shown(view) as url:
        opened(browser, url)
        for tab in ("models", "devices", "events", "requests", "settings", "tenants"):
            browser.run(
                f"livePage.select(0, 2e6); document.querySelectorAll('#tabs button')[{TABS[tab]}].click()"
            )
            if tab != "tenants":
                browser.until("document.querySelectorAll('#pane tbody tr').length > 0")
            if tab in ("models", "events", "devices"):
                browser.until("document.getElementById('pane').innerText.includes('onerror')")
        browser.run("document.querySelectorAll('#tabs button')[0].click()")
        browser.until("!!document.querySelector('#pane tr.open')")
        browser.run("document.querySelector('#pane tr.open').click()")
        browser.until("document.querySelector('dialog[open]').innerText.includes('onerror')")

        assert browser.run("window.broken === undefined && document.querySelectorAll('img').length === 0")
        assert browser.run("document.querySelectorAll('script').length") == 1


TABS = {"requests": 0, "models": 1, "tenants": 2, "devices": 3, "events": 4, "settings": 5}


def test_a_script_that_gets_into_the_page_does_not_run(browser: Browser, journal: LiveView) -> None:
    with shown(journal) as url:
        opened(browser, url)
        browser.run(
            "(() => { const made = document.createElement('script'); made.textContent = 'window.broken = 1';"
            "document.body.append(made); document.body.insertAdjacentHTML('beforeend', "
            "'<img src=\"https://127.0.0.1:1/x\">'); })()"
        )
        browser.until("document.querySelectorAll('img').length === 1")

        assert browser.run("window.broken === undefined")
        browser.run("new Promise((done) => setTimeout(done, 300))")
        assert any("Content Security Policy" in one for one in browser.said)


def test_the_keyboard_reaches_everything(browser: Browser, journal: LiveView) -> None:
    with shown(journal) as url:
        opened(browser, url)
        following = "livePage.view.following"
        assert browser.run(following)
        browser.press(" ", "Space", " ")
        assert not browser.run(following)
        assert browser.run("document.getElementById('state').innerText") == "paused"
        before = browser.run("[livePage.view.from, livePage.view.span]")
        browser.press("ArrowLeft")
        browser.press("+", text="+")
        after = browser.run("[livePage.view.from, livePage.view.span]")
        assert after[1] < before[1]
        browser.press("End")
        assert browser.run(following)
        browser.press("6", text="6")
        browser.until("document.querySelector('#pane').innerText.includes('max_batch')")
        browser.press("?", text="?")
        assert browser.run("document.getElementById('keys').open")
        browser.press("Escape")
        browser.until("!document.getElementById('keys').open")
        for _ in range(4):
            browser.press("Tab")
        assert browser.run("document.activeElement.tagName") == "BUTTON"


@pytest.mark.parametrize(("width", "height"), [(390, 844), (360, 640), (1024, 700), (2560, 1300)])
def test_it_fits_screens(browser: Browser, journal: LiveView, width: int, height: int) -> None:
    with shown(journal) as url:
        opened(browser, url)
        browser.size(width, height, mobile=width < 700)
        try:
            browser.run("new Promise((done) => setTimeout(done, 500))")
            browser.picture(PICTURES / f"{width}.png")
            wide, tall = browser.run(
                "[document.documentElement.scrollWidth, document.getElementById('lanes').height]"
            )
        finally:
            browser.size(1366, 768)

    assert wide <= width
    assert tall >= 40


def test_a_view_that_is_far_back_is_loaded_and_drawn(browser: Browser, journal: LiveView) -> None:
    with shown(journal) as url:
        opened(browser, url)
        browser.run("livePage.zoom(0.01)")
        browser.run("livePage.view.following = false, livePage.view.from = 5e5")
        browser.until("livePage.store.covered.from <= 5e5 && livePage.store.covered.pixel < 1000")
        painted = (
            "(() => { const c = livePage.lanes.canvas, all = c.getContext('2d');"
            "const d = all.getImageData(140, 0, c.width - 140, Math.min(60, c.height)).data;"
            "const seen = new Set(); for (let i = 0; i < d.length; i += 4)"
            " seen.add(d[i] << 16 | d[i + 1] << 8 | d[i + 2]); return seen.size; })()"
        )
        browser.until(f"{painted} > 4")


def test_a_server_that_starts_again_is_followed_with_its_own_names(
    browser: Browser, journal: LiveView
) -> None:
    other = LiveView()
    other.on_record(Step(0, (stories.worker_joined(worker="new", device="new:0"),), ()))
    other.on_record(Step(ms(100), (stories.request("r", 100, model="another/1"),), ()))
    port = free_port()
    with shown(journal, port) as url:
        opened(browser, url)
        assert len(browser.run("livePage.store.models")) > 1
    browser.until("document.getElementById('state').innerText === 'not connected'")
    with shown(other, port):
        browser.until("livePage.store.models.join() === 'another/1'")
        assert browser.run("livePage.store.lanes.map((one) => one.name).join()") == "new:0,new:0"


def test_an_explanation_replaces_what_the_page_says_by_itself(browser: Browser, journal: LiveView) -> None:
    async def explain(request_id: str, tenant: str | None, changes: Sequence[str]) -> dict[str, object]:
        return {"sentence": f"Because of {HOSTILE}", "lines": ["Because", "first reason", HOSTILE]}

    with shown(journal, explain=explain) as url:
        opened(browser, url)
        browser.run("livePage.select(0, 2e6)")
        browser.until("!!document.querySelector('#pane tr.open .bad')")
        browser.run("document.querySelector('#pane tr.open').click()")
        browser.until("document.querySelector('dialog[open]')?.innerText.includes('first reason')")
        told = browser.run("document.querySelector('dialog[open]').innerText")

        assert "Because of <img" in told
        assert browser.run("document.querySelectorAll('img').length === 0 && window.broken === undefined")


def test_a_page_that_is_paused_does_not_grow(browser: Browser) -> None:
    view = LiveView()
    view.on_record(Step(0, (stories.worker_joined(),), ()))
    with shown(view) as url:
        opened(browser, url)
        browser.run("livePage.span(1e6)")
        browser.press(" ", "Space", " ")
        for number in range(1, 200):
            at = 100.0 * number
            ended = msgspec.structs.replace(stories.result(number), started_ns=ms(at), ended_ns=ms(at + 20))
            view.on_record(Step(ms(at), (), (stories.infer(number),)))
            view.on_record(Step(ms(at + 20), (ended,), ()))
            time.sleep(0.01)
        browser.until("livePage.store.now > 19e6")
        held = "livePage.store.lanes.reduce((sum, one) => sum + one.boxes.length, 0)"

        assert browser.run(held) < 150
        browser.press("End")
        browser.run("livePage.span(30e6)")
        browser.until(f"{held} >= 199")
