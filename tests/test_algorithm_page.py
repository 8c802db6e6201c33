"""docs/algorithm.md and its picture are what the code writes, and the example shows what the page says it shows."""

from __future__ import annotations

import importlib.util
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_and_the_picture_are_up_to_date(generator):
    for path, text in generator.generate().items():
        assert path.read_text() == text, f"docs/{path.name} is stale: run PYTHONPATH=src python docs/generate.py"


def test_check_notices_a_stale_page(generator, tmp_path, monkeypatch, capsys):
    page = (DOCS / "algorithm.md").read_text()
    (tmp_path / "algorithm.md").write_text(page.replace("The cat ran", "The cat flew"))
    monkeypatch.setattr(generator, "HERE", tmp_path)
    assert generator.main(["--check"]) == 1
    assert "algorithm.md is stale" in capsys.readouterr().err
    assert generator.main([]) == 0
    assert generator.main(["--check"]) == 0
    assert (tmp_path / "algorithm.md").read_text() == page


def test_the_example_shows_every_case(generator):
    """Two drafted words accepted of three, a shared prefix, slots that stay out, and a match whose parent failed."""
    example = generator.run()
    assert example.accepted.length.tolist() == [2]
    assert example.beams.tokens.shape[1] > example.tree.tokens.shape[1] - 1
    assert any(len(generator.children(example.tree, node)) > 1 for node in range(example.tree.tokens.shape[1]))
    tree, chosen = example.tree, example.choice.token
    matching = (tree.tokens == chosen.gather(1, tree.parent))[0].nonzero().flatten().tolist()
    assert 5 in matching
    assert not {5, 2} & generator.accepted_nodes(example)


def test_the_picture_is_xml_with_every_node(generator):
    example = generator.run()
    root = ElementTree.fromstring(generator.picture(example))
    labels = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert len(labels) == example.tree.tokens.shape[1] + 1
    assert labels[-1] == "bonus  home"
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for box in root.iter("{http://www.w3.org/2000/svg}rect"):
        assert float(box.attrib.get("x", 0)) + float(box.attrib["width"]) <= width
        assert float(box.attrib.get("y", 0)) + float(box.attrib["height"]) <= height
