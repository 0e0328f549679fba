"""What users bring and what they get back, with the tests that hold it; some of them lie in other rooms."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
HERE = "front_door"
TABLE = {
    "noise of a sample comes from its own seed": [
        "sampling/test_schedulers.py::test_a_sample_depends_on_its_own_seed_only",
        "sampling/test_schedulers.py::test_noise_from_the_global_state_is_refused",
    ],
    "autoencoders that overflow": [f"{HERE}/test_folders.py::test_an_autoencoder_that_overflows"],
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
    "advice is followed": [f"{HERE}/test_advice.py::test_every_advice_that_can_be_typed_is_tried"],
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
    "signals and leftovers": [f"{HERE}/test_writing.py::test_every_command_stops_by_signals"],
    "two processes in one folder": [
        f"{HERE}/test_writing.py::test_pictures_of_many_processes_do_not_overwrite_each_other"
    ],
    "wishes": [f"{HERE}/test_wishes.py::test_every_command_runs"],
    "the documented face": ["app/test_face.py::test_dir_is_the_documented_face"],
    "results in consoles and notebooks": ["app/test_face.py::test_results_print_short_and_show_in_notebooks"],
    "options are called alike": ["app/test_face.py::test_options_are_called_alike"],
    "a wrong id of the hub without a connection": ["models/test_load.py::test_hub_id_offline_and_from_the_cache"],
}


@pytest.mark.parametrize("what", TABLE)
def test_it_is_held(what: str) -> None:
    for place in TABLE[what]:
        file, _, name = place.partition("::")
        assert f"def {name}(" in (TESTS / file).read_text(encoding="utf-8"), place
