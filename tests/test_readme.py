"""README's own example, on the embedded model and with a step in place of a training."""

import re
from pathlib import Path

from PIL import Image

from hollow_core.demo import run, world


def test_the_library_example_runs(tmp_path, monkeypatch):
    [example] = re.findall(r"```python\n(.+?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)
    small = {
        'Path("v1-5-pruned-emaonly.safetensors")': repr(run.MODEL).replace("PosixPath", "Path"),
        "512": str(world.SIZE),
        "Setting(cut=3)": "Setting(cut=3, samples=2, training=TrainSettings(steps=1))",
        "import Request": "import TrainSettings, Request",
        '"cuda"': '"cpu"',
        "seeds=[0]": "seeds=[0], settings=SampleSettings(steps=2)",
        "import TrainSettings": "import SampleSettings, TrainSettings",
    }
    for theirs, ours in small.items():
        assert theirs in example
        example = example.replace(theirs, ours)
    monkeypatch.chdir(tmp_path)
    run.write_references(tmp_path / "my-dog", world.HELD_OUT[0])
    done = {}
    exec(example, done)
    assert (tmp_path / "my-lora" / "lora.safetensors") == tmp_path / done["outcome"].file
    assert isinstance(done["picture"], Image.Image)
