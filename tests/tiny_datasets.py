"""The papers' two data sets in their own folders and files, of a few drawn pictures."""

import json
from pathlib import Path

from hollow_core.demo import world

CLASSES = {"my_cup": "cup", "my_cat": "cat"}

# In the form of the published file, with prompts of the drawn world.
PROMPTS_AND_CLASSES = """Classes

subject_name,class
my_cup,cup
my_cat,cat

Prompts

Object Prompts

prompt_list = [
'a {0} {1} at night'.format(unique_token, class_token),
'a {0} {1} on the beach'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} at night'.format(unique_token, class_token),
'a {0} {1} in the owner\\'s hat'.format(unique_token, class_token)
]
"""


def write_dreambooth(folder: Path) -> Path:
    dataset = folder / "dataset"
    for name, kind in CLASSES.items():
        _pictures(dataset / name, kind)
    (dataset / "prompts_and_classes.txt").write_text(PROMPTS_AND_CLASSES)
    return folder


def write_customconcept101(folder: Path) -> Path:
    entries = []
    for name, kind in CLASSES.items():
        _pictures(folder / "benchmark_dataset" / name, kind)
        entries.append(
            {
                "instance_prompt": f"photo of a <new1> {kind}",
                "class_prompt": kind,
                "instance_data_dir": f"./benchmark_dataset/{name}",
                "class_data_dir": f"./regularization/{kind}",
                "prompt_filename": f"prompts/{kind}.txt",
            }
        )
        (folder / "prompts").mkdir(exist_ok=True)
        (folder / "prompts" / f"{kind}.txt").write_text("{} in the snow.\nPainting of a {} at sunset.\n")
    (folder / "dataset.json").write_text(json.dumps(entries))
    return folder


def _pictures(folder: Path, kind: str) -> None:
    folder.mkdir(parents=True)
    subject = next(subject for subject in world.HELD_OUT if subject.kind == kind)
    for number, (_, picture) in enumerate(world.reference_pictures(subject)[:2]):
        picture.save(folder / f"{number:02}.jpg")
