"""A reproduction study of EfficientNet's compound scaling. Notebooks use these names; see README, Layout."""

from effnet_study.data.load import load_data
from effnet_study.execution.notebook import check_notebook
from effnet_study.files import NOTEBOOKS, RESULTS, load_history, save_figure, save_table
from effnet_study.machine import choose_device, device_name
from effnet_study.methods import COLORS, color
from effnet_study.profile import load_profile
from effnet_study.progress import live
from effnet_study.record import read_record
from effnet_study.run import Run, load_runs
from effnet_study.search import plan_search

STYLE = NOTEBOOKS / "study.mplstyle"  # for matplotlib: plt.style.use(study.STYLE)

__all__ = [
    "COLORS",
    "NOTEBOOKS",
    "RESULTS",
    "STYLE",
    "Run",
    "check_notebook",
    "choose_device",
    "color",
    "device_name",
    "live",
    "load_data",
    "load_history",
    "load_profile",
    "load_runs",
    "plan_search",
    "read_record",
    "save_figure",
    "save_table",
]
