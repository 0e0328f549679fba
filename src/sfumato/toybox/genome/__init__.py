"""Visual Genome's data model (Krishna et al. 2017): real and toy data read as the same records, toys written in its
files.

``read`` what was downloaded or made here, ``export_genome`` the toybox, ``check`` a folder, and turn records into the
arrays that scene-graph models learn from. Scores of predicted graphs: :mod:`sfumato.metrics.scene_graph`.
"""

from __future__ import annotations

from sfumato.startup import lazy

_HOME = {
    "records": (
        "GenomeGraph GenomeImage GenomeObject GenomeQuestion GenomeRecord GenomeRegion GenomeRelationship Mention"
        " RegionGraph Synset".split()
    ),
    "reader": ["VisualGenome"],
    "integrity": ["Finding", "check"],
    "scenes": "record_of SYNSETS".split(),
    "writer": "GenomeWriter export_genome read_scenes".split(),
    "arrays": "Vocabulary sg2im_arrays sgg_arrays save_arrays load_arrays truths_of vocabulary".split(),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_WHERE)


# writing renders, which needs torch; reading does not
__getattr__, __dir__ = lazy(__name__, _WHERE)
