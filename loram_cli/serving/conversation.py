"""A conversation in the terminal: what was said, which row answers, and the words that steer it."""

from collections.abc import Callable
from dataclasses import dataclass, field

from loram_cli.errors import LoramError
from loram_cli.evaluation.decode import Generation, stream_seed
from loram_cli.schema import unknown_name
from loram_cli.serving.deltas import Deltas
from loram_cli.serving.engine import ServingEngine
from loram_cli.serving.spec import ChatSpec
from loram_cli.training.data.conversations import Message

HELP = (
    "/row NAME: have another row answer; /rows: list them; /again: ask the last message anew, "
    "for instance of another row; /clear: forget what was said; /exit or Ctrl-D: end"
)


@dataclass
class Conversation:
    """What was said, to go on with.

    Attributes:
        engine: Answers.
        spec: How they are drawn.
        row: Who answers.
        turns: Messages so far, the system's first if any.
    """

    engine: ServingEngine
    spec: ChatSpec
    row: str
    turns: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything but the system message."""
        system = self.spec.system
        self.turns = [{"role": "system", "content": system}] if system else []

    def say(self, text: str, on_piece: Callable[[str], None]) -> str:
        """The answer to a message; both are remembered once it is whole.

        Args:
            text: The message.
            on_piece: Gets the answer's parts as they come.

        Raises:
            LoramError: The conversation fills the context, or the template refuses it.
        """
        row = self.engine.rows[self.row]
        asked: list[Message] = [*self.turns, {"role": "user", "content": text}]
        ids = row.chat_ids(asked)
        job = Generation(
            prompt=text,
            stops=self.spec.stop,
            max_new_tokens=min(self.spec.max_new_tokens, row.context_tokens - len(ids)),
            temperature=self.spec.temperature,
            top_p=self.spec.top_p,
            seed=stream_seed(self.spec.seed, text, len(asked)),
        )
        deltas = Deltas(job.stops, strip=True)

        def on_text(_: int, so_far: str) -> None:
            if piece := deltas.take(so_far):
                on_piece(piece)

        [done] = self.engine.answer(self.row, [ids], [job], on_text)
        if rest := deltas.rest(done.text):
            on_piece(rest)
        answer = done.text.strip()
        self.turns = [*asked, {"role": "assistant", "content": answer}]
        return answer

    def switch(self, name: str) -> None:
        """Have another row answer from here on.

        Raises:
            UsageError: There is no such row.
        """
        if name not in self.engine.rows:
            raise unknown_name("row", name, self.engine.rows, "/row")
        self.row = name

    def take_back(self) -> str:
        """Forget the last message and its answer.

        Returns:
            The message.

        Raises:
            LoramError: Nothing was said.
        """
        if len(self.turns) < 2 or self.turns[-1]["role"] != "assistant":
            raise LoramError("nothing was said yet", "write a message first")
        self.turns, last = self.turns[:-2], self.turns[-2]
        return str(last["content"])
