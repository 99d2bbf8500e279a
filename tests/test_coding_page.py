"""The coding page, in a real browser: Debian's chromium, if it and selenium are installed."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import LABELS, Bench, make_texts

import enrich_dataset as module

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
if not shutil.which("chromium") or not shutil.which("chromedriver"):
    pytest.skip("chromium and chromedriver are not installed", allow_module_level=True)

HOSTILE = [
    "<script>document.title = 'gone'</script>",
    "</script><img src=x onerror=\"document.title='gone'\">",
    "&amp; &lt;b&gt; are what they are, <b>too</b>",
    "two lines\nand  two  spaces",
    "كل البشر يولدون أحرارا",
    'a "quoted" one, with a comma; and a semicolon',
    "STYLE_HASH DATA ${1} \\u0041 <!-- <script>",
]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    with start(tmp_path / "profile", tmp_path / "saved") as driver:
        yield driver


def start(profile: Path, saved: Path, width: int = 1200) -> Any:
    saved.mkdir(exist_ok=True)
    options = webdriver.ChromeOptions()
    for argument in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={profile}", f"--window-size={width},900",
    ):  # fmt: skip
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(saved)})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    options.binary_location = str(shutil.which("chromium"))
    return webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))


def page_of(bench: Bench) -> str:
    return Path(f"{bench.output}.sample.html").as_uri()


def press(driver: Any, *keys: str) -> None:
    """To whatever has the focus, as a person does."""
    for key in keys:
        driver.switch_to.active_element.send_keys(key)


def open_page(driver: Any, bench: Bench, coder: str = "ann") -> None:
    from selenium.webdriver.common.by import By

    driver.get(page_of(bench))
    if not driver.find_element(By.ID, "coder").get_property("value"):
        press(driver, coder, "\ue004")
    driver.execute_script("document.getElementById('place').focus()")


def shown(driver: Any, name: str) -> str:
    from selenium.webdriver.common.by import By

    return str(driver.find_element(By.ID, name).text)


def saved_file(driver: Any, folder: Path, coder: str = "ann") -> Path:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    driver.find_element(By.ID, "save").click()
    path = folder / f"out.csv.sample.{coder}.csv"
    WebDriverWait(driver, 10).until(
        lambda _: path.exists() and path.stat().st_size and not [*folder.glob("*.crdownload")]
    )
    return path


def requests(driver: Any) -> set[str]:
    """The kinds of addresses that the page has asked for; the browser's own pages ask too."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return {each["request"]["url"].partition(":")[0] for each in sent if each["documentURL"].startswith("file:")}


def test_ten_texts_are_coded_by_keys_kept_saved_and_compared(bench: Bench, tmp_path: Path) -> None:
    bench.write(make_texts(100)).enrich(sample=12)
    profile, saved = tmp_path / "profile", tmp_path / "saved"
    with start(profile, saved) as driver:
        open_page(driver, bench)
        assert shown(driver, "progress") == "0 of 12 texts finished"
        for _ in range(5):
            press(driver, "1", "0", "\ue007")  # the first label applies, the others do not; Enter
        assert shown(driver, "progress") == "5 of 12 texts finished"
        assert shown(driver, "place") == "Text 6 of 12"
    with start(profile, saved) as driver:  # closed, and opened again
        open_page(driver, bench)
        assert shown(driver, "progress") == "5 of 12 texts finished"
        assert shown(driver, "place") == "Text 6 of 12"
        for _ in range(5):
            press(driver, "2", "2", "3", "0", "\ue014")  # applies, does not; applies; the rest; right
        press(driver, "1")
        assert shown(driver, "told").startswith(
            "praising_violence: applies. Kept in this browser; changes since the last"
        )
        assert shown(driver, "progress") == "10 of 12 texts finished"
        path = saved_file(driver, saved, "ann")
        assert requests(driver) <= {"file", "blob", "data"}
    rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))
    assert [[row[label] for label in LABELS] for row in rows] == [["1", "0", "0"]] * 5 + [["0", "0", "1"]] * 5 + [
        ["1", "", ""], [""] * 3,
    ]  # fmt: skip
    told = bench.enrich(gold=path).attrs["enrichment"]
    assert told["draw"]["coded"] == {LABELS[0]: 11, LABELS[1]: 10, LABELS[2]: 10}
    assert set(told["corrected_shares"]) == set(LABELS)


def test_texts_are_data_whatever_they_hold(bench: Bench, browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By

    labels = {"<i>a</i> label": "a <b>definition</b>", "other": "another"}
    with bench.input.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("thread", "text"), *((f"<u>{text}</u>", text) for text in HOSTILE)])
    module.enrich_dataset(
        bench.input,
        bench.output,
        "text",
        None,
        labels,
        base_url=bench.server.url,
        sample=9,
        context=["thread"],
        quiet=True,
    )
    open_page(browser, bench)
    seen = set()
    for _ in HOSTILE:
        seen.add(browser.find_element(By.ID, "text").get_property("textContent"))
        assert shown(browser, "context").startswith("Context, not to be coded: thread\n<u>")
        press(browser, "\ue014")
    assert seen == set(HOSTILE)
    assert browser.title == "Coding"
    assert not browser.find_elements(By.CSS_SELECTOR, "img, i, b, u")
    assert "<i>a</i> label" in shown(browser, "labels")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
    assert requests(browser) <= {"file", "data"}
    path = saved_file(browser, tmp_path / "saved")
    rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline="")))
    assert {row["text"] for row in rows} == set(HOSTILE)


