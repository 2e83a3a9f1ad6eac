"""The protocol of a study: what makes a profile evidence."""

import re
from functools import cache

from pydantic import model_validator

from effnet_lib import Settings
from effnet_study.files import ROOT
from effnet_study.machine import git


class Protocol(Settings):
    """The section of report/PROTOCOL.md that fixes a study, and the commit that fixed it.

    ValueError unless report/PROTOCOL.md says, now and at that commit, that the section is fixed.
    """

    section: str
    commit: str

    @model_validator(mode="after")
    def _check(self) -> "Protocol":
        place = "report/PROTOCOL.md"
        for commit, where in ((None, place), (self.commit, f"{place} of commit {self.commit}")):
            text = protocol_text(commit)
            if text is None:
                raise ValueError(f"{where} is not in this repository; name the commit that fixed {self.section!r}")
            found = re.search(rf"^## Study `{re.escape(self.section)}`\n+(.*)", text, re.MULTILINE)
            if found is None:
                raise ValueError(f"{where} has no section '## Study `{self.section}`'")
            if not found[1].startswith("*Fixed"):
                raise ValueError(f"{where} does not say that {self.section!r} is fixed (*Fixed ...*): {found[1]!r}")
        return self


@cache
def protocol_text(commit: str | None) -> str | None:
    """Read report/PROTOCOL.md as it is now, or at a commit. None if it is not there. Without Git, or in a shallow clone
    that lacks the commit, the present text serves for both."""
    path = ROOT / "report" / "PROTOCOL.md"
    now = path.read_text(encoding="utf-8") if path.exists() else None
    if commit is None:
        return now
    try:
        shown = git("show", f"{commit}:report/PROTOCOL.md", root=ROOT)
        whole = git("rev-parse", "--is-shallow-repository", root=ROOT).stdout.strip() == "false"
    except FileNotFoundError:  # no git
        return now
    if shown.returncode == 0:
        return shown.stdout
    return None if whole else now
