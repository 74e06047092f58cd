"""`scaling chat` as a user meets it: its end, its mistakes, and its page in a real browser."""

import http.client
import io
import json
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from urllib.parse import urlsplit

import pytest

from scaling.chat import server, talk
from scaling.load import load
from sweeps.cli.main import main
from tests.test_cli import fails_with

pytest.importorskip("starlette", reason="starlette is not installed (extra: chat)")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra: chat)")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_it_ends_cleanly_with_an_answer_under_way(trained_run, number):
    """Exit code 0, nothing on the standard error, and soon."""
    command = [sys.executable, "-m", "sweeps.cli", "chat", str(trained_run), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert line.startswith("talk to run at http://127.0.0.1:"), (line, process.stderr.read())
        address = urlsplit(line.split(" at ")[1].split()[0])
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
        body = json.dumps({"model": 0, "prompt": "the", "max_tokens": 60})
        connection.request("POST", "/answer", body, {"Content-Type": "application/json"})
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        connection.close()
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, err) == (0, "")
    assert out == "ended\n"


def test_in_the_terminal_a_question_is_answered(trained_run, capsys, monkeypatch):
    lines = [
        "the uni",
        "/next",
        "/temperature 0",
        "/temperature 0.5",
        "/colour",
        "the uni",
        "/bogus",
        "a" * 99,
        "/quit",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    assert main(["chat", str(trained_run), str(trained_run), "--terminal", "--max-tokens", "3", "--seed", "1"]) == 0
    captured = capsys.readouterr()
    assert "run:\non " in captured.out, "the model of this fixture has not learned its words"
    assert " %  o\n" in captured.out
    assert "\x1b[48;5;22mo\x1b[0m" in captured.out
    assert "unknown command '/bogus'" in captured.out
    errors = captured.err.splitlines()
    assert len(errors) == 2
    assert "temperature = 0.0: expected a number from 1e-06" in errors[0]
    assert "99 tokens, longer than the window of 64" in errors[1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--port", "99999"], "--port 99999"),
        (["--host", "not an address"], "--host not an address"),
        (["--temperature", "0.5"], "--temperature: for --terminal"),
        (["--template", "x {prompt}"], "--template: for --terminal"),
        (["--terminal", "--temperature", "0"], "temperature = 0.0"),
        (["--terminal", "--template", "x"], "expected text with {prompt} in it"),
        (["--stop", "x"], "--stop"),
        (["b", "c"], "3 runs: at most two"),
    ],
)
def test_mistakes_get_one_line(trained_run, argv, message, capsys):
    assert message in fails_with(capsys, "chat", trained_run, *argv)


ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # what the protocol calls a reference to one
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


