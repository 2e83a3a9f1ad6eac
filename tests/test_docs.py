"""README and docs/: every link leads somewhere, every command exists, and what is counted in a table is so."""

import re
from pathlib import Path

import pytest
import typer

from effnet_lib import Scaling
from effnet_study.cli import app
from effnet_study.data.sources import DATA_SETS
from effnet_study.files import ROOT
from effnet_study.profile import load_profile, profile_names

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def rows(page: Path) -> list[list[str]]:
    """The cells of a page's tables, a list for each row."""
    return [line.strip("|").split(" | ") for line in page.read_text().splitlines() if line.startswith("|")]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)]+)\)", page.read_text())
    local = [link.partition("#")[0] for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page):
    commands = typer.main.get_command(app).commands
    for name, rest in re.findall(r"(?:^|`|effnet_study )effnet ([a-z]+)([^`\n#]*)", page.read_text(), re.MULTILINE):
        assert name in commands, name
        known = {
            option for parameter in commands[name].params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        assert set(re.findall(r"--[a-z-]+", rest)) <= known, (name, rest)


def test_every_profile_is_listed_with_its_size():
    listed = {}
    for cells in rows(ROOT / "docs" / "profiles.md"):
        if size := re.fullmatch(r"(\d+) x (\d+)", cells[2].strip()) if len(cells) > 2 else None:
            listed |= dict.fromkeys(re.findall(r"`([^`]+)`", cells[0]), tuple(map(int, size.groups())))
    profiles = {name: load_profile(name) for name in profile_names()}
    assert listed == {name: (len(profile.methods), len(profile.seeds)) for name, profile in profiles.items()}


def test_the_protocol_tells_the_budgets_of_question_5():
    profile = load_profile("pocket-x2")
    baseline = profile.cost(Scaling()).flops
    parts = [f"{profile.cost(profile.scaling(m)).flops / baseline:.2f} ({m[:-3]})" for m in profile.methods]
    text = " ".join((ROOT / "report" / "PROTOCOL.md").read_text().split())
    assert f"have {', '.join(parts[:3])} and {parts[3]} times the baseline's FLOPs" in text


def test_every_data_set_is_listed():
    first = " ".join(cells[0] for cells in rows(ROOT / "docs" / "data.md"))
    assert set(re.findall(r"`([a-z0-9-]+)(?::PATH)?`", first)) == set(DATA_SETS)
