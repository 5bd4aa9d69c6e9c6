"""`megavl chat MODEL`: turns with a model, with images."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megavl.config.errors import DataError
from megavl.foreign.printing import say, say_error
from megavl.main.device import add_device_arguments, choose_device
from megavl.main.sampling import add_sampling_arguments, sampling_of

if TYPE_CHECKING:
    from megavl.generate.conversation import Conversation

HELP = """/image PATH  show an image with the next message; it stands in front, or where the message says
             <image_placeholder>; repeat it for several images
/reset       begin a new conversation
/help        this list
/exit        leave (so does the end of the input)
Ctrl-C breaks an answer off; what was said of it stays in the conversation."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", metavar="MODEL", help="MegaVL checkpoint, directory of checkpoints, or HF folder")
    parser.add_argument("--system", metavar="TEXT", help="system text of the chat; default: the model's own")
    add_sampling_arguments(parser)
    add_device_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Chat until `/exit` or the end of the input; returns 0."""
    choose_device(arguments.device)
    from megavl.generate.conversation import Conversation
    from megavl.generate.open_model import find_model, loaded
    from megavl.generate.pretrained import Model, Processor

    sampling = sampling_of(arguments)
    source = find_model(arguments.model)
    with loaded(source, dtype=arguments.dtype) as stage:
        conversation = Conversation(
            Model(stage, Processor(source.config, source.tokenizer)),
            system=arguments.system,
            max_new_tokens=arguments.max_new_tokens,
            sampling=sampling,
        )
        _Chat(conversation).run()
    return 0


class _Chat:
    """Turns input lines into messages and commands."""

    def __init__(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self.images: list[Path] = []
        """Images for the next message."""
        self.typed = sys.stdin.isatty()

    def run(self) -> None:
        if self.typed:
            say("/help lists the commands.")
        while (line := self._read()) is not None:
            word, _, rest = line.strip().partition(" ")
            if word == "/exit":
                return
            if word == "/help":
                say(*HELP.splitlines())
            elif word == "/reset":
                self.conversation.reset()
                self.images = []
            elif word == "/image":
                self._show(rest.strip())
            elif word.startswith("/"):
                self._complain(f"{word} is no command; /help lists them")
            elif word or self.images:
                self._answer(line.strip())

    def _read(self) -> str | None:
        """The next line; None at the end of the input."""
        while True:
            try:
                return input("> " if self.typed else "")
            except EOFError:
                return None
            except KeyboardInterrupt:
                say("", "/exit leaves.")

    def _show(self, path: str) -> None:
        from megavl.data.image import decode_image

        try:
            decode_image(path)
        except DataError as error:
            self._complain(f"/image {path}: {error}" if path not in str(error) else str(error))
        else:
            self.images.append(Path(path))

    def _answer(self, text: str) -> None:
        answer = self.conversation.ask(text, self.images)
        said = False
        try:
            for piece in answer:
                say(piece, end="", keep="\n\t")
                said = said or bool(piece)
        except DataError as error:
            self._complain(str(error))
            return
        except KeyboardInterrupt:
            answer.close()
        self.images = []
        say("" if said else "(no answer)")

    def _complain(self, message: str) -> None:
        say_error(message)
