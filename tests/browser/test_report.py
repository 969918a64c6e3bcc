"""The report in a real browser: it sorts, filters, marks, exports, and runs no foreign script."""

from __future__ import annotations

import json
import shutil
import time

import pytest
import torch
from datasets import Dataset

from softpref.auditing.marks import read_marks
from softpref.auditing.report import write_report
from softpref.data.sources import load_pairs
from softpref.study.figures import draw_label_curves
from softpref.study.report import figure, table
from softpref.study.report import page as demo_page
from tests.auditing.said import Said

selenium = pytest.importorskip("selenium", reason="make test-browser installs it")
if not shutil.which("chromium") or not shutil.which("chromedriver"):
    pytest.skip("needs chromium and chromedriver: make test-browser", allow_module_level=True)

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(2)></script>"
COUNT = 400


ABOUT = {"Data": f"pairs {ATTACK}", "Model": "sft", "softpref": "0.1"}


def write(path, count=COUNT, text="the same words and {}", uid="u{}", worse="worse{}", speaks=True):
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
    said = Said(pairs=COUNT, warnings=[f"mind {ATTACK}"], evidence_speaks=speaks)
    write_report(path, rows, pairs, said, ABOUT, "fingerprint", 0)


@pytest.fixture(scope="module")
def browser():
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1300,1200"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, tmp_path):
    where = {"behavior": "allow", "downloadPath": str(tmp_path)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", where)
    write(tmp_path / "report.html")
    browser.get((tmp_path / "report.html").as_uri())
    browser.execute_script("localStorage.clear()")
    browser.get_log("browser")
    browser.refresh()
    yield browser
    browser.set_window_size(1300, 1200)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def press(page, *keys):
    for key in keys:  # as a user does, without a click that moves the focus
        page.switch_to.active_element.send_keys(key)


def progress(page):
    return page.find_element(By.ID, "progress").text


def selected(page, name="Prompt"):
    selector = f"tr[aria-current='true'] td[data-name='{name}']"
    return page.find_element(By.CSS_SELECTOR, selector).text


def pressed(page):
    return [b.text for b in page.find_elements(By.CSS_SELECTOR, "#rows [aria-pressed='true']")]


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
    assert ATTACK in texts(page, "Prompt")[0]
    assert ATTACK in page.find_element(By.TAG_NAME, "dl").text
    assert ATTACK in page.find_element(By.CSS_SELECTOR, ".warning").text
    page.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
        "document.body.append(s)"
    )
    assert page.execute_script("return window.ran") is None
    errors = [entry["message"] for entry in page.get_log("browser")]
    assert all("Content Security Policy" in message for message in errors), errors


def test_the_random_sample_comes_first_without_the_models_opinion(page):
    assert len(texts(page, "Prompt")) == 20
    assert texts(page, "Rank") == texts(page, "Label right") == []
    assert "150 pairs drawn at random" in page.find_element(By.ID, "advice").text
    assert not page.find_element(By.ID, "filters").is_displayed()


def test_sorting_filters_search_and_pages(page):
    click(page, "#tab-all")
    assert texts(page, "Rank")[:3] == ["1", "2", "3"]
    click(page, "[data-sort='p']")
    click(page, "[data-sort='p']")
    assert texts(page, "Rank")[:2] == ["400", "399"]
    click(page, "[data-sort='rank']")
    page.find_element(By.ID, "flag").send_keys("fine")
    assert texts(page, "Rank")[0] == "81"
    page.find_element(By.ID, "search").send_keys("question 123 ")
    assert texts(page, "Rank") == ["124"]
    page.find_element(By.ID, "search").clear()
    page.find_element(By.ID, "search").send_keys(" ")
    low = page.find_element(By.ID, "low")
    low.clear()
    low.send_keys("0.9")
    assert texts(page, "Rank")[0] == "361"
    click(page, "#next")
    assert texts(page, "Rank")[0] == "381"
    assert page.find_element(By.ID, "where").text == "21 to 40 of 40 pairs"


@pytest.mark.parametrize(
    ("text", "marked"), [("the same words and {}", 2), ("same {}", 2), ("{}", 0)]
)
def test_words_that_differ_are_marked_unless_most_do(page, tmp_path, text, marked):
    write(tmp_path / "report.html", 1, text)
    page.refresh()
    marks = [mark.text for mark in page.find_elements(By.CSS_SELECTOR, "#rows .text mark")]
    assert sorted(marks) == ["better0", "worse0"][:marked]


def better_key(page):
    """Return the key of the response that is labelled better in the selected pair."""
    return "1" if "better" in selected(page, "Response A") else "2"


