"""What a spec may choose and the trainer takes: declared once, without torch."""

from typing import Literal

Exhausted = Literal["stop", "repeat"]
Precision = Literal["auto", "fp32", "bf16"]
Tracker = Literal["tensorboard", "wandb", "mlflow", "swanlab"]
Scheduler = Literal["cosine", "linear", "constant", "polynomial", "inverse_sqrt"]
Keep = Literal["best", "last"]
