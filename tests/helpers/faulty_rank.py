"""``loram`` under torchrun with a fault on one process: FAULT in the environment names it."""

import os
import signal

from loram_cli.errors import LoramError
from loram_cli.runs.processes import process_rank


def step_fails(*args, **kwargs):
    raise LoramError("the loss is nan at step 2")


def killed(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def data_fails(*args, **kwargs):
    raise LoramError("train.jsonl: cannot be read after line 3")


def main():
    from loram_cli.cli import app
    from loram_cli.training.data import records
    from loram_cli.training.loop import trainer

    rank, fault = os.environ["FAULT"].split()
    if process_rank() == int(rank):
        if fault == "data":
            records.read_records = data_fails
            from loram_cli.training.data import documents as data

            data.read_records = data_fails
        else:
            trainer.StepCallback.on_log = step_fails if fault == "step" else killed
    app.main()


if __name__ == "__main__":
    main()