def test_the_sample_is_shown_without_its_labels(page):
    firsts = ["better" in text for text in texts(page, "Response A")]
    assert 2 < sum(firsts) < 18
    page.refresh()
    assert ["better" in text for text in texts(page, "Response A")] == firsts
    heads = page.find_element(By.ID, "heads").text
    assert "Which is better?" in heads
    page.find_element(By.TAG_NAME, "body").send_keys("1")
    for _ in range(9):
        press(page, "1")
    assert pressed(page) == ["A"] * 10
    shown = page.find_element(By.TAG_NAME, "main").text.replace("worse{", "")
    assert "label right" not in shown.lower()
    assert "Labelled better" not in shown
    colors = {
        button.value_of_css_property("background-color")
        for button in page.find_elements(By.CSS_SELECTOR, "[data-mark='A'][aria-pressed='true']")
    }
    assert len(colors) == 1  # of a right and of a wrong label
    click(page, "#tab-all")
    assert "Labelled better" in page.find_element(By.ID, "heads").text
    assert all("better" in text for text in texts(page, "Labelled better"))


ON_TOP = """
const one = document.getElementById(arguments[0]), box = one.getBoundingClientRect();
return document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2) === one;
"""


def test_a_mark_leads_to_the_next_pair_without_one_over_pages(page):
    body = page.find_element(By.TAG_NAME, "body")
    prompts = texts(page, "Prompt")
    body.send_keys("1")
    assert selected(page) == prompts[1]
    press(page, "j", "1")
    assert selected(page) == prompts[3]
    for _ in range(17):
        press(page, "3")
    assert page.find_element(By.ID, "where").text == "21 to 40 of 150 pairs"
    assert progress(page) == "19 of 150 reviewed"
    assert page.execute_script(ON_TOP, "progress")
    press(page, Keys.ARROW_UP)
    assert selected(page) == prompts[19]
    page.refresh()
    assert progress(page) == "19 of 150 reviewed"
    assert selected(page) == prompts[1]  # the first that was passed over
    page.find_element(By.TAG_NAME, "body").send_keys("2")
    assert page.find_element(By.ID, "where").text == "21 to 40 of 150 pairs"


def test_a_button_marks_like_its_key(page):
    prompts = texts(page, "Prompt")
    click(page, "#rows tr:nth-child(3) [data-mark='B']")
    assert selected(page) == prompts[3]
    assert pressed(page) == ["B"]
    group = page.find_element(By.CSS_SELECTOR, "#rows [role='group']")
    assert group.accessible_name == "Which is better? Pair 1"
    press(page, Keys.TAB, Keys.SPACE)
    assert pressed(page) == ["B", "A"]
    assert selected(page) == prompts[4]


def test_backspace_undoes_the_last_marks(page):
    assert not page.find_element(By.ID, "undo").is_enabled()
    body = page.find_element(By.TAG_NAME, "body")
    prompts = texts(page, "Prompt")
    body.send_keys("1")
    for _ in range(19):
        press(page, "2")
    assert "21 to 40" in page.find_element(By.ID, "where").text
    press(page, Keys.BACK_SPACE)
    assert selected(page) == prompts[19]
    assert progress(page) == "19 of 150 reviewed"
    click(page, "#tab-all")
    page.find_element(By.ID, "search").send_keys("question 123 ")
    click(page, "#rows [data-mark='wrong']")
    page.find_element(By.ID, "search").send_keys("nowhere", Keys.BACK_SPACE)
    assert texts(page, "Prompt") == []  # the key was for the text
    click(page, "#undo")
    assert "question 123 " in selected(page)
    press(page, Keys.BACK_SPACE)
    assert page.find_element(By.ID, "tab-sample").get_attribute("aria-selected") == "true"
    assert selected(page) == prompts[18]
    assert progress(page) == "18 of 150 reviewed"
    for _ in range(18):
        press(page, Keys.BACK_SPACE)
    assert selected(page) == prompts[0]
    assert progress(page) == "0 of 150 reviewed"
    press(page, Keys.BACK_SPACE)
    assert not page.find_element(By.ID, "undo").is_enabled()


