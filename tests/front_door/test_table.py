"""What users bring and what they get back, with the tests that hold it; some of them lie in other rooms."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.__main__ import BENCHMARKS
from benchmarks.core import RESULTS

TESTS = Path(__file__).parents[1]
HERE = "front_door"
TABLE = {
    "noise of a sample comes from its own seed": [
        "sampling/test_schedulers.py::test_a_sample_depends_on_its_own_seed_only",
        "sampling/test_schedulers.py::test_noise_from_the_global_state_is_refused",
    ],
    "autoencoders that overflow": [
        f"{HERE}/test_folders.py::test_an_autoencoder_that_overflows",
        f"{HERE}/test_overflow.py::test_decoders_and_encoders_of_every_kind",
        f"{HERE}/test_overflow.py::test_the_others_of_a_batch_stay_as_they_are",
    ],
    "relevance is weighed by the rows that a head reads": [
        "relevance/test_readout.py::test_rows_are_those_that_the_head_reads",
        "relevance/test_readout.py::test_windows_are_refused_by_reason",
    ],
    "markers of what a file predicts": [f"{HERE}/test_files.py::test_prediction_is_that_of_the_file"],
    "masks and pictures in every form": [
        f"{HERE}/test_pictures.py::test_a_picture_in_every_mode",
        f"{HERE}/test_pictures.py::test_a_mask_means_the_same_to_every_system",
    ],
    "prompts in other programs' dialects": [f"{HERE}/test_prompts_of_other_programs.py::test_break_begins_a_chunk"],
    "recipes from elsewhere": [f"{HERE}/test_foreign_recipes.py::test_settings_of_a1111s_kin"],
    "single files": [f"{HERE}/test_files.py::test_kinds_are_told_by_the_header"],
    "folders": [f"{HERE}/test_folders.py::test_shards_in_every_spelling"],
    "arguments that users expect": [f"{HERE}/test_arguments.py::test_clip_skip"],
    "-o": [f"{HERE}/test_writing.py::test_o_names_a_picture"],
    "advice is followed": [
        f"{HERE}/test_advice.py::test_every_advice_that_can_be_typed_is_tried",
        f"{HERE}/test_remedies_of_files.py::test_files",
    ],
    "what is bit-identical and what is not": [
        "axioms/test_loop.py::test_a_sample_does_not_depend_on_its_neighbours",
        "test_house.py::test_no_number_depends_on_the_clock",
    ],
    "weights of prompts below 1": [
        f"{HERE}/test_prompts_of_other_programs.py::test_weights_below_1_by_compels_convention"
    ],
    "a stranger's picture opens nothing": [f"{HERE}/test_strangers.py::test_no_recipe_opens_a_file"],
    "bombs": [f"{HERE}/test_bounds.py::test_every_number_of_every_system_is_bounded"],
    "photographs are fitted": [f"{HERE}/test_writing.py::test_a_photograph_is_fitted_to_the_model"],
    "texts, terminals and streams": [f"{HERE}/test_texts_and_terminals.py::test_every_entrance_has_the_same_check"],
    "signals and leftovers": [
        f"{HERE}/test_writing.py::test_every_command_stops_by_signals",
        f"{HERE}/test_writing.py::test_programs_of_their_own_stop_by_signals",
        f"{HERE}/test_writing.py::test_whoever_writes_a_file_sweeps_its_folder",
        f"{HERE}/test_writing.py::test_a_resumed_log_has_no_step_twice",
    ],
    "two processes in one folder": [
        f"{HERE}/test_writing.py::test_pictures_of_many_processes_do_not_overwrite_each_other"
    ],
    "equal runs": [
        f"{HERE}/test_table.py::test_records_of_benchmarks_meet_their_aims",
        "test_house.py::test_no_number_depends_on_the_clock",
        "test_arrays.py::test_wherever_an_array_lies_its_copy_is_aligned",
    ],
    "the first minutes of a training": [
        f"{HERE}/test_first_minutes.py::test_commands_draw_their_bar",
        f"{HERE}/test_first_minutes.py::test_time_for_preparation_counts",
        "test_ondemand.py::test_rows_are_made_once_when_they_are_read",
    ],
    "wishes": [f"{HERE}/test_wishes.py::test_every_command_runs"],
    "one picture from the command line": [f"{HERE}/test_table.py::test_records_of_benchmarks_meet_their_aims"],
    "pictures of the documentation": [f"{HERE}/test_table.py::test_pictures_of_the_documentation_are_labelled"],
    "the documented face": ["app/test_face.py::test_dir_is_the_documented_face"],
    "results in consoles and notebooks": [
        "app/test_face.py::test_results_print_short_and_show_in_notebooks",
        "app/test_face.py::test_records_of_arrays_print_short",
    ],
    "options are called alike": [
        "app/test_face.py::test_options_are_called_alike",
        f"{HERE}/test_options_everywhere.py::test_strength_is_how_much_is_drawn_anew",
    ],
    "a wrong id of the hub without a connection": ["models/test_load.py::test_hub_id_offline_and_from_the_cache"],
}


@pytest.mark.parametrize("what", TABLE)
def test_it_is_held(what: str) -> None:
    for place in TABLE[what]:
        file, _, name = place.partition("::")
        assert f"def {name}(" in (TESTS / file).read_text(encoding="utf-8"), place


ON_RECORD = [
    ("one_picture", "plain diffusers"),
    ("equal_runs", "toy-sd"),
    ("equal_runs", "segmenter"),
    ("equal_runs", "inputs aligned"),
]


@pytest.mark.parametrize(("key", "figure"), ON_RECORD)
def test_records_of_benchmarks_meet_their_aims(key: str, figure: str) -> None:
    """What takes minutes to measure is on record: the benchmark is there, and its figure meets the aim."""
    assert key in BENCHMARKS
    record = json.loads((RESULTS / f"{key}.json").read_text(encoding="utf-8"))
    (found,) = (each for each in record["figures"] if figure in each["name"])
    aim = float(re.search(r"[\d.]+", found["aim"])[0])
    measured = float(re.search(r"[\d.]+", found["value"])[0])
    assert found["met"] is True and measured <= aim


#: pictures of the documentation in which nothing stands for anything
GALLERIES = {"toybox"}
DOCS = TESTS.parent / "docs"


def test_pictures_of_the_documentation_are_labelled() -> None:
    """Each is drawn by a script, with labels of its rows, columns or cells, and a page shows it."""
    tree = ast.parse((DOCS / "pictures.py").read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    (table,) = (
        node for node in tree.body if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "PICTURES"
    )
    drawn = {ast.literal_eval(key): value.id for key, value in zip(table.value.keys, table.value.values, strict=True)}
    images = {path.stem for path in (DOCS / "images").glob("*.png")}
    pages = "".join(path.read_text(encoding="utf-8") for path in (*DOCS.rglob("*.md"), TESTS.parent / "README.md"))
    assert images <= set(drawn)
    assert [name for name in images if f"images/{name}.png" not in pages] == []
    bare = []
    for name in set(drawn.values()) - GALLERIES:
        for call in (node for node in ast.walk(functions[name]) if isinstance(node, ast.Call)):
            if ast.unparse(call.func) != "sheet":
                continue
            told = {each.arg for each in call.keywords} & {"rows", "heads", "title"}
            cells = ast.unparse(functions[name]) if isinstance(call.args[0], ast.Name) else ast.unparse(call.args[0])
            if not told and not re.search(r"zip\(|\(\(?'\w|\((?:label|name|word|text|each\.\w+), ", cells):
                bare.append(f"{name}: {ast.unparse(call)}")
    assert not bare
    # a picture that was drawn before its script had labels begins with its first cell, not with the paper beside them
    labelled = [name for name, function in drawn.items() if function not in GALLERIES and name in images]
    corner = {name: Image.open(DOCS / "images" / f"{name}.png").convert("RGB").getpixel((0, 0)) for name in labelled}
    assert {name for name, colour in corner.items() if colour != (255, 255, 255)} == set()
