"""The report in a real browser: it sorts, filters, marks, exports, and runs no foreign script."""

from __future__ import annotations

import json
import shutil
import time

import pytest
from datasets import Dataset

from softpref.auditing.marks import read_marks
from softpref.auditing.report import write_report
from softpref.data.sources import load_pairs
from tests.auditing.said import Said

selenium = pytest.importorskip("selenium", reason="make test-browser installs it")
if not shutil.which("chromium") or not shutil.which("chromedriver"):
    pytest.skip("needs chromium and chromedriver: make test-browser", allow_module_level=True)

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)></script>"
COUNT = 400


def write(path, count=COUNT, text="the same words and {}", uid="u{}", worse="worse{}"):
    rows = Dataset.from_dict(
        {
            "uid": [uid.format(i) for i in range(count)],
            "p_correct": [(i + 0.5) / count for i in range(count)],
            "evidence": [{"fluency": 4 * i / count - 2, "content": 0.5} for i in range(count)],
            "rank": list(range(1, count + 1)),
            "flag": ["suspect" if i < count // 5 else "fine" for i in range(count)],
            "why": [f"because {i} {ATTACK}" for i in range(count)],
        }
    )
    pairs = Dataset.from_dict(
        {
            "prompt": [f"question {i} {ATTACK}" for i in range(count)],
            "chosen": [text.format(f"better{i}") for i in range(count)],
            "rejected": [text.format(worse.format(i)) for i in range(count)],
        }
    )
    write_report(
        path, rows, pairs, Said(pairs=COUNT, warnings=[f"mind {ATTACK}"]), "fingerprint", 0
    )


@pytest.fixture
def page(tmp_path):
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1300,1200"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    write(tmp_path / "report.html")
    driver.get((tmp_path / "report.html").as_uri())
    yield driver
    driver.quit()


def texts(page, name):
    return [cell.text for cell in page.find_elements(By.CSS_SELECTOR, f"td[data-name='{name}']")]


def click(page, selector):
    page.find_element(By.CSS_SELECTOR, selector).click()


def downloaded(path):
    for _ in range(100):
        if path.is_file():
            return [json.loads(line) for line in path.read_text().splitlines()]
        time.sleep(0.1)
    raise AssertionError(f"{path} was not downloaded")


def test_text_stays_text_and_no_other_script_runs(page):
    assert page.find_elements(By.CSS_SELECTOR, "main img") == []
    assert ATTACK in page.find_element(By.CSS_SELECTOR, "td .prompt").text
    assert ATTACK in page.find_element(By.CSS_SELECTOR, ".warning").text
    page.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
        "document.body.append(s)"
    )
    assert page.execute_script("return window.ran") is None
    errors = [entry["message"] for entry in page.get_log("browser")]
    assert all("Content Security Policy" in message for message in errors), errors


def test_the_random_sample_comes_first_without_the_models_opinion(page):
    assert len(texts(page, "prompt")) == 20
    assert texts(page, "rank") == texts(page, "label right") == []
    assert "150 pairs drawn at random" in page.find_element(By.ID, "advice").text
    assert not page.find_element(By.ID, "filters").is_displayed()


def test_sorting_filters_search_and_pages(page):
    click(page, "#tab-all")
    assert texts(page, "rank")[:3] == ["1", "2", "3"]
    click(page, "[data-sort='p']")
    click(page, "[data-sort='p']")
    assert texts(page, "rank")[:2] == ["400", "399"]
    click(page, "[data-sort='rank']")
    page.find_element(By.ID, "flag").send_keys("fine")
    assert texts(page, "rank")[0] == "81"
    page.find_element(By.ID, "search").send_keys("question 123 ")
    assert texts(page, "rank") == ["124"]
    page.find_element(By.ID, "search").clear()
    page.find_element(By.ID, "search").send_keys(" ")
    low = page.find_element(By.ID, "low")
    low.clear()
    low.send_keys("0.9")
    assert texts(page, "rank")[0] == "361"
    click(page, "#next")
    assert texts(page, "rank")[0] == "381"
    assert page.find_element(By.ID, "where").text == "21 to 40 of 40 pairs"


