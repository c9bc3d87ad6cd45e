"""What to recover, and whether to merge it."""

from dataclasses import dataclass
from pathlib import Path

from loram_cli.errors import UsageError
from loram_cli.schema import Bytes, Spec, setting
from loram_cli.stages.fit.spec import DEVICE_FORM, DEVICE_HELP, FORCE_HELP, OUT_HELP

MERGE_BYTES_HELP = "Size of a shard of the merged checkpoint at most."


@dataclass(frozen=True, kw_only=True)
class RecoverSpec(Spec):
    """What to recover."""

    adapter: Path = setting(
        help="Adapter directory, not the run's.",
        flag="--in",
        place=True,
        in_key=False,
        private=True,
    )
    pruned: Path | None = setting(
        None,
        help="For an adapter by another trainer: the pruned or aligned model that it was made on.",
        place=True,
        in_key=False,
        private=True,
    )
    model: Path = setting(
        help="The original base.", flag="", place=True, in_key=False, private=True
    )
    out: Path = setting(help=OUT_HELP, place=True, in_key=False, private=True)
    checkpoint: str | None = setting(
        None,
        help="Recover the adapter of a checkpoint: its step, or best.",
        default_text="the adapter itself",
        # The digest of its factors is in the key.
        in_key=False,
    )
    fit_scale: bool = setting(
        False,
        help="Scale the update to what lowers the full model's loss on training examples most.",
        in_key="changed",
    )
    scale_examples: int = setting(
        64, help="Training examples for --fit-scale.", at_least=1, in_key="changed"
    )
    device: str | None = setting(
        None,
        help=f"For --fit-scale: {DEVICE_HELP}",
        form=DEVICE_FORM,
        in_key=False,
        private=True,
    )
    merge: bool = setting(
        False, help="Also write the full merged checkpoint.", in_key=False, private=True
    )
    merge_out: Path | None = setting(
        None,
        help="Where the merged checkpoint goes.",
        place=True,
        in_key=False,
        private=True,
    )
    max_shard_bytes: Bytes = setting(
        Bytes(5 * 10**9), help=MERGE_BYTES_HELP, at_least=1, in_key=False, private=True
    )
    force: bool = setting(
        False, help=FORCE_HELP, place=True, switch=True, in_key=False, private=True
    )

    def check(self) -> None:
        """Refuse a checkpoint of an adapter that another trainer made.

        Raises:
            UsageError: Both are given.
        """
        if self.checkpoint is not None and self.pruned is not None:
            raise UsageError(
                "--checkpoint does not go with --pruned",
                "pass the checkpoint's own directory as --in",
            )


@dataclass(frozen=True, kw_only=True)
class MergeSpec(Spec):
    """What to merge: a recovered adapter into its base."""

    adapter: Path = setting(
        help="A recovered adapter.", flag="", place=True, in_key=False, private=True
    )
    model: Path = setting(
        help="The original base.", flag="", place=True, in_key=False, private=True
    )
    out: Path = setting(help=OUT_HELP, flag="--merge-out", place=True, in_key=False, private=True)
    max_shard_bytes: Bytes = setting(
        Bytes(5 * 10**9), help=MERGE_BYTES_HELP, at_least=1, private=True
    )
    force: bool = setting(
        False, help=FORCE_HELP, place=True, switch=True, in_key=False, private=True
    )
