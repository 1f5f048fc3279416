"""TensorBoard's curves of a training, by accelerate's trackers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from ..errors import HollowError
from ..progress import Progress


def check_tensorboard(folder: Path | None) -> Path | None:
    """The folder again. Raises HollowError where one is asked for, and TensorBoard is not installed."""
    if folder is not None and find_spec("tensorboard") is None:
        raise HollowError(
            "--log-dir needs TensorBoard, which is not installed. Run `pip install tensorboard`, or leave it out."
        )
    return folder


@contextmanager
def tracking(folder: Path | None) -> Iterator[Callable[[str, str, Progress], None]]:
    """While inside, what is given of a run is written down in `folder`/`run`, step by step, behind what a run that goes
    on has there; without a folder, nothing is."""
    if folder is None:
        yield lambda run, stage, done: None
        return
    from accelerate import Accelerator

    accelerator = Accelerator(log_with="tensorboard", project_dir=folder)

    def track(run: str, stage: str, done: Progress) -> None:
        if stage != "train":
            return
        if not accelerator.trackers:  # steps from here on that a killed run has written come again
            accelerator.init_trackers(run, init_kwargs={"tensorboard": {"purge_step": done.step, "flush_secs": 10}})
        values = {"loss": done.loss, "learning rate": done.learning_rate, "validation loss": done.validation}
        accelerator.log({name: value for name, value in values.items() if value is not None}, step=done.step)

    try:
        yield track
    finally:
        accelerator.end_training()
