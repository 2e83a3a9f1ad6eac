"""The documents of the study of made_up.py, which never took place: made once for test_report.py and test_page.py."""

import re
from pathlib import Path

import pytest
from made_up import write_study
from pypdf import PdfReader

from effnet_study.documents.compose import main
from effnet_study.documents.evidence import Study, load_study
from effnet_study.profile import load_profile


def load(name: Path | str, results: Path) -> Study:
    return load_study(load_profile(name), results)


def text_of(pdf) -> str:
    """All words of a PDF in one line."""
    return " ".join(" ".join(page.extract_text() for page in PdfReader(pdf).pages).split())


def plain(text: str) -> str:
    """The text with hyphens for minus signs, and one space between words."""
    return re.sub(r"\s+", " ", text.replace("−", "-"))


@pytest.fixture(scope="session")
def made_up(tmp_path_factory) -> tuple[Path, Path]:
    """Profile and results of a study with two seeds, finished as planned."""
    return write_study(tmp_path_factory.mktemp("made_up"), seeds=2)


@pytest.fixture(scope="session")
def study(made_up) -> Study:
    """That study."""
    return load(*made_up)


@pytest.fixture(scope="session")
def rebuilt(made_up, tmp_path_factory) -> Path:
    """A folder with everything that `make report` writes of it, from tables and figures as they are."""
    folder = tmp_path_factory.mktemp("rebuilt")
    main(str(made_up[0]), made_up[1], folder, keep_figures=True)
    return folder


@pytest.fixture(scope="session")
def report(rebuilt) -> str:
    """The words of its report."""
    return plain(text_of(rebuilt / "report" / "report.pdf"))


@pytest.fixture(scope="session")
def poster(rebuilt) -> str:
    """The words of its poster."""
    return plain(text_of(rebuilt / "poster" / "poster.pdf"))
