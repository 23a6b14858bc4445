"""The page of samples: hostile texts stay text, nothing is asked for from anywhere, thousands of rows fit."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from eval import reading, results, samples_page
from tests.helpers.jsonl import write_jsonl


HOSTILE = [
    "</script><script>document.title = 'owned'</script>",
    "<!--<script>",
    "]]><img src=x onerror=\"document.title='owned'\">",
    "\x1b[31mred\x1b]0;owned\x07",
    "a\u2028b\u2029c",
    "right \u202e to left",
    "&lt;b&gt; &amp;",
    "\" onmouseover='x' \u0000\ud800",
    "javascript:alert(1) http://example.org/x.png",
]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def sample(row, model="base", value=1.0, **more):
    texts = {"question": f"question {row}", "prompt": f"p {row}", "target": "t", "response": "r"}
    read = {"metrics": {"strict": 0.0, "acc": value}, "extracted": {"none": "r"}}
    return {"model": model, "task": "gsm8k", "seed": 1, "row": row, "repeat": 0, **texts, **read, **more}


def hostile_rows():
    names = ("model", "task", "question", "prompt", "target", "response")
    rows = [sample(i, **dict.fromkeys(names, text), extracted={text: text + "!"}, metrics={text: 1.0})
            for i, text in enumerate(HOSTILE)]  # fmt: skip
    return [*rows, sample(99, response=[-1.5, -2.0])]


class Page(HTMLParser):
    """Every tag with its attributes, and what stands in scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.inside = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.inside.append((self.tags[-1][0] if self.tags else "", data))

    def text_of(self, tag):
        return [data for inside, data in self.inside if inside == tag and data.strip()]

    @property
    def data(self):
        return json.loads(self.text_of("script")[0])


@pytest.fixture
def folder(tmp_path):
    def make(rows, name="run"):
        write_jsonl(tmp_path / name / results.SAMPLES_FILE, rows)
        return tmp_path / name

    return make


def read(folder):
    return samples_page.write_page(folder).read_text(encoding="utf-8")


def test_hostile_texts_stay_text(folder):
    """The page has the same tags as that of a harmless run, and the texts stand in it to the letter."""
    hostile, harmless = Page(read(folder(hostile_rows()))), Page(read(folder([sample(0)])))
    assert hostile.tags == harmless.tags
    assert len(hostile.text_of("script")) == 2
    for row, text in zip(hostile.data["rows"], HOSTILE, strict=False):
        assert row["question"] == row["answers"][0]["response"] == samples_page.visible(text)
    shown = json.dumps(hostile.data, ensure_ascii=False)
    assert "[U+001B][31mred" in shown
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u2028\u2029\u202e\ud800]", shown)
    assert "-1.5, -2.0" in shown


def test_a_hostile_folder_name_is_escaped(folder):
    page = Page(read(folder([sample(0)], name="<img src=x onerror=1>\"'&")))
    assert page.tags == Page(read(folder([sample(0)]))).tags
    assert page.text_of("title") == ["Samples of <img src=x onerror=1>\"'&"]


def test_nothing_is_asked_for_and_one_script_may_run(folder):
    """No address anywhere, and a policy by the hashes of what stands in the page."""
    text = read(folder([sample(0)]))
    page = Page(text)
    assert not {"src", "href", "action", "data", "onclick", "style"} & {name for _, a in page.tags for name in a}
    assert {tag for tag, _ in page.tags}.isdisjoint({"link", "iframe", "img", "object", "form", "base"})
    (policy,) = (a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    script, style = page.text_of("script")[1], page.text_of("style")[0]
    hashes = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (script, style)]
    assert policy == (
        f"default-src 'none'; script-src 'sha256-{hashes[0]}'; style-src 'sha256-{hashes[1]}'; base-uri 'none'; "
        "form-action 'none'"
    )
    assert "innerHTML" not in script
    assert "http" not in html.unescape(text).replace("http-equiv", "")


