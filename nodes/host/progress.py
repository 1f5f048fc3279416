"""A long run's progress in ComfyUI's node: bar, text, picture, and a Cancel that keeps what was done."""

import html
import time

import comfy.model_management
import comfy.utils
from PIL import Image
from server import PromptServer

from ...hollow_core.progress import Progress

PICTURE_PIXELS = 1024  # ComfyUI scales a larger preview down to this


class NodeProgress:
    """Give `tell` and `stop` to a run of the library, and call `finish` after it.

    ComfyUI reports Cancel by an exception at the next report of progress. Inside training that would lose the
    steps since the last checkpoint; so it is caught here, the run told to stop, and raised again by `finish`.
    """

    def __init__(self, node_id: str, stage: str) -> None:
        self.node_id, self.stage = node_id, stage
        self.bar = comfy.utils.ProgressBar(1, node_id)
        self.cancelled = False
        self.begun = time.monotonic()
        self.new = 0
        """Steps of this run."""

    def tell(self, done: Progress, mean_loss: float | None = None, picture: Image.Image | None = None) -> None:
        """Report one more step."""
        self.new += 1
        preview = None if picture is None else ("JPEG", picture, PICTURE_PIXELS)
        try:
            self.bar.update_absolute(done.step, done.steps, preview)
        except comfy.model_management.InterruptProcessingException:
            self.cancelled = True
        say(f"{self.stage}: {in_words(done, mean_loss)}", self.node_id)

    def stop(self) -> bool:
        """Whether Cancel was pressed."""
        return self.cancelled or comfy.model_management.processing_interrupted()

    def finish(self) -> None:
        """Let ComfyUI know of a Cancel that the run has obeyed."""
        if self.cancelled:
            raise comfy.model_management.InterruptProcessingException()
        comfy.model_management.throw_exception_if_processing_interrupted()

    def end_picture(self, picture: Image.Image) -> None:
        """Show the picture that the node will have as its output, and let front ends forget it.

        The canvas may keep the last one it was shown, Nodes 2.0 shows it below the output as long as it is not
        forgotten. It is where a node begins to run, which here it seems to do once more.
        """
        server = getattr(PromptServer, "instance", None)
        if server is not None and self.new:
            self.bar.update_absolute(self.bar.total, preview=("JPEG", picture, PICTURE_PIXELS))
            server.send_sync("progress_state", {"prompt_id": server.last_prompt_id, "nodes": {}}, server.client_id)
            self.bar.update_absolute(self.bar.total)

    def made(self, steps: int) -> str:
        """What of `steps` in all this run had to do: "290 were there, 10 new, 0:12 min"."""
        if self.new == 0:
            return "all were there"
        there = "all" if self.new == steps else f"{steps - self.new} were there, {self.new}"
        return f"{there} new, {_minutes(time.monotonic() - self.begun)}"


def say(text: str, node_id: str) -> None:
    """Show a text on a node, which has place for two lines of some 45 letters, and breaks them within a word.

    Front ends take it for HTML, Nodes 2.0 for Markdown; so it is escaped, as names in a graph are anyone's.
    """
    server = getattr(PromptServer, "instance", None)  # there is none where a test runs nodes by itself
    if server is not None:
        server.send_progress_text(html.escape(text, quote=False), node_id)


def in_words(done: Progress, mean_loss: float | None = None) -> str:
    """ "step 120 of 400, 1:05 min left", and a line "loss 0.0931 (mean 0.1250), held out 0.1402" where there is one."""
    loss = "" if done.loss is None else f",\nloss {done.loss:.4f}"
    held_out = "" if done.validation is None else f", held out {done.validation:.4f}"
    mean = "" if mean_loss is None else f" (mean {mean_loss:.4f})"
    return f"step {done.step} of {done.steps}, {_minutes(done.seconds_left)} left{loss}{mean}{held_out}"


def _minutes(seconds: float) -> str:
    """ "1:05 min"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02} min"
