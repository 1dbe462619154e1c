"""What `import mezo` gives: one table of names, and everything else derived from it."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import mezo


def test_the_type_checker_s_imports_are_the_table():
    """Three lists by hand had come to differ."""
    tree = ast.parse(Path(mezo.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imported = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name  # a re-export, in mypy's eyes
            whole = f"mezo.{alias.name}" if node.module == "mezo" else node.module
            imported[alias.name] = whole
    assert imported == mezo.PUBLIC


def test_every_public_name_is_there_and_listed():
    pytest.importorskip("trl")
    for name, home in mezo.PUBLIC.items():
        found = getattr(mezo, name)
        assert found is import_module(home) if home == f"mezo.{name}" else found.__name__ == name
        assert name in dir(mezo)
    assert set(mezo.__all__) == mezo.PUBLIC.keys() - mezo.OPTIONAL.keys()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mezo.nothing  # noqa: B018


@pytest.mark.parametrize(
    "name",
    [
        "distributed.join",
        "load",
        "offload.load_offloaded",
        "offload.offload",
        "rewards.Command",
        "rules.Momentum",
        "trajectory.replay",
    ],
)
def test_what_messages_name_works_after_import_mezo_alone(name):
    """`mezo.distributed.join` raised AttributeError unless something had imported the module."""
    code = f"import mezo; mezo.{name}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_mezo_imports_nothing_heavy():
    """The command line's help is to be there at once."""
    code = "import sys, mezo; sys.exit(bool({'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
