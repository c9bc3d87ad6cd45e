"""What a user does who has transformers, PEFT and TRL, and none of our code.

Run as a program: ``foreign.py load MODEL...`` prints logits, a line for each model, ``foreign.py sft
MODEL DATA OUT`` trains by TRL's own trainer. The package cannot be imported in here.
"""

import json
import subprocess
import sys


class NoLoram:
    """Refuses the package, wherever it is installed."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "loram_cli":
            raise ModuleNotFoundError(f"No module named '{name}'")


def in_a_stock_process(*words: object) -> str:
    """What this file prints, run as a program in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def load(*models: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    for model in models:
        found, report = AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
        amiss = {key: report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        assert not any(amiss.values()), (model, amiss)
        with torch.no_grad():
            logits = found.eval()(torch.arange(2, 50).reshape(2, 24)).logits
        sys.stdout.write(json.dumps([float(x) for x in logits[0, :, :4].flatten()]) + "\n")


def sft(model: str, data: str, out: str) -> None:
    from datasets import load_dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    rows = load_dataset("json", data_files=data, split="train")
    rows = rows.rename_columns({"question": "prompt", "answer": "completion"})
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            out, max_steps=2, per_device_train_batch_size=2, learning_rate=2e-2, use_cpu=True,
            report_to=[], save_strategy="no", max_length=48, bf16=False,
        ),
        train_dataset=rows,
        peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(out)


if __name__ == "__main__":
    sys.meta_path.insert(0, NoLoram())
    try:
        import loram_cli  # noqa: F401
    except ModuleNotFoundError:
        {"load": load, "sft": sft}[sys.argv[1]](*sys.argv[2:])
    else:
        sys.exit("the package can be imported")