def test_a_script_that_got_in_all_the_same_would_not_run(bench: Bench, browser: Any) -> None:
    bench.write(make_texts(5)).enrich(sample=5)
    path = Path(f"{bench.output}.sample.html")
    path.write_text(path.read_text(encoding="utf-8") + "<script>document.title = 'gone'</script>", encoding="utf-8")
    browser.get(path.as_uri())
    assert browser.title == "Coding"


def test_a_saved_file_is_opened_again_elsewhere_and_a_sample_that_has_grown_keeps_its_codes(
    bench: Bench, tmp_path: Path
) -> None:
    from selenium.webdriver.common.by import By

    bench.write(make_texts(100)).enrich(sample=5)
    saved = tmp_path / "saved"
    with start(tmp_path / "one", saved) as driver:
        open_page(driver, bench)
        for _ in range(4):
            press(driver, "1", "0", "\ue014")
        path = saved_file(driver, saved)
        bench.enrich(sample=8)
        open_page(driver, bench)
        assert shown(driver, "progress") == "4 of 8 texts finished"
    with start(tmp_path / "two", saved) as driver:
        open_page(driver, bench)
        assert shown(driver, "progress") == "0 of 8 texts finished"
        driver.find_element(By.ID, "load").send_keys(str(path))
        assert shown(driver, "told").startswith("Codes added: 12; others that differ from yours, which stay: 0.")
        assert shown(driver, "progress") == "4 of 8 texts finished"


def test_three_coders_on_three_copies_are_compared(bench: Bench, tmp_path: Path) -> None:
    bench.write(make_texts(60)).enrich(sample=10)
    paths = []
    for coder, keys in (("ann", "1 "), ("ben", "1 "), ("cem", "2 ")):
        with start(tmp_path / "one browser", tmp_path / "saved") as driver:  # which keeps each person's codes apart
            driver.get(page_of(bench))
            driver.execute_script("localStorage.removeItem('coder')")
            open_page(driver, bench, coder)
            assert shown(driver, "progress") == "0 of 10 texts finished"
            for number in range(10):
                press(driver, *(keys if number % 2 else " "))
            assert shown(driver, "told").startswith("All texts are finished. Save them.")
            paths.append(saved_file(driver, tmp_path / "saved", coder))
    told = bench.enrich(coders=paths).attrs["enrichment"]
    assert told["coders"][LABELS[0]]["texts"] == 10
    assert told["coders"][LABELS[0]]["agreement"] == pytest.approx((5 + 5 / 3) / 10)
    assert told["coders"][LABELS[2]]["agreement"] == 1
    assert told["cells_not_settled"] == 0


@pytest.mark.parametrize("width", [1200, 380])
def test_nothing_is_wider_than_the_window_and_all_controls_have_names(bench: Bench, tmp_path: Path, width: int) -> None:
    from selenium.webdriver.common.by import By

    bench.write([f"{text} {'x' * 300}" for text in make_texts(5)]).enrich(sample=5)
    with start(tmp_path / "profile", tmp_path / "saved", width) as driver:
        open_page(driver, bench)
        driver.set_window_size(width, 900)
        assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        for control in driver.find_elements(By.CSS_SELECTOR, "button, input"):
            assert control.accessible_name
        assert driver.find_element(By.CSS_SELECTOR, "fieldset").accessible_name.startswith("1 praising_violence")


def test_without_a_name_nothing_is_coded_and_keys_leave_controls_alone(bench: Bench, browser: Any) -> None:
    from selenium.webdriver.common.by import By

    bench.write(make_texts(5)).enrich(sample=5)
    browser.get(page_of(bench))
    browser.execute_script("document.getElementById('place').focus()")
    press(browser, "1")
    assert shown(browser, "told").startswith("Type your name or initials first")
    press(browser, "a1", "\ue004")
    assert shown(browser, "progress") == "0 of 5 texts finished"
    radio = browser.find_elements(By.CSS_SELECTOR, "fieldset input")[0]
    radio.click()
    press(browser, "\ue015")  # down, within the group: it does not apply
    assert browser.find_element(By.CSS_SELECTOR, "fieldset input:checked").get_property("value") == "0"
    assert shown(browser, "place") == "Text 1 of 5"
    browser.find_element(By.ID, "rest").click()
    press(browser, "\ue007")
    assert (shown(browser, "progress"), shown(browser, "place")) == ("1 of 5 texts finished", "Text 2 of 5")


def test_it_holds_what_the_csv_holds_and_nothing_of_the_model(bench: Bench) -> None:
    bench.write(make_texts(50)).enrich(sample=10)
    page = Path(f"{bench.output}.sample.html").read_text(encoding="utf-8")
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert set(data) == {"digest", "file", "column", "context", "labels", "rows"}
    assert {frozenset(row) for row in data["rows"]} == {frozenset(["id", "text", "context"])}
    sample = Path(f"{bench.output}.sample.csv").read_text(encoding="utf-8-sig")
    assert [row["id"] for row in data["rows"]] == [line.partition(",")[0] for line in sample.splitlines()[1:]]
