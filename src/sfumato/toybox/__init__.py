"""The toybox: a procedural world of toys on a ground, in which everything about a picture is known exactly."""

from __future__ import annotations

from sfumato.startup import lazy

_HOME = {
    "scene": (
        "SHAPES COLORS PATTERNS SIZES GROUNDS SKIES Toy Camera Light Scene sample_scene is_held_out SPLITS".split()
    ),
    "captions": "Caption Phrase Dependency caption VOCABULARY".split(),
    "questions": "Question questions_about sample_question ANSWERS QUESTION_KINDS".split(),
    "rendering": "Frames render to_uint8".split(),
    "dataset": "ToyboxDataset export_imagefolder".split(),
    "cues": "CONCEPTS CUES FACTORS CueDataset concept_of conflicts cue_scenes factor_pairs".split(),
    "secret": "SECRETS TEXTURES VALIDATION Secret SecretToy references".split(),
    "looks": "continuous".split(),
    "planted": "HOMONYMS PLANTED PlantedCaption PlantedWord attributes_of".split(),
    "styles": "STYLES styled".split(),
    "sets": "SETS SetDataset joint_distribution set_scenes".split(),
    "biased": "Bias BIASED_SPLITS BiasedDataset draw_biased".split(),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_WHERE)


# rendering needs torch, scenes and captions do not
__getattr__, __dir__ = lazy(__name__, _WHERE)
