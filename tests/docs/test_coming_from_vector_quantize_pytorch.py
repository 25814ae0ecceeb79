"""The page that compares with vector-quantize-pytorch shows what its script prints."""

import importlib.util
import re
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "coming-from-vector-quantize-pytorch.md"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("comparison", DOCS / "coming_from_vector_quantize_pytorch.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def output_in_page() -> str:
    return re.search(r"\n```\n(.*?)\n```\n", PAGE.read_text(encoding="utf-8"), re.DOTALL).group(1)


def test_our_lines_of_the_page_are_what_the_script_prints(script: ModuleType) -> None:
    shown = [line for line in output_in_page().splitlines() if "vector-quantize-pytorch" not in line]
    assert len(shown) == 2 * len(script.ROWS)
    assert shown == script.report({"qlae_kernels": script.ours}).splitlines()


def test_the_lines_of_the_other_library_are_what_the_script_prints(script: ModuleType) -> None:
    pytest.importorskip("vector_quantize_pytorch", reason="needs vector-quantize-pytorch: pip install '.[bench]'")
    name = f"vector-quantize-pytorch {version('vector-quantize-pytorch')}"
    shown = re.search(r"vector-quantize-pytorch [\d.]+", output_in_page()).group()
    if name != shown:
        pytest.skip(f"needs {shown}, of which the page speaks; {name} is installed")
    assert script.report({name: script.peer, "qlae_kernels": script.ours}) == output_in_page()