class Browser:
    """A headless Chromium by the W3C WebDriver protocol."""

    def __init__(self, folder) -> None:
        log = open(folder / "chromedriver.log", "w")  # noqa: SIM115
        self.process = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=log, text=True)
        log.close()
        port = next(
            line.split()[-1].rstrip(".") for line in self.process.stdout if "started successfully on port" in line
        )
        self.base = f"http://127.0.0.1:{port}/session"
        arguments = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--user-data-dir={folder}/profile",
        ]
        options = {"binary": CHROMIUM, "args": [*arguments, "--window-size=1200,900"]}
        self.session = ""
        started = self.ask("POST", "", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}})
        self.session = "/" + started["sessionId"]

    def ask(self, method: str, path: str, body: dict | None = None):
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + self.session + path, content, method=method)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as response:
            return json.load(response)["value"]

    def run(self, script: str):
        return self.ask("POST", "/execute/sync", {"script": script, "args": []})

    def find(self, selector: str) -> str:
        return next(iter(self.ask("POST", "/element", {"using": "css selector", "value": selector}).values()))

    def wait(self, script: str, what: str):
        """The value of `script` once it is true."""
        end = time.monotonic() + 60
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"{what}: {self.run('return document.body.innerText')}"
            time.sleep(0.1)
        return value

    def close(self) -> None:
        self.ask("DELETE", "")
        self.process.terminate()
        self.process.communicate(timeout=30)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM or not DRIVER:
        pytest.skip("no chromium and chromedriver here (Debian: apt-get install chromium chromium-driver)")
    opened = Browser(tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()


def type_into(browser, text):
    browser.run("document.getElementById('prompt').value = ''")
    browser.ask("POST", f"/element/{browser.find('#prompt')}/value", {"text": text})


DONE = "return !document.getElementById('send').disabled && document.querySelectorAll('.asked').length === %d"


def test_in_a_browser_two_models_answer_side_by_side(trained_run, browser):
    """Typed, sent by Enter, streamed into two columns, coloured on demand; under the mouse, what else was likely."""
    model = load(trained_run)
    with server.started([model, model], ["base", "child"]) as url:
        browser.ask("POST", "/url", {"url": url})
        browser.wait("return document.body.dataset.ready", "the page does not know its models")
        browser.run("document.getElementById('seed').value = 7; document.getElementById('max_tokens').value = 12")
        type_into(browser, "the union of \ue007")
        browser.wait(DONE % 1, "no answer")
        wanted = model.generate("the union of ", max_tokens=12, seed=7)
        texts = browser.run("return [...document.querySelectorAll('.answer')].map(e => e.textContent)")
        assert texts == [wanted.texts[0][0]] * 2
        shown = browser.run("return [...document.querySelector('.answer').children].map(e => +e.dataset.logprob)")
        assert shown == pytest.approx(wanted.logprobs[0, 0].tolist(), rel=1e-3, abs=1e-3)
        colour = "return getComputedStyle(document.querySelector('.token')).backgroundColor"
        assert browser.run(colour) == "rgba(0, 0, 0, 0)"
        browser.ask("POST", f"/element/{browser.find('#colour')}/click", {})
        assert browser.run(colour) != "rgba(0, 0, 0, 0)"
        move = {"type": "pointerMove", "origin": {ELEMENT: browser.find(".token")}, "x": 0, "y": 0, "duration": 0}
        browser.ask("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})
        box = browser.wait(
            "const b = document.getElementById('likely'); return !b.hidden && b.textContent", "no tokens"
        )
        best = talk.likely(model, list(b"the union of "))[0]
        assert f"{100 * best['p']:.1f} %  {best['name']}" in box
        assert browser.run("return document.querySelectorAll('#likely .taken').length") <= 1


def test_in_a_browser_what_a_model_says_is_text_and_no_markup(trained_run, browser, monkeypatch):
    """A model may have learned a page: if this fails, its words run as script in the reader's browser."""
    attack = "<img src=x onerror='document.title=1'><script>document.title='owned'</script>&lt;b&gt;"

    def write(*_):
        yield talk.Piece(attack, (1,), -1.0)
        yield talk.End("stop")

    monkeypatch.setattr(server, "write", write)
    monkeypatch.setattr(server, "likely", lambda *_: [{"id": 1, "name": attack, "p": 1.0}])
    with server.started([load(trained_run)], ["<b>name</b>"]) as url:
        browser.ask("POST", "/url", {"url": url})
        browser.wait("return document.body.dataset.ready", "the page does not know its model")
        type_into(browser, "<i>asked</i>\ue007")
        browser.wait(DONE % 1, "no answer")
        assert browser.run("return document.querySelector('.answer').textContent") == attack
        assert browser.run("return document.querySelector('.asked').textContent") == "<i>asked</i>"
        assert browser.run("return document.querySelectorAll('img, b, i').length") == 0
        assert browser.run("return document.title") == "scaling chat"
        blocked = "document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=2\">'); return 1"
        browser.run(blocked)
        time.sleep(0.3)
        assert browser.run("return document.title") == "scaling chat", "the page's policy lets scripts in"


def test_in_a_browser_a_mistake_is_said_and_the_next_question_answered(trained_run, browser):
    with server.started([load(trained_run)], ["base"]) as url:
        browser.ask("POST", "/url", {"url": url})
        browser.wait("return document.body.dataset.ready", "the page does not know its model")
        type_into(browser, "a" * 80 + "\ue007")
        browser.wait(DONE % 1, "no refusal")
        assert "80 tokens, longer than the window of 64" in browser.run(
            "return document.querySelector('.error').textContent"
        )
        type_into(browser, "the\ue007")
        browser.wait(DONE % 2, "no answer after a mistake")
        assert browser.run("return document.querySelectorAll('.error').length") == 1
    type_into(browser, "the\ue007")
    browser.wait(DONE % 3, "a page whose server has ended waits for ever")