def test_models_and_repeats_stand_side_by_side(folder):
    asked = [sample(0), sample(0, "mine", 0.0), sample(0, "mine", 1.0, repeat=1), sample(1, prompt="a"),
             sample(1, "mine", prompt="b")]  # fmt: skip
    run_folder = folder(asked)
    score = {"task": "gsm8k", "metric": "acc", "headline": True}
    (run_folder / results.RESULTS_FILE).write_text(json.dumps({"scores": [score]}))
    first, second = Page(read(run_folder)).data["rows"]
    assert [(a["model"], a["repeat"], a["right"]) for a in first["answers"]] == [
        ("base", 0, True), ("mine", 0, False), ("mine", 1, True)]  # fmt: skip
    assert (first["prompt"], first["answers"][0]["prompt"], first["repeats"]) == ("p 0", None, True)  # kept once
    assert (second["prompt"], [a["prompt"] for a in second["answers"]]) == (None, ["a", "b"])


def test_thousands_of_rows(folder):
    page = Page(read(folder([sample(row, model) for row in range(5000) for model in ("base", "mine")])))
    assert len(page.data["rows"]) == 5000
    assert len(page.tags) < 40  # rows are data: a browser draws a page of them at a time


def test_a_sample_of_the_longest_row_has_a_page(tmp_path):
    text = "x" * (reading.MAX_LINE - 100)  # of a row that is taken
    line = {"task": "t", "model": "m", "seed": 1, "row": 0, "question": text, "prompt": text, "target": "1",
            "response": "r", "metrics": {"acc": 1.0}}  # fmt: skip
    (tmp_path / "samples.jsonl").write_text(json.dumps(line) + "\n")
    assert len(samples_page.page_of_folder(tmp_path)) > len(text)


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "is not JSON"), ("[" * 10**5, "nested more than 100"), ('{"task": 1}', "'task' is 1, it must be str")],
)
def test_damaged_samples_are_one_message(line, message, folder, capsys):
    run_folder = folder([sample(0)])
    (run_folder / results.SAMPLES_FILE).write_text(line)
    assert samples_page.main([str(run_folder)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("eval: error: ")
    assert message in err
    (run_folder / results.SAMPLES_FILE).unlink()
    assert samples_page.main([str(run_folder)]) == 2
    assert "run the evaluation with --log-samples" in capsys.readouterr().err


def test_an_interrupt_ends_it_without_a_traceback(tmp_path, monkeypatch):
    def interrupted(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(samples_page, "write_page", interrupted)
    assert samples_page.main([str(tmp_path)]) == 130


@pytest.fixture
def drawn(tmp_path):
    """What a browser makes of a page."""
    if CHROMIUM is None:
        pytest.skip("needs chromium")

    def render(page):
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        words = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", profile, "--dump-dom"]
        done = subprocess.run([CHROMIUM, *words, page.as_uri()], capture_output=True, text=True, timeout=120)
        return Page(done.stdout)

    return render


@pytest.mark.parametrize(
    ("before", "after", "rows"),
    [
        ("", "", [0, 1, 2, 3]),
        ('value="right"', 'value="right" selected', [0, 1]),
        ('value="wrong"', 'value="wrong" selected', [1, 2, 3]),
        ('value="disagree"', 'value="disagree" selected', [1]),
        ('type="search"', 'type="search" value="QUESTION 3"', [3]),
    ],
)
def test_filters_choose_rows(before, after, rows, folder, drawn):
    """Row 0: both right; row 1: they disagree; rows 2 and 3: both wrong."""
    values = {"base": (1.0, 0.0, 0.0, 0.0), "mine": (1.0, 1.0, 0.0, 0.0)}
    asked = [sample(row, model, metrics={"acc": value}) for model in values for row, value in enumerate(values[model])]
    page = samples_page.write_page(folder(asked))
    page.write_text(page.read_text().replace(before, after, 1) if before else page.read_text())
    assert drawn(page).text_of("h2") == [f"gsm8k, row {row}" for row in rows]


def test_a_browser_shows_the_texts(folder, drawn):
    """Drawn by the page's own script under its policy; no text became markup or ran."""
    shown = drawn(samples_page.write_page(folder(hostile_rows())))
    assert shown.text_of("title") == ["Samples of run"]
    assert sum(tag == "article" for tag, _ in shown.tags) == len(HOSTILE) + 1
    assert not any(tag == "img" for tag, _ in shown.tags)
    assert sum(tag == "script" for tag, _ in shown.tags) == 2
    questions = [data for tag, data in shown.inside if tag == "pre"]
    for text in HOSTILE:
        assert samples_page.visible(text) in questions
    assert "10 of 10 rows, page 1 of 1" in shown.text_of("span")
