"""The blind comparison: pairs from folders, a page that gives nothing away, and the count of its answers."""

import base64
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from scipy.stats import binomtest

from hollow_core.errors import HollowError
from hollow_core.evaluation.ab_page import find_pairs, summarise, wilson, write_page
from hollow_core.files import write_json

RED, BLUE = (200, 30, 30), (30, 30, 200)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """As `hollow benchmark` leaves them: red pictures by one way, blue ones by the other."""
    Image.new("RGB", (9, 8), "green").save(tmp_path / "photo.jpg")
    for way, color in (("lora-r128", RED), ("hollowed-k3-r128", BLUE)):
        job = tmp_path / way / "seed-0" / "my_cup"
        (job / "pictures").mkdir(parents=True)
        pictures = []
        for number in range(40):
            Image.new("RGB", (600, 600), color).save(job / "pictures" / f"{number:02}-0.png")
            pictures.append({"file": f"{number:02}-0.png", "prompt": f"a sks cup </script> number {number}"})
        write_json(job / "scores.json", {"references": [str(tmp_path / "photo.jpg")], "pictures": pictures})
    return tmp_path


def written(results: Path, seed: int = 0, tasks: int = 25) -> tuple[Path, Path]:
    pairs = find_pairs(results / "lora-r128", results / "hollowed-k3-r128")
    page = results / f"page-{seed}.html"
    return page, write_page(page, pairs, ("lora", "hollowed"), torch.Generator().manual_seed(seed), tasks)


def tasks_of(page: Path) -> dict[str, Any]:
    match = re.search(r"const study = (.+);\n", page.read_text())
    assert match is not None
    return json.loads(match[1])


def color(data: str) -> tuple[int, ...]:
    encoded = base64.b64decode(data.removeprefix("data:image/jpeg;base64,"))
    path = Path("picture.jpg")
    path.write_bytes(encoded)
    with Image.open(path) as picture:
        assert max(picture.size) <= 512
        return tuple(picture.getpixel((0, 0)))  # type: ignore[arg-type]


def test_the_key_knows_whose_pictures_are_where(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page, key = written(results)
    study, told = tasks_of(page), json.loads(key.read_text())
    assert study["page"] == told["page"]
    assert len(study["tasks"]) == len({task["prompt"] for task in study["tasks"]}) == 25
    lefts = Counter(task["left"] for task in told["tasks"])
    assert min(lefts.values()) > 5  # in random order
    for task, secret in zip(study["tasks"], told["tasks"], strict=True):
        expected = {"a": (RED, BLUE), "b": (BLUE, RED)}[secret["left"]]
        for side, wanted in zip(("left", "right"), expected, strict=True):
            assert color(task[side]) == pytest.approx(wanted, abs=6)
        assert task["prompt"] == f"a cup </script> number {int(Path(secret['name']).stem[:2])}"
    assert written(results)[0].read_bytes() == page.read_bytes()
    assert tasks_of(written(results, seed=1)[0]) != study


def test_the_page_tells_nothing_and_asks_nothing_of_the_network(results: Path) -> None:
    html = re.sub(r"base64,[^\"]+", "", written(results)[0].read_text())
    for secret in ("lora", "hollowed", "my_cup", "sks ", str(results), "http:", "https:", "src=", "@import"):
        assert secret not in html, secret
    assert html.count("</script>") == 1


def test_any_two_folders_go_with_prompts_and_references(results: Path, tmp_path: Path) -> None:
    a, b = (results / way / "seed-0" / "my_cup" / "pictures" for way in ("lora-r128", "hollowed-k3-r128"))
    (results / "refs").mkdir()
    (results / "photo.jpg").rename(results / "refs" / "photo.jpg")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a sks cup, a\na sks cup, b\n")
    pairs = find_pairs(a, b, results / "refs", prompts)
    assert [pair.prompt for pair in pairs] == ["a cup, a"] * 20 + ["a cup, b"] * 20
    assert pairs[0].references == (results / "refs" / "photo.jpg",)

    with pytest.raises(HollowError, match="both --references and --prompts"):
        find_pairs(a, b, prompts=prompts)
    with pytest.raises(HollowError, match="have no pictures of the same names"):
        find_pairs(a, results / "refs")
    (a.parent / "scores.json").unlink()
    with pytest.raises(HollowError, match="Nothing is known of"):
        find_pairs(a, b)
    with pytest.raises(HollowError, match="0 tasks are too few"):
        write_page(tmp_path / "page.html", pairs, ("a", "b"), torch.Generator(), tasks=0)


def test_answers_are_counted_for_whom_they_mean(results: Path) -> None:
    keys, answers = [], []
    for seed in (0, 1):
        _, key = written(results, seed)
        told = json.loads(key.read_text())
        lefts = [task["left"] for task in told["tasks"]]
        given = [
            {"subject": "left" if left == "a" else "right", "text": "tie" if number < 10 else "left"}
            for number, left in enumerate(lefts)
        ]
        keys.append(key)
        answers.append(results / f"answers-{seed}.json")
        write_json(answers[-1], {"page": told["page"], "person": seed, "answers": given})
    counted = summarise(keys, answers)
    assert (counted["a"], counted["b"], counted["people"]) == ("lora", "hollowed", 2)
    assert {whose: share.answers for whose, share in counted["subject"].items()} == {"a": 50, "tie": 0, "b": 0}
    assert counted["text"]["tie"][:2] == (20, 0.4)
    assert counted["text"]["a"].answers + counted["text"]["b"].answers == 30

    with pytest.raises(HollowError, match="does not answer the page of this key"):
        summarise(keys[:1], answers)
    with pytest.raises(HollowError, match=r"answers-0\.json is no key\. Give the \.key\.json"):
        summarise(answers, keys)
    with pytest.raises(HollowError, match="are of one person"):
        summarise(keys, [answers[0], answers[0]])
    write_json(answers[0], json.loads(answers[0].read_text().replace('"tie"', '"both"')))
    with pytest.raises(HollowError, match="holds the answer 'both'"):
        summarise(keys, answers)


@pytest.mark.parametrize(("count", "total"), [(0, 25), (25, 25), (312, 1000), (1, 3)])
def test_intervals_are_wilsons(count: int, total: int) -> None:
    theirs = binomtest(count, total).proportion_ci(method="wilson")
    assert wilson(count, total) == pytest.approx((theirs.low, theirs.high), abs=1e-6)


@pytest.mark.skipif(CHROMIUM is None, reason="There is no Chromium on the PATH")
def test_a_person_answers_the_page(results: Path, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    page_path, key = written(results, tasks=3)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        complaints: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(page_path.as_uri())
        for number, (subject, text) in enumerate((("left", "tie"), ("right", "right"), ("tie", "left"))):
            page.locator(f"input[name=subject][value={subject}]").check(force=True)
            assert page.locator("#next").is_disabled()  # both are asked for
            page.locator(f"input[name=text][value={text}]").check(force=True)
            if number == 1:
                page.reload()  # nothing is lost
                assert page.locator("#where").inner_text() == "3 of 3"
            else:
                page.locator("#next").click()
        with page.expect_download() as download:
            page.locator("#download").click()
        download.value.save_as(tmp_path / "answers.json")
        browser.close()
    assert complaints == []
    answers = json.loads((tmp_path / "answers.json").read_text())["answers"]
    assert [answer["subject"] for answer in answers] == ["left", "right", "tie"]
    assert summarise([key], [tmp_path / "answers.json"])["text"]["tie"].answers == 1
