"""The benchmark of what else a trainer has: that its measure of a style is one, and that a small run of it goes on."""

import random
from pathlib import Path

import pytest

from benchmarks import held_out, trainer
from hollow_core.demo import run, world


def test_the_measure_of_a_style_tells_pictures_in_it_from_others() -> None:
    subject = world.HELD_OUT[0]
    drawn = [world.draw(subject, scene, random.Random(place)) for place, scene in enumerate(held_out.SCENES)]
    assert trainer.judged_style([trainer.in_style(picture) for picture in drawn])["distance"] < 1
    assert trainer.judged_style(drawn)["distance"] > 50


def test_every_way_is_another_training_of_as_many_steps() -> None:
    ways = trainer.ways(run.SETTINGS)
    assert {way.steps for way in ways.values()} == {run.SETTINGS.steps}
    assert len({str(way.fixed) for way in ways.values()}) == len(ways)
    assert (ways["Lion"].rate, ways["Prodigy"].rate) == (pytest.approx(6e-4), 1.0)


@pytest.mark.slow
def test_a_small_run_of_the_style_prints_its_table_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--out", str(tmp_path), "--only", "style", "--quick"]
    trainer.main(asked)
    table = capsys.readouterr().out
    assert "| drawn in the style | 0." in table
    assert "| hollowed LoRA, single path | " in table
    (tmp_path / "style" / "set-0" / "plain LoRA" / "11.png").unlink()  # as if it was stopped there
    trainer.main(asked)
    assert capsys.readouterr().out == table
