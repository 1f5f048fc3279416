"""The two data sets in the folders in which they are downloaded."""

import json
from pathlib import Path

import pytest
from tiny_datasets import write_customconcept101, write_dreambooth

from hollow_core.errors import HollowError
from hollow_core.evaluation.datasets import load_subjects


def test_dreambooths_objects_and_living_subjects_have_their_own_prompts(tmp_path: Path) -> None:
    cup, cat = load_subjects("dreambooth", write_dreambooth(tmp_path))
    assert cup[:3] == ("my_cup", "cup", tmp_path / "dataset" / "my_cup")
    assert cup.prompts == ("a {} at night", "a {} on the beach")
    assert cat.prompts[0] == "a {} at night"
    assert "hat" in cat.prompts[1]
    assert load_subjects("dreambooth", tmp_path / "dataset", ["my_cat"])[0].class_word == "cat"


def test_customconcept101_names_the_prompts_of_each_subject(tmp_path: Path) -> None:
    write_customconcept101(tmp_path)
    (tmp_path / "prompts" / "cat.txt").write_text("a sleeping {}.\n\n")
    cup, cat = load_subjects("customconcept101", tmp_path)
    assert cup == ("my_cup", "cup", tmp_path / "benchmark_dataset" / "my_cup", cup.prompts)
    assert cup.prompts == ("{} in the snow.", "Painting of a {} at sunset.")
    assert cat.prompts == ("a sleeping {}.",)


def test_what_is_missing_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(HollowError, match=r"no prompts_and_classes\.txt in .+ Give the folder of a clone of"):
        load_subjects("dreambooth", tmp_path)
    with pytest.raises(HollowError, match=r"no dataset\.json in"):
        load_subjects("customconcept101", tmp_path)
    write_dreambooth(tmp_path)
    with pytest.raises(HollowError, match=r"knows no subject 'rex'\. Choose from my_cup, my_cat"):
        load_subjects("dreambooth", tmp_path, ["rex"])
    (tmp_path / "dataset" / "my_cat").rename(tmp_path / "elsewhere")
    assert [subject.name for subject in load_subjects("dreambooth", tmp_path, ["my_cup"])] == ["my_cup"]
    with pytest.raises(HollowError, match="The pictures of my_cat are not in"):
        load_subjects("dreambooth", tmp_path)
    (tmp_path / "dataset" / "prompts_and_classes.txt").write_text("subject_name,class\nmy_cup,cup\n")
    with pytest.raises(HollowError, match="There are no prompts for my_cup"):
        load_subjects("dreambooth", tmp_path)
    (tmp_path / "dataset.json").write_text(
        json.dumps([{"class_prompt": "cat", "instance_data_dir": "./a", "prompt_filename": "prompts/cat.txt"}])
    )
    with pytest.raises(HollowError, match=r"cat\.txt cannot be read"):
        load_subjects("customconcept101", tmp_path)
