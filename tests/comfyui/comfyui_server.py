"""Talks to a running ComfyUI as its front end does."""

import io
import json
import time
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode
from urllib.request import Request, urlopen

from PIL import Image


class Ran(NamedTuple):
    """What came of a graph."""

    outputs: dict[str, dict[str, Any]]  # by node
    messages: dict[str, dict[str, Any]]  # of the run, by kind: "execution_cached" names the nodes that cost nothing


class Server(NamedTuple):
    """Where it listens, what it says, and its folders."""

    url: str
    log: Path
    folder: Path

    def get(self, path: str) -> bytes:
        """The body of an answer; raises HTTPError for what is not there."""
        with urlopen(f"{self.url}/{path}") as answer:
            return bytes(answer.read())

    def run(self, graph: dict[str, Any]) -> Ran:
        """Run a graph in API format to its end."""
        asked = Request(f"{self.url}/prompt", json.dumps({"prompt": graph, "client_id": "tests"}).encode())
        with urlopen(asked) as answer:
            prompt_id = json.load(answer)["prompt_id"]
        while prompt_id not in (history := json.loads(self.get(f"history/{prompt_id}"))):
            time.sleep(0.5)
        result = history[prompt_id]
        messages = dict(result["status"]["messages"])
        assert result["status"]["status_str"] == "success", messages.get("execution_error")
        return Ran(result["outputs"], messages)

    def pictures(self, ran: Ran, node: str) -> list[Image.Image]:
        """What a Save Image node has saved."""
        return [
            Image.open(io.BytesIO(self.get(f"view?{urlencode(image)}"))).convert("RGB")
            for image in ran.outputs[node]["images"]
        ]
