"""The files that describe the environment agree: pyproject.toml, requirements.txt, environment.yml, Dockerfile.

Nothing is downloaded: only an installation shows whether the pinned versions exist.
"""

import json
import re
import shlex
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from conftest import pytest_runtest_setup
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from effnet_study.machine import git_state

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = SpecifierSet(PROJECT["requires-python"])
EXTRAS = PROJECT["optional-dependencies"]
LOCKED = (ROOT / "requirements.txt").read_text()  # with the command that made it
PINS = [Requirement(line) for line in LOCKED.splitlines() if not line.startswith("#")]
MACHINES = [  # for which torch has wheels
    {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"},
    {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "aarch64"},
    {"sys_platform": "darwin", "platform_system": "Darwin", "platform_machine": "arm64"},
]


def read(name: str) -> str:
    return (ROOT / name).read_text()


def dockerfile(instruction: str) -> list[list[str]]:
    """The words of each such instruction of the Dockerfile, without its options."""
    text = read("Dockerfile").replace("\\\n", " ")
    found = [shlex.split(line) for line in text.splitlines() if line.startswith(f"{instruction} ")]
    return [[word for word in words[1:] if not word.startswith("--")] for words in found]


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: "-".join(machine.values()))
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_every_dependency_is_pinned_once(python, machine):
    assert python in PYTHONS
    where = machine | {"os_name": "posix", "python_version": python, "python_full_version": f"{python}.7"}
    pinned: dict[str, str] = {}
    for pin in PINS:
        if pin.marker is None or pin.marker.evaluate(where):
            [exact] = pin.specifier
            assert exact.operator == "==" and "*" not in exact.version, pin
            assert pinned.setdefault(canonicalize_name(pin.name), exact.version) == exact.version, pin
    for line in [*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)]:
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate(where):
            assert wanted.specifier.contains(pinned[canonicalize_name(wanted.name)]), line


def test_the_command_of_requirements_names_every_extra():
    comment = re.sub(r"\\\n#", "", "".join(re.findall(r"^#.*\n", LOCKED, re.M)))
    words = shlex.split(re.search(r"uv pip compile .*", comment)[0])
    assert sorted(name for option, name in pairwise(words) if option == "--extra") == sorted(EXTRAS)
    assert words[-3:] == ["pyproject.toml", "-o", "requirements.txt"] and "--universal" in words
    assert PROJECT["requires-python"] == ">=" + words[words.index("--python-version") + 1]


def test_conda_is_given_the_same_list_and_this_project():
    *from_conda, from_pip = yaml.safe_load(read("environment.yml"))["dependencies"]
    [python] = [re.fullmatch(r"python=(\d+\.\d+)", line)[1] for line in from_conda if line.startswith("python")]
    assert python in PYTHONS and "pip" in from_conda  # without pip conda takes one of its own choice
    assert from_pip == {"pip": ["-r requirements.txt", "-e ."]}


def test_the_base_image_has_the_cuda_of_torch():
    [[base]] = dockerfile("FROM")
    image = re.fullmatch(r"nvidia/cuda:(\d+)\.\d+\.\d+-base-ubuntu\d\d\.04", base)[1]
    wheels = {re.search(r"-cu(\d+)$", pin.name)[1] for pin in PINS if re.search(r"^nvidia-.*-cu\d+$", pin.name)}
    [toolkit] = [next(iter(pin.specifier)).version.split(".")[0] for pin in PINS if pin.name == "cuda-toolkit"]
    assert wheels == {toolkit} == {image}


def test_what_the_image_copies_is_there():
    copied = [source for *sources, _ in dockerfile("COPY") for source in sources]
    assert "requirements.txt" in copied and all((ROOT / source).exists() for source in copied)


def test_the_image_is_given_nothing_that_git_ignores():
    """Data, checkpoints and environments of the host. A bare name holds at any depth for git, at the top for Docker."""
    ignored = [line.rstrip("/") for line in read(".gitignore").splitlines() if line and not line.startswith("#")]
    expected = {line.removeprefix("/") if line.startswith("/") else f"**/{line}" for line in ignored}
    assert {line for line in read(".dockerignore").splitlines() if not line.startswith("#")} == expected | {".git"}


def test_where_there_is_no_checkout_the_build_argument_names_the_commit(monkeypatch, tmp_path):
    for given, expected in [("0c56083", "0c56083"), ("", None)]:  # an image built without it has an empty one
        monkeypatch.setenv("EFFNET_COMMIT", given)
        assert git_state(tmp_path) == {"commit": expected, "dirty": None}


def test_the_dev_container_builds_the_dockerfile():
    folder = ROOT / ".devcontainer"
    build = json.loads((folder / "devcontainer.json").read_text())["build"]
    assert (folder / build["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert (folder / build["context"]).resolve() == ROOT


def test_every_module_and_package_is_installed():
    tools = tomllib.loads(read("pyproject.toml"))["tool"]["setuptools"]
    assert tools["py-modules"] == [path.stem for path in ROOT.glob("*.py")] == ["effnet_lib"]
    packages = [path.parent for path in ROOT.glob("effnet_study/**/__init__.py")]
    found = {name for name in tools["packages"]["find"]["include"]}
    assert packages and found == {"effnet_study*"}  # setuptools finds all packages below it
    assert {path.parent for path in ROOT.glob("effnet_study/**/*.py")} == set(packages)


@pytest.fixture
def kept_together():
    """A fixture whose tests conftest.py keeps on one worker."""


def test_tests_that_share_a_fixture_are_kept_on_one_worker(request, kept_together):
    """pytest-xdist marks a group in the name of its tests. If it cannot, it says nothing."""
    if request.config.getoption("dist", "no") == "loadgroup" or request.config.getoption("loadgroup", False):
        assert request.node.nodeid.endswith("@kept_together")


def test_tests_that_begin_too_late_are_skipped(monkeypatch):
    monkeypatch.setenv("EFFNET_TESTS_UNTIL", "1")
    with pytest.raises(pytest.skip.Exception, match="the time for tests is over"):
        pytest_runtest_setup(None)
    monkeypatch.setenv("EFFNET_TESTS_UNTIL", "inf")
    pytest_runtest_setup(None)