def test_differing_words_are_marked(page):
    row = page.find_element(By.CSS_SELECTOR, "#rows tr")
    marked = [mark.text for mark in row.find_elements(By.CSS_SELECTOR, ".text mark")]
    assert len(marked) == 2
    assert marked[0].startswith("better")
    assert marked[1].startswith("worse")


def test_the_reviewed_sample_is_a_clean_set(page, tmp_path):
    body = page.find_element(By.TAG_NAME, "body")
    prompts = texts(page, "prompt")
    body.send_keys("1")  # right
    body.send_keys(Keys.ARROW_DOWN, "2")  # wrong
    body.send_keys("j", "3")  # unsure
    assert "1 right, 1 wrong, 1 unsure" in page.find_element(By.ID, "advice").text
    page.refresh()
    assert "1 right, 1 wrong, 1 unsure" in page.find_element(By.ID, "advice").text
    click(page, "#export")
    rows = downloaded(tmp_path / "clean.jsonl")
    marked = {row["prompt"]: row["chosen"].split()[-1] for row in rows}
    assert len(marked) == 2
    assert marked[prompts[0]].startswith("better")
    assert marked[prompts[1]].startswith("worse")
    assert len(load_pairs(str(tmp_path / "clean.jsonl")).pairs) == 2


def test_marks_on_suspects_go_back_into_the_audit(page, tmp_path):
    click(page, "#tab-all")
    click(page, "#rows tr:nth-child(3) [data-mark='wrong']")
    click(page, "#rows tr:nth-child(4) [data-mark='unsure']")
    click(page, "#rows tr:nth-child(4) [data-mark='unsure']")  # taken back
    click(page, "#export")
    assert downloaded(tmp_path / "marks.jsonl") == [{"uid": "u2", "mark": "wrong"}]
    assert read_marks(str(tmp_path / "marks.jsonl")) == {"u2": 0.0}


def test_it_can_be_read_on_a_phone(page):
    page.set_window_size(400, 800)
    wide = page.execute_script("return document.documentElement.scrollWidth")
    assert wide <= page.execute_script("return window.innerWidth")


def test_a_hundred_thousand_long_pairs_open_in_three_seconds(page, tmp_path):
    path = tmp_path / "large.html"
    write(path, 100_000, "{} " + "many words " * 136)
    assert path.stat().st_size < 60e6
    start = time.monotonic()
    page.get(path.as_uri())
    assert len(texts(page, "prompt")) == 20
    assert time.monotonic() - start < 3


@pytest.mark.parametrize(("text", "count"), [("a " * 130_000 + "{}", 2), ("{}", 130_000)])
def test_a_response_of_many_words_is_shown(page, tmp_path, text, count):
    write(tmp_path / "report.html", 2, text, worse="b " * count)
    page.refresh()
    assert len(page.find_elements(By.CSS_SELECTOR, "#rows tr")) == 2
    assert "pairs drawn at random" in page.find_element(By.ID, "advice").text


def test_a_pair_may_have_any_uid(page, tmp_path):
    write(tmp_path / "report.html", 1, uid="__proto__")
    page.refresh()
    page.find_element(By.TAG_NAME, "body").send_keys("2")
    assert "1 wrong" in page.find_element(By.ID, "advice").text
    page.refresh()
    assert "1 wrong" in page.find_element(By.ID, "advice").text
    click(page, "#export")
    (row,) = downloaded(tmp_path / "clean.jsonl")
    assert row["chosen"].endswith("worse0")
    click(page, "#tab-all")
    click(page, "#export")
    assert downloaded(tmp_path / "marks.jsonl") == [{"uid": "__proto__", "mark": "wrong"}]
