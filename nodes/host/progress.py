"""A long run's progress in ComfyUI's node: bar, text, picture, and a Cancel that keeps what was done."""

import comfy.model_management
import comfy.utils
from PIL import Image
from server import PromptServer

from ...hollow_core.progress import Progress

PICTURE_PIXELS = 512  # ComfyUI scales a larger preview down to this


class NodeProgress:
    """Give `tell` and `stop` to a run of the library, and call `finish` after it.

    ComfyUI reports Cancel by an exception at the next report of progress. Inside training that would lose the
    steps since the last checkpoint; so it is caught here, the run told to stop, and raised again by `finish`.
    """

    def __init__(self, node_id: str, stage: str) -> None:
        self.node_id, self.stage = node_id, stage
        self.bar = comfy.utils.ProgressBar(1, node_id)
        self.cancelled = False
        self.picture: Image.Image | None = None
        """Shown with the next report."""

    def tell(self, done: Progress) -> None:
        """Report one more step."""
        preview = None if self.picture is None else ("JPEG", self.picture, PICTURE_PIXELS)
        try:
            self.bar.update_absolute(done.step, done.steps, preview)
        except comfy.model_management.InterruptProcessingException:
            self.cancelled = True
        say(f"{self.stage}: {in_words(done)}", self.node_id)

    def stop(self) -> bool:
        """Whether Cancel was pressed."""
        return self.cancelled or comfy.model_management.processing_interrupted()

    def finish(self) -> None:
        """Let ComfyUI know of a Cancel that the run has obeyed."""
        if self.cancelled:
            raise comfy.model_management.InterruptProcessingException()
        comfy.model_management.throw_exception_if_processing_interrupted()


def say(text: str, node_id: str) -> None:
    """Show a text on a node."""
    server = getattr(PromptServer, "instance", None)  # there is none where a test runs nodes by itself
    if server is not None:
        server.send_progress_text(text, node_id)


def in_words(done: Progress) -> str:
    """ "step 120 of 400, loss 0.0931, 1:05 min left"."""
    minutes, seconds = divmod(round(done.seconds_left), 60)
    loss = "" if done.loss is None else f", loss {done.loss:.4f}"
    return f"step {done.step} of {done.steps}{loss}, {minutes}:{seconds:02} min left"
