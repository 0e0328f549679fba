"""A further family is one file: it is found by itself, and what it offers agrees with how it draws."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sfumato.cards import CAPABILITIES
from sfumato.errors import NotSupported
from sfumato.models import families as package
from sfumato.models.families import Family, families, family_of, offering
from sfumato.sampling.process import PROCESSES

SHIPPED = sorted({f for f in families().values() if f.__module__.startswith(package.__name__)}, key=lambda f: f.name)

NEW = """
from sfumato.models.families.amused import Amused


class Muse(Amused):
    name = "muse"
    pipeline_classes = ("MusePipeline",)
"""

FIND = """
import sys
from sfumato.models import families as package
package.__path__.append(sys.argv[1])
print(package.family_of("MusePipeline").name, *package.offering(["text_attention"]))
"""


def test_a_file_in_the_folder_is_all_it_takes(tmp_path: Path):
    """In a process of its own, since a family stays known."""
    with pytest.raises(NotSupported, match="'MusePipeline' is not supported; known: Amused"):
        family_of("MusePipeline")
    (tmp_path / "muse.py").write_text(NEW)
    ran = subprocess.run([sys.executable, "-c", FIND, str(tmp_path)], capture_output=True, text=True, check=True)
    found, *offered = ran.stdout.split()
    assert found == "muse" and set(offered) == {*offering(["text_attention"]), "muse"}


@pytest.mark.parametrize("family", SHIPPED, ids=lambda family: family.name)
def test_capabilities_agree_with_the_process(family: type[Family]):
    process = PROCESSES[family.process]
    assert family.capabilities <= set(CAPABILITIES)
    assert ("noise_path" in family.capabilities) == process.noise_path
    assert ("differentiable_state" in family.capabilities) <= process.differentiable
    assert ("clips" in family.capabilities) == ("f" in family.state.split()) != ("pictures" in family.capabilities)


def test_names_are_taken_once():
    names = [family.name for family in SHIPPED]
    assert len(names) == len(set(names)) >= 8
    served = [pipeline for family in SHIPPED for pipeline in family.__dict__["pipeline_classes"]]
    assert len(served) == len(set(served))
