"""The templates in report/, which Jinja fills in, and what they need to put numbers and names into words."""

import math

import jinja2

from effnet_study.analysis.statistics import half_up
from effnet_study.files import ROOT
from effnet_study.methods import listed, spoken


def number(value: float, form: str = ".2f") -> str:
    """Format a number with a true minus sign, or a dash if there is none."""
    return format(half_up(value), form).replace("-", "−") if math.isfinite(value) else "–"


def capital(sentence: str) -> str:
    """Return a sentence with a capital first letter. The other letters stay."""
    return sentence[:1].upper() + sentence[1:]


def fill_in(template: str, **values: object) -> str:
    """Return report/TEMPLATE with these values."""
    loader, escaped = jinja2.FileSystemLoader(ROOT / "report"), jinja2.select_autoescape(["html"])
    environment = jinja2.Environment(loader=loader, autoescape=escaped, trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"number": number, "listed": listed, "capital": capital, "spoken": spoken}
    return environment.get_template(template).render(**values)
