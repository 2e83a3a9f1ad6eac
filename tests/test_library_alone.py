"""effnet_lib.py is one file that needs nothing of ours: copied into an empty folder, it trains a network there."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import effnet_lib
from effnet_lib import EfficientNet, Scaling, count_cost

SOURCE, PROGRAM = Path(effnet_lib.__file__), Path(__file__).with_name("ten_lines.py")


def test_the_library_is_read_in_one_sitting():
    assert len(SOURCE.read_text().splitlines()) <= 600


def test_the_library_imports_only_torch_numpy_and_pydantic():
    imported = set()
    for node in ast.walk(ast.parse(SOURCE.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "numpy", "pydantic"}


def test_the_library_alone_counts_and_trains_in_ten_lines(tmp_path):
    shutil.copy(SOURCE, tmp_path)
    shutil.copy(PROGRAM, tmp_path)
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "EFFNET"))}
    variables["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, PROGRAM.name]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    file, numbers, modules = done.stdout.splitlines()
    assert Path(file) == tmp_path / SOURCE.name
    flops, steps, before, after = map(float, numbers.split())
    expected = EfficientNet(Scaling(depth=0.3, width=0.25), 10, stem_stride=1)
    assert flops == count_cost(expected, 16).flops and steps == 8 * 4
    assert after < 0.9 * before
    ours = {name for name in modules.split() if name.startswith("effnet")}
    assert ours == {"effnet_lib"} and "torchvision" not in modules.split()
    left = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
    assert left == {SOURCE.name, PROGRAM.name}  # no records, no folders
