"""Generation on the demo base: ours against Hugging Face's ``generate``, in processor time.

Both decode the same held-out problems greedily in the same batches, with the demo's stops and
allowance; ``generate`` has a stopping criterion per row, as lm-eval's wrapper would need it.
"""

import time
from pathlib import Path

import torch
import transformers
from measure import options

import loram_cli
from loram_cli.evaluation.decode import Decoder, Generation
from loram_cli.modeling.load import load_causal_lm, load_tokenizer
from loram_cli.training.data.documents import load_instructions

STOPS, NEW_TOKENS, ROWS = ("Question:", "\n\n"), 120, 64


class StopPerRow(transformers.StoppingCriteria):
    """Ends a row at its own stop."""

    def __init__(self, tokenizer, prompt_tokens):
        self.tokenizer, self.prompt_tokens = tokenizer, prompt_tokens

    def __call__(self, input_ids, scores, **kwargs):
        tails = self.tokenizer.batch_decode(input_ids[:, self.prompt_tokens :][:, -12:])
        return torch.tensor([any(stop in tail for stop in STOPS) for tail in tails])


def main():
    options(__doc__).parse_args()
    torch.set_num_threads(1)
    base = Path(loram_cli.__file__).parent / "demo" / "base"
    model, tokenizer = load_causal_lm(base, dtype="float32", device="cpu"), load_tokenizer(base)
    tokenizer.padding_side = "left"
    prompts = [e.prompt for e in load_instructions("demo:test", limit=2 * ROWS)]
    prompts.sort(key=len, reverse=True)
    batches = [prompts[i : i + ROWS] for i in range(0, len(prompts), ROWS)]
    decoder = Decoder(model, tokenizer)

    def ours():
        for batch in batches:
            ids = [tokenizer(p)["input_ids"] for p in batch]
            decoder.generate(ids, [Generation(p, STOPS, NEW_TOKENS) for p in batch])

    def stock():
        for batch in batches:
            encoded = tokenizer(batch, return_tensors="pt", padding=True)
            stops = StopPerRow(tokenizer, encoded["input_ids"].shape[1])
            with torch.inference_mode():
                model.generate(
                    **encoded,
                    max_new_tokens=NEW_TOKENS,
                    do_sample=False,
                    stopping_criteria=transformers.StoppingCriteriaList([stops]),
                    pad_token_id=tokenizer.pad_token_id,
                )

    for name, run in (("ours", ours), ("generate", stock), ("ours again", ours)):
        start = time.process_time()
        run()
        print(f"{name}: {len(prompts)} problems, {time.process_time() - start:.2f} s of one core")


if __name__ == "__main__":
    main()
