"""`dmpctl report`: one page that stands alone, with what the run has, and nothing that it has not."""

import re
from html.parser import HTMLParser

import pytest

from tests.helpers import copied, files, run_cli

FAST = ("--sampler", "ddim", "--steps", 2, "--cpu")


class Page(HTMLParser):
    """Tags that are opened and closed, addresses that a browser would fetch, pictures, and the text."""

    VOID = ("meta", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.addresses, self.alts, self.words, self.headings = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        assert tag not in ("script", "link", "iframe", "object")
        self.addresses += [given[name] for name in ("src", "href", "srcset", "action") if name in given]
        if tag == "img":
            self.alts.append(given.get("alt"))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


def page_of(path):
    text = path.read_text("utf-8")
    assert text.startswith("<!doctype html>")
    assert "@import" not in text
    assert "url(" not in text
    return Page(text)


def test_a_finished_run(cli, finished, tmp_path):
    run = copied(finished, tmp_path / "run")
    assert cli("patch", "--run", run, "--config", _settings(run, tmp_path)).code == 0  # complete: it is compared only
    assert cli("sample", run, "--num-images", 4, *FAST).code == 0
    assert cli("fid", run, "--max-images", 70, *FAST, "--metrics", "pr").code == 0
    before = files(run)
    done = cli("report", run)
    assert done.code == 0, done.err
    assert files(run) - before == {"report.html"}
    page = page_of(run / "report.html")
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert all(alt and len(alt) > 10 for alt in page.alts)
    assert len(page.alts) >= 5  # before and after, samples, gates, curves
    assert {"Images", "Measurements", "Training", "Gates", "How to make it again"} <= set(page.headings)
    text = " ".join(page.words)
    for word in ("fd-pixels-70", "precision", "Denoising loss:", "sha256 of the backbone", "norm of the gradient"):
        assert word in text
    first = (run / "report.html").read_bytes()
    assert cli("report", run).code == 0
    assert (run / "report.html").read_bytes() == first  # the same again


def _settings(run, tmp_path):
    """The settings of the finished run but for its comparison, which is small."""
    path = tmp_path / "x.toml"
    lines = (
        "iters = 6",
        "batch_size = 8",
        "log_every = 1",
        "save_every = 3",
        "keep_last = 5",
        "prompt_lr = 0.05",
        "gate_lr = 0.05",
    )
    path.write_text("\n".join((*lines, "ema = 0.0", "cpu = true", "eval_images = 70", "steps = 2", 'sampler = "ddim"')))
    return path


def test_what_is_not_there_is_left_out(cli, conditional, tmp_path):
    out = tmp_path / "page.html"
    done = cli("report", conditional, "--out", out)
    assert done.code == 0, done.err
    page = page_of(out)
    assert "Gates" not in page.headings
    assert "Training" in page.headings
    assert not (conditional / "report.html").exists()


def test_texts_of_others_are_text(cli, finished, tmp_path):
    run = copied(finished, tmp_path / "<b>run & co")
    assert cli("report", run).code == 0
    assert "<b>run & co" in "".join(page_of(run / "report.html").words)


def test_what_is_no_run(cli, tmp_path):
    done = cli("report", tmp_path / "nothing")
    assert (done.code, done.out) == (3, "")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.slow
def test_in_a_browser(finished, tmp_path):
    """No request, no error in the console, nothing wider than a phone. Where Chromium is installed."""
    import shutil
    import subprocess

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium")
    run = copied(finished, tmp_path / "run")
    assert run_cli("report", run, cwd=tmp_path).code == 0
    text = (run / "report.html").read_text("utf-8")
    requests = "performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length"
    sizes = f"[document.documentElement.scrollWidth, innerWidth, {requests}]"
    probe = f"<script>document.title = {sizes}.join(' ')</script></body>"
    (tmp_path / "probe.html").write_text(text.replace("</body>", probe), "utf-8")
    for width in (360, 1200):
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        command += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'browser'}"]
        command += [f"--window-size={width},900", "--dump-dom", "--enable-logging=stderr", (tmp_path / "probe.html").as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        found = re.search(r"<title>(\d+) (\d+) (\d+)</title>", done.stdout)
        assert found is not None
        wide, room, requests = map(int, found.groups())
        assert wide <= max(room, 500)  # Chromium makes no window narrower
        assert requests == 0
        assert "CONSOLE" not in done.stderr
