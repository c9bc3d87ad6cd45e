"""What to serve, and whom to chat with."""

from dataclasses import dataclass

from loram_cli.schema import setting
from loram_cli.stages.evaluate.spec import AnswersSpec

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class ChatSpec(AnswersSpec):
    """A conversation in the terminal."""

    system: str | None = setting(None, help="A system message to begin with.")


@dataclass(frozen=True, kw_only=True)
class ServeSpec(AnswersSpec):
    """A server of OpenAI's protocol."""

    host: str = setting("127.0.0.1", help="Address; others than the loopback reach anyone.")
    port: int = setting(8000, help="0 takes a free one.", at_least=0, at_most=65535)
    queue: int = setting(8, help="Requests that may wait; more are refused.", at_least=0)
    request_seconds: float = setting(300.0, help="Time for one answer.", above=0)

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in LOOPBACK
