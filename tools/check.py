"""Check a Hugging Face folder against transformers: every layer's output, the logits and the loss.

    python tools/check.py FOLDER

Both models run in float32 on the CPU, on the first characters of this file. Each line shows the
largest relative difference of any token. A line that ends in MISMATCH is above the tolerance, and
the exit status is then 1. The architecture has to be one that transformers implements.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import convert  # noqa: E402
import data  # noqa: E402
import train  # noqa: E402
from model import Transformer  # noqa: E402

TOLERANCE = 1e-4  # relative; rounding in float32 alone gives up to 2e-5
CHARACTERS = 600  # of this file


@torch.no_grad()
def check(folder):
    """Print the differences. Return True if any is above TOLERANCE."""
    from transformers import AutoModelForCausalLM

    convert.load_config(folder)  # transformers would look for a missing folder on the internet
    tokenizer = data.open_tokenizer(folder)
    text = Path(__file__).read_text()[:CHARACTERS]
    ids = torch.tensor(tokenizer(text).input_ids)  # (T,)
    ours = our_outputs(folder, ids)

    # eager attention is the plainest implementation, and needs no package
    reference = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False).eval()
    output = reference(ids[None], labels=ids[None], output_hidden_states=True)
    layers = output.hidden_states[1:]  # the first one is the embedding
    theirs = [hidden[0] for hidden in layers] + [output.logits[0]]
    names = [f"layer {i}" for i in range(len(layers))] + ["logits"]

    mismatch = False
    for name, a, b in zip(names, ours, theirs):
        difference = largest_difference(a, b)
        label = ""
        if not difference <= TOLERANCE:  # also where it is nan
            mismatch = True
            label = " MISMATCH"
        print(f"{name:<10} {difference:.1e}{label}")

    logits = ours[-1]
    loss = torch.nn.functional.cross_entropy(logits[:-1], ids[1:])
    print(f"loss of {len(ids)} tokens {loss:.6f}, transformers' {output.loss:.6f}")
    return mismatch


def our_outputs(folder, ids):
    """Return the output of every layer, (T, C) each, then the logits (T, V)."""
    model = Transformer(convert.load_config(folder))
    convert.load_weights(model, folder)
    outputs = []

    def keep(module, inputs, output):
        outputs.append(output)

    # transformers shows the last layer's output after the final norm only
    for module in [*model.model["layers"][:-1], model.model["norm"]]:
        module.register_forward_hook(keep)
    T = len(ids)
    cu_seqlens = torch.tensor([0, T], dtype=torch.int32)
    logits = model(ids, torch.arange(T), cu_seqlens, T)
    return [*outputs, logits]


def largest_difference(a, b):
    """a, b (T, n) -> the largest norm of a row of a - b, relative to that row of b.

    By row, because the activations of the first token may be far larger than all others.
    """
    return ((a - b).norm(dim=-1) / b.norm(dim=-1)).max().item()


if __name__ == "__main__":
    if len(sys.argv) != 2 or "--help" in sys.argv:
        sys.exit(__doc__)
    try:
        sys.exit(1 if check(sys.argv[1]) else 0)
    except Exception as error:
        train.report(error)
