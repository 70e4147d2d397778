from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from alignkit.errors import CheckpointError
from alignkit.evaluation.pictures import measure
from alignkit.evaluation.record import Change, read_run
from alignkit.evaluation.report import (
    Card,
    cards,
    cases,
    commands,
    policy_panels,
    render,
    reward_panels,
    show_number,
    write_report,
)
from tests.evaluation.synthetic_run import write_run

HOSTILE = '</script><img src=x onerror="alert(1)">{{7*7}}'
FILES = ("recipe.json", "env.json", "summary.json", "metrics.jsonl", "samples/index.json")


class Page(HTMLParser):
    """Every tag with its attributes, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def attributes(self, name: str) -> list[str]:
        return [str(attrs[name]) for _, attrs in self.tags if name in attrs]


@pytest.fixture
def full_run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "runs" / "quickstart")


@pytest.fixture
def run(full_run: Path) -> Path:
    """The same with two metrics only: most of a report's time is its curves."""
    rows = [{"step": 1, "heldout/ocr": 0.652}, {"step": 2, "heldout/ocr": 0.9, "policy/kl": 0.01}]
    (full_run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return full_run


def page(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def change(file: Path, **entries: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_a_finished_run_shows_every_section(full_run: Path) -> None:
    text = page(full_run).text
    for heading in ("Before and after", "The same prompts and seeds", "Rewards over training", "How training went"):
        assert heading in text
    for heading in ("Diversity within groups", "Image statistics", "Again", "Environment", "The recipe, resolved"):
        assert heading in text
    for number in ("0.652", "0.951", "0.830", "0.944"):  # base, aligned, guidance, own scheduler
        assert number in text
    assert "missing" not in text


def test_the_page_is_one_file_without_scripts_that_loads_nothing(full_run: Path) -> None:
    found = page(full_run)
    assert not {tag for tag, _ in found.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert all(source.startswith("data:image/png;base64,") for source in found.attributes("src"))
    assert all(link.startswith("#") for name in ("href", "xlink:href") for link in found.attributes(name))
    policy = next(a["content"] for _, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    assert not [name for _, attrs in found.tags for name in attrs if name.startswith("on")]
    assert not list(full_run.glob("*.tmp"))


def test_text_from_the_run_is_escaped_wherever_it_appears(run: Path) -> None:
    hostile_reward = {HOSTILE: {"before": 0.1, "after": 0.2}}
    change(run / "summary.json", recipe=HOSTILE, seed=HOSTILE, rewards=hostile_reward, judges=hostile_reward)
    change(run / "recipe.json", note=HOSTILE)
    change(run / "env.json", **{HOSTILE: HOSTILE, "command": HOSTILE})
    picture = {"file": HOSTILE, "prompt": HOSTILE, "reads": {HOSTILE: HOSTILE}, "right": True}
    grid = {"title": HOSTILE, "note": HOSTILE, "images": [picture]}
    (run / "samples" / "index.json").write_text(json.dumps([grid]))
    rows = [{"step": 1, f"reward/{HOSTILE}": 1.0, f"heldout/{HOSTILE}": 2.0, HOSTILE: 3.0}]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = page(run)
    assert not found.attributes("onerror") and "script" not in {tag for tag, _ in found.tags}
    assert "{{7*7}}" in found.text and "</script><img src=x49" not in found.text
    assert found.text.count(HOSTILE) >= 8


@pytest.mark.parametrize("name", FILES)
def test_a_run_that_lacks_a_file_is_shown_and_the_file_is_named(run: Path, name: str) -> None:
    (run / name).unlink()
    assert f"{name} is missing" in page(run).text


@pytest.mark.parametrize("content", ["", "[1, 2]", '"text"', '[{"images": "none"}, 3]'])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_does_not_stop_the_report(run: Path, name: str, content: str) -> None:
    (run / name).write_text(content)
    assert "quickstart" in page(run).text


@pytest.mark.parametrize("entry", [3, "text", [1], {"ocr": 0.5}, {"ocr": {"before": "high", "after": None}}, None])
def test_a_summary_with_entries_of_another_form_does_not_stop_the_report(run: Path, entry: object) -> None:
    kinds = ("rewards", "judges", "diversity", "diversity_right", "baselines", "own_scheduler", "wall_seconds", "seed")
    change(run / "summary.json", **dict.fromkeys(kinds, entry))
    assert "quickstart" in page(run).text


def test_an_empty_directory_gives_a_page_that_says_what_is_missing(tmp_path: Path) -> None:
    found = page(tmp_path)
    assert all(name in found.text for name in FILES)
    assert "not finished" in found.text


def test_a_running_run_shows_its_held_out_metrics_so_far(run: Path) -> None:
    (run / "summary.json").unlink()
    found = page(run)
    assert "So far" in found.text and "0.652" in found.text and "not finished" in found.text
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text()[:-20])
    assert "1 line(s) could not be read" in page(run).text


def test_a_directory_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a run directory"):
        write_report(tmp_path / "nothing")


def test_only_images_inside_the_samples_folder_are_embedded(run: Path, tmp_path: Path) -> None:
    samples = run / "samples"
    png = (samples / "base" / "00.png").read_bytes()
    (run / "outside.png").write_bytes(png)
    (samples / "link.png").symlink_to(run / "outside.png")
    (samples / "text.png").write_text("not an image")
    files = ("../outside.png", str(run / "outside.png"), "link.png", "text.png", "none.png", "base/00.png")
    images = [{"file": name, "prompt": f"p{i}"} for i, name in enumerate(files)]
    (samples / "index.json").write_text(json.dumps([{"title": "base", "images": images}]))
    record = read_run(run)
    shown = [case.cells[0][1] for case in cases(record.grids, samples)]
    assert [bool(one and one.uri) for one in shown] == [False] * 5 + [True]
    problems = [one.problem for one in shown if one]
    assert all("outside samples/" in problem for problem in problems[:3])
    assert "not a PNG" in problems[3] and "missing" in problems[4]
    render(record)  # the statistics skip the same files
    for picture in record.grids[0].pictures:
        read = picture.file == samples / "base" / "00.png"
        assert bool(measure([picture], samples).statistics) is read


def test_the_same_prompt_stands_side_by_side_whatever_the_order(run: Path) -> None:
    def grid(title: str, prompts: list[str]) -> dict:
        return {"title": title, "images": [{"file": f"{title}{i}", "prompt": p} for i, p in enumerate(prompts)]}

    index = [grid("base", ["a", "b", "a"]), grid("aligned", ["b", "a"])]
    (run / "samples" / "index.json").write_text(json.dumps(index))
    rows = cases(read_run(run).grids, run / "samples")
    assert [row.prompt for row in rows] == ["a", "b", "a"]
    assert [row.cells[1][1] is None for row in rows] == [False, False, True]


def test_a_judge_that_fell_is_red_and_one_that_slipped_a_little_is_not(run: Path) -> None:
    change(
        run / "summary.json",
        judges={"color": {"before": 0.97, "after": 0.72}, "exact": {"before": 0.97, "after": 0.95}},
    )
    tones = {card.name: card.tone for card in cards(read_run(run)) if card.kind == "judge"}
    assert tones == {"color": "fell", "exact": "slipped"}
    assert "card judge fell" in page(run).attributes("class")


def test_a_card_places_its_numbers_on_one_scale() -> None:
    unit = Card("ocr", "trained", Change(0.25, 0.75), 0.5, None)
    assert (unit.place(0.25), unit.place(0.5), unit.place(1.0)) == (25, 50, 100)
    negative = Card("jpeg", "trained", Change(-4.0, -1.0), None, None)
    assert (negative.place(-4.0), negative.place(0.0)) == (0, 100)
    assert Card("constant", "trained", Change(0.0, 0.0), None, None).place(0.0) == 0


def test_commands_are_quoted_and_secrets_are_masked(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "a run; rm")
    change(run / "env.json", command=["/somewhere/bin/alignkit", "run", "x", "--token", "hf_abcdefghijklmnop"])
    said = dict(commands(read_run(run)))
    assert said["Started with"] == "alignkit run x --token •••"
    assert said["Repeat it with"] == "alignkit run 'runs/a run; rm/recipe.json' --out 'runs/a run; rm-again'"
    change(run / "recipe.json", server="https://user:secret@judge.example", key="sk-abcdefghijkl")
    html = write_report(run).read_text()
    assert not any(secret in html for secret in ("hf_abcdef", "user:secret", "sk-abcdef"))


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "–"),
        (0.0, "0"),
        (0.65, "0.650"),
        (-0.27, "-0.270"),
        (12.34, "12.3"),
        (12345.6, "12,346"),
        (2e-7, "2e-07"),
    ],
)
def test_numbers_are_written_to_be_read(value: float | None, text: str) -> None:
    assert show_number(value) == text


def test_distances_to_the_base_are_no_rewards(tmp_path: Path) -> None:
    rows = [{"step": i, "heldout/ocr": 0.5 + i / 10, "heldout/kl": 3.0 * i} for i in range(3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    record = read_run(tmp_path)
    assert [panel.title for panel in reward_panels(record)] == ["ocr"]
    assert [card.name for card in cards(record)] == ["ocr"]
    assert policy_panels(record.metrics)[0].title == "KL of sampled paths from the base, nats"