def test_the_reviewed_sample_is_a_clean_set(page, tmp_path):
    prompts = texts(page, "Prompt")
    labelled = better_key(page)
    page.find_element(By.TAG_NAME, "body").send_keys(labelled)
    press(page, "21"[int(better_key(page)) - 1], "3")
    page.refresh()
    assert progress(page) == "3 of 150 reviewed"
    click(page, "#export")
    rows = downloaded(tmp_path / "clean.jsonl")
    marked = {row["prompt"]: row["chosen"].split()[-1] for row in rows}
    assert len(marked) == 2
    assert marked[prompts[0]].startswith("better")
    assert marked[prompts[1]].startswith("worse")
    assert len(load_pairs(str(tmp_path / "clean.jsonl")).pairs) == 2
    click(page, "#tab-all")
    click(page, "#export")
    marks = [row["mark"] for row in downloaded(tmp_path / "marks.jsonl")]
    assert marks == ["right", "wrong", "unsure"]


def test_marks_on_suspects_go_back_into_the_audit(page, tmp_path):
    click(page, "#tab-all")
    click(page, "#rows tr:nth-child(3) [data-mark='wrong']")
    click(page, "#rows tr:nth-child(4) [data-mark='unsure']")
    click(page, "#rows tr:nth-child(4) [data-mark='unsure']")  # taken back
    click(page, "#export")
    (row,) = downloaded(tmp_path / "marks.jsonl")
    assert (row["uid"], row["mark"]) == ("u2", "wrong")
    assert row["label"][-1] in "+-"
    assert read_marks(str(tmp_path / "marks.jsonl")) == {"u2": 0.0}


CONTRAST = """
const numbers = (color) => color.match(/[0-9.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].reduce((sum, x, i) => sum + [.2126, .7152, .0722][i] *
  (x / 255 <= .03928 ? x / 255 / 12.92 : ((x / 255 + .055) / 1.055) ** 2.4), 0);
const one = document.querySelector(arguments[0]), style = getComputedStyle(one);
const canvas = getComputedStyle(document.documentElement).colorScheme &&
  matchMedia("(prefers-color-scheme: dark)").matches ? [18, 18, 18] : [255, 255, 255];
const [r, g, b, a = 1] = numbers(style[arguments[2]]);
const back = [r, g, b].map((x, i) => x * a + canvas[i] * (1 - a));
const [front, behind] = [light(numbers(style[arguments[1]])), light(back)];
return (Math.max(front, behind) + .05) / (Math.min(front, behind) + .05);
"""


def use_colors(page, scheme):
    feature = {"name": "prefers-color-scheme", "value": scheme}
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_buttons_can_be_read_under_the_pointer(page, scheme):
    use_colors(page, scheme)
    click(page, "#tab-all")
    click(page, "#rows tr:nth-child(1) [data-mark='right']")
    click(page, "#rows tr:nth-child(2) [data-mark='wrong']")
    for selector in (
        "#tab-all",
        "#tab-sample",
        "#rows tr:nth-child(1) [data-mark='right']",
        "#rows tr:nth-child(2) [data-mark='wrong']",
        "#rows tr:nth-child(1) [data-mark='wrong']",
    ):
        under = page.find_element(By.CSS_SELECTOR, selector)
        webdriver.ActionChains(page).move_to_element(under).perform()
        assert page.execute_script(f'return document.querySelector("{selector}").matches(":hover")')
        contrast = page.execute_script(CONTRAST, selector, "color", "backgroundColor")
        assert contrast > 4.5, selector


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_on_a_phone(page, scheme):
    use_colors(page, scheme)
    page.set_window_size(390, 800)
    for tab in ("#tab-sample", "#tab-all"):
        click(page, tab)
        wide = page.execute_script("return document.documentElement.scrollWidth")
        assert wide <= page.execute_script("return window.innerWidth")
        press(page, "3")
        assert page.execute_script(ON_TOP, "progress")
    assert page.execute_script(CONTRAST, "svg .bar", "fill", "backgroundColor") > 3
    assert page.execute_script(CONTRAST, "svg text", "fill", "backgroundColor") > 4.5
    tall = page.execute_script(
        "return [...document.querySelectorAll('svg text')].map((t) => "
        "t.getBoundingClientRect().height)"
    )
    assert min(tall) > 10
    assert (
        page.find_element(By.CSS_SELECTOR, "td .text").value_of_css_property("font-weight") == "400"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_demos_page_can_be_read_on_a_phone(page, tmp_path, scheme):
    step, label = torch.tensor([1, 1, 2, 2]), torch.tensor([0.8, 0.3, 0.9, 0.1])
    draw_label_curves(step, label, label < 0.5, tmp_path / "curves.png")
    rows = [("method", "win rate", "labels"), ("mspo", "90.4% (88.1% to 92.2%)", "mean 0.98 " * 5)]
    figures = [figure(tmp_path / "curves.png", "Curves", "how to read them")]
    html = demo_page("demo", "lead", table(rows[0], rows[1:]), figures, "end")
    (tmp_path / "demo.html").write_text(html)
    use_colors(page, scheme)
    page.set_window_size(390, 800)
    page.get((tmp_path / "demo.html").as_uri())
    wide = page.execute_script("return document.documentElement.scrollWidth")
    assert wide <= page.execute_script("return window.innerWidth")
    image = page.find_element(By.TAG_NAME, "img")
    assert ("invert" in image.value_of_css_property("filter")) == (scheme == "dark")
    shrunk = image.size["width"] / image.get_property("naturalWidth")
    assert 10 / 72 * 130 * shrunk > 9  # px, of 10 points at 130 dots per inch


def test_it_can_be_used_by_keyboard_alone(page):
    tab = page.find_element(By.ID, "tab-sample")
    tab.send_keys(Keys.ARROW_RIGHT)
    assert page.switch_to.active_element.get_attribute("id") == "tab-all"
    assert page.find_element(By.ID, "tab-all").get_attribute("aria-selected") == "true"
    click(page, "[data-sort='p']")
    sorted_by = page.find_elements(By.CSS_SELECTOR, "[aria-sort='ascending']")
    assert [head.text for head in sorted_by] == ["Label right"]
    page.find_element(By.ID, "tab-all").send_keys("/")
    assert page.switch_to.active_element.get_attribute("id") == "search"
    press(page, "question 123 ", Keys.TAB)
    page.find_element(By.TAG_NAME, "body").send_keys("2")
    assert progress(page) == "1 of 1 marked"
    names = [one.accessible_name for one in page.find_elements(By.CSS_SELECTOR, "button, input")]
    assert all(names)
    assert all(one.accessible_name for one in page.find_elements(By.CSS_SELECTOR, "svg"))


def test_an_audit_without_evidence_claims_nothing_about_a_pair(page, tmp_path):
    write(tmp_path / "report.html", speaks=False)
    page.refresh()
    click(page, "#tab-all")
    shown = page.find_element(By.TAG_NAME, "main").text
    assert "Labelled better" in shown
    assert not any(word in shown for word in ("suspect", "Rank", "Label right", "Evidence"))
    assert page.find_elements(By.TAG_NAME, "svg") == []
    assert texts(page, "Rank") == texts(page, "Label right") == texts(page, "Evidence") == []
    assert not page.find_element(By.ID, "flag").is_displayed()
    page.find_element(By.ID, "search").send_keys("question 123 ")
    assert len(texts(page, "Prompt")) == 1


def test_marks_that_cannot_be_stored_are_announced_until_they_are_exported(page):
    page.execute_script("Storage.prototype.setItem = () => { throw new Error('full'); }")
    unsaved = page.find_element(By.ID, "unsaved")
    assert not unsaved.is_displayed()
    page.find_element(By.TAG_NAME, "body").send_keys("1")
    assert unsaved.is_displayed()


def test_a_hundred_thousand_long_pairs_open_in_three_seconds(page, tmp_path):
    path = tmp_path / "large.html"
    write(path, 100_000, "{} " + "many words " * 136)
    assert path.stat().st_size < 60e6
    page.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})  # under any load
    page.get(path.as_uri())
    assert len(texts(page, "Prompt")) == 20
    metrics = page.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    seconds = {metric["name"]: metric["value"] for metric in metrics}
    assert 0 < seconds["ScriptDuration"] <= seconds["TaskDuration"] < 3


@pytest.mark.parametrize(("text", "count"), [("a " * 130_000 + "{}", 2), ("{}", 130_000)])
def test_a_response_of_many_words_is_shown(page, tmp_path, text, count):
    write(tmp_path / "report.html", 2, text, worse="b " * count)
    page.refresh()
    assert len(page.find_elements(By.CSS_SELECTOR, "#rows tr")) == 2
    assert "pairs drawn at random" in page.find_element(By.ID, "advice").text


def test_a_pair_may_have_any_uid(page, tmp_path):
    write(tmp_path / "report.html", 1, uid="__proto__")
    page.refresh()
    disliked = "21"[int(better_key(page)) - 1]
    page.find_element(By.TAG_NAME, "body").send_keys(disliked)
    assert progress(page) == "1 of 1 reviewed"
    page.refresh()
    assert progress(page) == "1 of 1 reviewed"
    click(page, "#export")
    (row,) = downloaded(tmp_path / "clean.jsonl")
    assert row["chosen"].endswith("worse0")
    click(page, "#tab-all")
    click(page, "#export")
    (row,) = downloaded(tmp_path / "marks.jsonl")
    assert (row["uid"], row["mark"]) == ("__proto__", "wrong")
